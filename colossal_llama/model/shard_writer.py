"""Weights written one shard after the other, as Hugging Face lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.errors import DataError
from colossal_llama.storage import write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000  # of a file; a tensor that is larger has a file of its own


def write_shards(
    directory: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], torch.Tensor],
    *,
    label: str,
) -> None:
    """Writes ``model.safetensors``, or numbered shards and their index, into ``directory``.

    At most one shard is in memory.

    Args:
        sizes: bytes of every tensor, in the order in which they are asked for and divided.
        tensor: makes the tensor of this name: contiguous, and sharing memory with no other.
        label: what the progress bar says.

    Raises:
        DataError: a file cannot be written, because the disk is full for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tqdm import tqdm

    shards = divide(sizes, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    total = sum(sizes.values())
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1) as progress:
        for number, names in enumerate(shards, 1):
            tensors = {}
            for name in names:
                tensors[name] = tensor(name)
                assert tensors[name].nbytes == sizes[name], name
                progress.update(sizes[name])
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = "model.safetensors"
            try:
                save_file(tensors, directory / file, {"format": "pt"})
            except SafetensorError as error:  # also where it stands for an OSError
                raise DataError(f"{directory / file}: cannot be written: {error}") from None
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names, in order, in groups whose sizes add up to no more than ``limit``."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
