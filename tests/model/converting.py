"""The command of these tests, and what its results compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from colossal_llama import command
from colossal_llama.model.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint
from tests.model.foreign_models import Shape, State

SHAPE = Shape()
IDS = torch.arange(1, 60) * 11 % SHAPE.ids


def convert(source: Path, target: Path, **flags: object) -> int:
    """The command, in this process; the exit code."""
    given: dict[str, object] = {"source_checkpoint": source, "target_model_path": target, **flags}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return command.run(ConvertCheckpointOptions, convert_checkpoint, words)


def load(directory: Path) -> Any:
    """The model, as anyone loads it; every weight comes from the files."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    return load(directory)(IDS[None]).logits[0]


def tensors(directory: Path) -> State:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}
