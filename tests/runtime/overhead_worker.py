"""Trains a small model with and without ``runtime/overhead.py``, and prints what came of it.

    python tests/runtime/overhead_worker.py

A line of JSON for each plugin and side: losses, gradient norms, a hash of the weights, and how
often gradients or weights went through a collective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.runtime import overhead
from colossal_llama.runtime.distributed import distributed

BIG_COLLECTIVES = ("reduce_scatter_tensor", "all_gather_into_tensor")
STEPS, MICRO_BATCHES, VOCABULARY = 3, 2, 4000


def plugins() -> Iterator[tuple[str, Any]]:
    """Fresh plugins by name."""
    from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin

    for precision in ("fp32", "bf16"):
        common: dict[str, Any] = {
            "precision": precision, "max_norm": 0.5, "overlap_communication": False,
        }  # fmt: skip
        for stage in (1, 2):
            yield f"zero{stage} {precision}", LowLevelZeroPlugin(stage=stage, **common)
        yield f"3d {precision}", HybridParallelPlugin(1, 1, zero_stage=0, **common)


def train(plugin: Any, precision: str) -> dict[str, Any]:
    """Three steps, of two micro-batches each; clipping bites."""
    from colossalai.booster import Booster
    from colossalai.nn.optimizer import HybridAdam

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if precision == "bf16":
        model = model.bfloat16()
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.01))
    losses, norms = [], []
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(0, VOCABULARY, (2, 16))
            loss = model(input_ids=ids, labels=ids).loss
            booster.backward(loss, optimizer)
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.get_grad_norm()))
    digest = hashlib.sha256()
    for name, weight in model.unwrap().named_parameters():
        digest.update(name.encode() + weight.detach().float().numpy().tobytes())
    kinds = {type(module).__name__ for module in model.modules()}
    return {
        "losses": losses,
        "norms": norms,
        "weights": digest.hexdigest(),
        "ddp": "DistributedDataParallel" in kinds,
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives that the block calls, one for each call."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in BIG_COLLECTIVES}
    for name, original in originals.items():

        def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, call)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def main() -> None:
    torch.set_num_threads(1)
    apply_all, overhead.apply_all = overhead.apply_all, lambda: None
    with distributed(0):
        for side in ("without", "with"):
            if side == "with":
                apply_all()
            for name, plugin in plugins():
                with counted() as calls:
                    report = train(plugin, name.split()[1])
                print(json.dumps({"name": name, "side": side, "calls": len(calls), **report}))


if __name__ == "__main__":
    main()
