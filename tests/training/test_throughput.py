"""How fast a run is: the arithmetic of a model, counted; devices that are known, and others."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.training import throughput
from colossal_llama.training.parameters import freeze_matching
from colossal_llama.training.throughput import PEAK_FLOPS, flops_per_token, peak_flops


def config(**sizes: Any) -> LlamaConfig:
    plain = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8, "attn_implementation": "eager",
    }  # fmt: skip
    return LlamaConfig(**{**plain, **sizes})


def counted(model: LlamaForCausalLM, length: int) -> float:
    """FLOPs per token of all products of matrices; attention is written out in "eager"."""
    ids = torch.randint(model.config.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("length", [16, 256])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 2},
        {"head_dim": 24},
        {"vocab_size": 3000},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1, "intermediate_size": 500},
    ],
)
def test_counts_what_the_model_computes(sizes: dict[str, Any], length: int) -> None:
    model = LlamaForCausalLM(config(**sizes))
    assert flops_per_token(model, length) == pytest.approx(counted(model, length), rel=0.01)


EMBEDDINGS = "model.embed_tokens.*"


@pytest.mark.parametrize(
    "frozen",
    [
        [EMBEDDINGS],
        ["model.layers.*"],
        ["model.layers.*", "model.norm.*"],
        [EMBEDDINGS, "model.layers.[01].*"],
        [EMBEDDINGS, "model.layers.*", "model.norm.*"],
        ["*proj*", "*norm*"],
        [EMBEDDINGS, "model.layers.0.*", "*mlp*"],
    ],
)
@pytest.mark.parametrize("length", [16, 256])
def test_frozen_weights_have_no_gradients(frozen: list[str], length: int) -> None:
    model = LlamaForCausalLM(config())
    freeze_matching(model, frozen)
    assert flops_per_token(model, length) == pytest.approx(counted(model, length), rel=0.02)


@pytest.mark.parametrize("rank", [4, 32])
def test_adapters(rank: int) -> None:
    model = LlamaForCausalLM(config())
    full = flops_per_token(model, 64)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["q_proj", "down_proj"]), model)
    found = flops_per_token(model, 64)
    # Keys and values of the lowest layer need no gradients; that is not looked at so closely.
    assert found == pytest.approx(counted(model, 64), rel=0.06)
    assert found < (0.8 if rank == 4 else 1.0) * full


def test_llama_2_7b_by_hand() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32,
        ))  # fmt: skip
    # 6.74 billion weights without the input embedding's 131 million.
    assert flops_per_token(model, 0) == pytest.approx(6 * (6.738e9 - 0.131e9), rel=1e-3)
    attention = flops_per_token(model, 4096) - flops_per_token(model, 0)
    assert attention == 12 * 32 * 4096 * 4096


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 SXM5", "fp16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        # These have no bf16 arithmetic.
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("cpu", "bf16", None),
        ("Some GPU of tomorrow", "bf16", None),
    ],
)
def test_peak_of_devices(name: str, precision: str, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_table_is_plausible() -> None:
    for pattern, peaks in PEAK_FLOPS:
        assert peaks.keys() <= {"bf16", "fp16", "fp32"}, pattern
        assert all(5e12 < peak < 5e15 for peak in peaks.values()), pattern
        assert peaks["fp32"] <= peaks["fp16"], pattern


class Device:
    def __init__(self, name: str) -> None:
        self._name = name

    def get_device_name(self) -> str:
        return self._name

    def max_memory_allocated(self) -> int:
        return 12345


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a Throughput for a device of some name, without ColossalAI."""
    import sys
    from types import ModuleType

    def make(name: str) -> throughput.Throughput:
        module = ModuleType("colossalai.accelerator")
        module.get_accelerator = lambda: Device(name)
        monkeypatch.setitem(sys.modules, "colossalai", ModuleType("colossalai"))
        monkeypatch.setitem(sys.modules, "colossalai.accelerator", module)
        return throughput.Throughput(LlamaForCausalLM(config()), 256, "bf16")

    return make


def test_utilisation_is_the_share_of_the_peak(device: Any) -> None:
    measured = device("NVIDIA H100 80GB HBM3")
    rate = 989e12 / flops_per_token(LlamaForCausalLM(config()), 256)
    assert measured.utilisation(rate) == pytest.approx(1)
    assert measured.utilisation(rate / 4) == pytest.approx(0.25)
    assert measured.utilisation(0.0) == 0
    assert device("cpu").utilisation(rate) is None
    assert measured.peak_memory() == 12345


def test_time_between_steps(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    measured = device("cpu")
    found = []
    for end, step in ((103.0, 2.0), (107.5, 4.0), (110.0, 2.5), (111.0, 1.5)):
        now[0] = end
        found.append(measured.seconds_since_last_step(step))
    # The last took longer, by its own clock, than there was time for.
    assert found == pytest.approx([1.0, 0.5, 0.0, 0.0])
