"""Converted models compute what the programs that saved them compute.

lit-gpt and Meta are held against the maths in ``foreign_models.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from tests.model.converting import IDS, SHAPE, convert, logits, prefixed, tensors
from tests.model.foreign_models import (
    Shape,
    State,
    lit_logits,
    lit_state,
    meta_logits,
    meta_state,
)

LIT = {
    "TinyLlama": {"attention": "attn", "mlp": "swiglu"},
    "lit-gpt": {"attention": "attn", "mlp": "fc"},
    "litgpt 0.5": {"attention": "qkv", "mlp": "fc"},
}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("style", LIT.values(), ids=LIT)
def test_lit_gpt_computes_the_same(
    style: dict[str, str], groups: int, config: Callable[..., Path], tmp_path: Path
) -> None:
    shape = Shape(groups=groups)
    state = lit_state(shape, **style)
    torch.save({"model": state, "iter_num": 7}, tmp_path / "iter-7-ckpt.pth")
    settings = config(num_key_value_heads=groups)
    source, target = tmp_path / "iter-7-ckpt.pth", tmp_path / "target"
    assert convert(source, target, model_config=settings) == 0
    torch.testing.assert_close(logits(target), lit_logits(state, IDS, shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_meta_and_llama2c_compute_the_same(
    theta: float, groups: int, config: Callable[..., Path], tmp_path: Path
) -> None:
    shape = Shape(groups=groups, theta=theta)
    state = meta_state(shape)
    saved = {**state, "rope.freqs": torch.ones(4)}
    source, target = tmp_path / "consolidated.00.pth", tmp_path / "target"
    torch.save(saved, source)
    settings = config(num_key_value_heads=groups, rope_theta=theta)
    assert convert(source, target, model_config=settings) == 0
    torch.testing.assert_close(logits(target), meta_logits(state, IDS, shape), rtol=1e-4, atol=1e-4)


def test_baby_llama2_shares_its_matrix(config: Callable[..., Path], tmp_path: Path) -> None:
    """llama2.c's ckpt.pt: compiled, shared, among other state."""
    state = meta_state(SHAPE, tied=True)
    saved = {
        "model": {f"_orig_mod.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "model_args": {"dim": 48},
        "iter_num": 5,
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    target = tmp_path / "target"
    assert convert(tmp_path / "ckpt.pt", target, model_config=config(tie_word_embeddings=True)) == 0
    assert "lm_head.weight" not in tensors(target)
    torch.testing.assert_close(logits(target), meta_logits(state, IDS, SHAPE), rtol=1e-4, atol=1e-4)


WRAPPED: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": prefixed(""),
    "compiled": prefixed("_orig_mod."),
    "DDP": prefixed("module."),
    "DDP and compiled": prefixed("module._orig_mod."),
    "compiled DDP": prefixed("_orig_mod.module."),
    "in a Lightning module": prefixed("model."),
    "deep in something": prefixed("agent.policy."),
    "compiled layers": lambda state: {
        name.replace(".self_attn.", "._orig_mod.self_attn."): value for name, value in state.items()
    },
    "FSDP": lambda state: {
        name.replace(".mlp.", "._fsdp_wrapped_module.mlp."): value for name, value in state.items()
    },
    "model": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed("model.")(state), "step": 3},
    "model_state_dict": lambda state: {"args": {"lr": 0.1}, "model_state_dict": state},
    "DeepSpeed": lambda state: {"module": prefixed("module.")(state), "dp_world_size": 1},
    "old buffers": lambda state: {
        **state,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_come_off(
    wrap: Callable[[State], dict[str, Any]], original: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "saved.pt", tmp_path / "target"
    torch.save(wrap(tensors(original)), source)
    flags = {"model_config": original / "config.json", "tokenizer_path": original}
    assert convert(source, target, **flags) == 0
    assert torch.equal(logits(target), logits(original))


def test_model_without_head(original: Path, tmp_path: Path) -> None:
    """What AutoModel saves is a whole model if the head is the embedding."""
    model = LlamaModel.from_pretrained(original)
    model.save_pretrained(tmp_path / "bare")
    state = tensors(tmp_path / "bare")
    assert "embed_tokens.weight" in state
    source, target = tmp_path / "bare" / "model.safetensors", tmp_path / "target"
    config = json.loads((original / "config.json").read_text())
    settings = tmp_path / "tied.json"
    settings.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert convert(source, target, model_config=settings) == 0
    with torch.no_grad():
        last = model(IDS[None]).last_hidden_state[0]
    wanted = torch.nn.functional.linear(last, state["embed_tokens.weight"])
    torch.testing.assert_close(logits(target), wanted, rtol=1e-4, atol=1e-4)
