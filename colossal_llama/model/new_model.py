"""A new model with random weights: the shape from a preset, the ids from a tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.model.configuration import (
    empty_model,
    read_fields,
    token_fields,
    write_settings,
)
from colossal_llama.model.shard_writer import write_shards

if TYPE_CHECKING:
    import torch

_BLOCK = 2**22  # numbers drawn at a time; part of what a seed means, so never to be changed


def write(preset: Path, tokenizer_path: Path, target: Path, *, seed: int, dtype: str) -> str:
    """Writes configuration and random weights into ``target``; returns a summary for the user.

    The distribution is the one of transformers' ``_init_weights``: matrices and embeddings are
    normal with mean 0 and deviation ``initializer_range``, the row of the padding id and biases
    are 0, the gains of norms 1. Needs memory for one shard.

    Raises:
        DataError: preset or tokenizer cannot be used.
    """
    import torch

    fields = read_fields(preset) | token_fields(tokenizer_path)
    config, model = empty_model(fields, preset)
    kind = getattr(torch, dtype)
    modules = dict(model.named_modules())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    std = config.initializer_range

    def tensor(name: str) -> torch.Tensor:
        module = modules[name.rpartition(".")[0]]
        return _draw(module, name, shapes[name], std=std, seed=seed, dtype=kind)

    sizes = {name: shape.numel() * kind.itemsize for name, shape in shapes.items()}
    write_shards(target, sizes, tensor, label="drawing random weights")
    write_settings(config, kind, target)
    count = sum(shape.numel() for shape in shapes.values())
    return f"a new model of {count:,} parameters for {fields['vocab_size']} ids"


def _draw(
    module: Any, name: str, shape: torch.Size, *, std: float, seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """The initial value of one parameter of ``module``.

    The generator is seeded by seed and name, so that the numbers do not depend on the other
    tensors; they are drawn in float32 and then rounded, so that all dtypes start from the same.
    """
    import torch

    is_matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if not is_matrix:
        assert type(module).__name__.endswith("RMSNorm"), name
        return torch.ones(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    values = torch.empty(shape, dtype=dtype)
    for block in values.view(-1).split(_BLOCK):
        block.copy_(torch.empty(block.shape).normal_(0.0, std, generator=generator))
    if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
        values[module.padding_idx] = 0
    return values
