"""Every kind of optimizer leaves out an update, and goes on as if it had not been.

    torchrun --nproc_per_node 2 tests/integration/skip_worker.py

The first process prints a line of JSON a kind: {"name", "found", "equal", "moved"}.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossalai.nn.optimizer import HybridAdam
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.runtime.distributed import distributed
from colossal_llama.training import gradients
from colossal_llama.training.callbacks import any_rank
from colossal_llama.training.optimizer_state import optimizer_tensors

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def gemini(precision: str, smallest: float) -> Any:
    return GeminiPlugin(
        precision=precision, placement_policy="static", pin_memory=False,
        enable_async_reduce=False, min_chunk_size_m=smallest, search_range_m=1, hidden_dim=32,
        enable_gradient_accumulation=True, initial_scale=1.0, min_scale=1.0, max_norm=1.0,
    )  # fmt: skip


def zero(precision: str, stage: int) -> Any:
    return LowLevelZeroPlugin(
        stage=stage, precision=precision, overlap_communication=False,
        initial_scale=1.0, min_scale=1.0, max_norm=1.0,
    )  # fmt: skip


def three_d(precision: str, **settings: Any) -> Any:
    return HybridParallelPlugin(
        **{"tp_size": 1, "pp_size": 1, "zero_stage": 0, **settings}, precision=precision,
        overlap_communication=False, initial_scale=1.0, min_scale=1.0, max_norm=1.0,
    )  # fmt: skip


KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "gemini gathered": ("bf16", lambda p: gemini(p, 32)),
    "gemini sharded": ("bf16", lambda p: gemini(p, 0.01)),
    "gemini fp16": ("fp16", lambda p: gemini(p, 0.01)),
    "zero1": ("bf16", lambda p: zero(p, 1)),
    "zero2": ("bf16", lambda p: zero(p, 2)),
    "zero2 fp16": ("fp16", lambda p: zero(p, 2)),
    "zero2 fp32": ("fp32", lambda p: zero(p, 2)),
    "3d": ("bf16", three_d),
    "3d fp16": ("fp16", three_d),
    "3d fp32": ("fp32", three_d),
    "3d zero1": ("bf16", lambda p: three_d(p, zero_stage=1)),
    "3d tp": ("bf16", lambda p: three_d(p, tp_size=2)),
}


def train(kind: str, steps: str) -> tuple[list[bool], dict[str, torch.Tensor], bool]:
    """A step for each letter: "g" is good, in a "b" one micro-batch of rank 0 is not finite.

    Returns:
        whether the gradients of each step were finite on all ranks; the optimizer's tensors at
        the end; whether any weight moved.
    """
    precision, plugin = KINDS[kind]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DTYPES[precision])
    booster = Booster(plugin=plugin(precision))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.01))
    start = copied(optimizer)
    found, number = [], 0
    for letter in steps:
        number += letter == "g"
        torch.manual_seed(number)
        for micro_batch in range(2):
            ids = torch.randint(128, (2, 16))
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            if letter == "b" and micro_batch == 0 and dist.get_rank() == 0:
                loss = loss * torch.inf
            booster.backward(loss, optimizer)
        found.append(not any_rank(not gradients.are_finite(optimizer), CPU))
        if found[-1]:
            optimizer.step()
            optimizer.zero_grad()
        else:
            gradients.discard(optimizer)
    end = copied(optimizer)
    moved = any(not torch.equal(start[name], end[name]) for name in start)
    del booster, model, optimizer
    gc.collect()
    return found, end, moved


def copied(optimizer: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in optimizer_tensors(optimizer).items()}


def main() -> None:
    with distributed(seed=0):
        for kind in KINDS:
            _, straight, moved = train(kind, "ggg")
            found, skipped, _ = train(kind, "gbgbbg")
            equal = straight.keys() == skipped.keys() and all(
                torch.equal(tensor, skipped[name])
                for name, tensor in straight.items()
                if name != "loss_scale_counters"
            )
            _, _, moved_by_bad = train(kind, "bb")
            equal = not any_rank(not equal, CPU)
            if dist.get_rank() == 0:
                record = {
                    "name": kind, "found": found, "equal": equal, "moved": moved,
                    "moved_by_bad": moved_by_bad,
                }  # fmt: skip
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
