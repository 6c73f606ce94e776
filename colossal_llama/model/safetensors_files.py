"""The weight files of a Hugging Face checkpoint: one ``model.safetensors``, or shards and index."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, write_json

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Where every tensor of a checkpoint lies."""

    directory: Path
    file_of: Mapping[str, str]  # tensor name -> file name
    index: dict[str, Any] | None  # content of the index; None for a single file

    @property
    def files(self) -> list[str]:
        return sorted(set(self.file_of.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read alone."""
        with _open(self.directory / self.file_of[name]) as shard:
            return shard.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the file's header."""
        with _open(self.directory / self.file_of[name]) as shard:
            return list(shard.get_slice(name).get_shape())


def find_weights(directory: Path) -> Weights:
    """Finds the tensors of the checkpoint in ``directory``.

    Raises:
        DataError: there are no safetensors weights, or a shard is missing or broken.
    """
    if (directory / _INDEX).is_file():
        index = read_json(directory / _INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise DataError(f"{directory / _INDEX}: not an index: it has no weight_map")
        weights = Weights(directory, index["weight_map"], index)
        for name in weights.files:
            with _open(directory / name):
                pass
        return weights
    if (directory / _SINGLE).is_file():
        with _open(directory / _SINGLE) as shard:
            return Weights(directory, dict.fromkeys(shard.keys(), _SINGLE), None)
    if any(directory.glob("*.bin")):
        raise DataError(
            f"{directory}: the weights are .bin files (pickles); convert them with "
            "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)"
        )
    raise DataError(f"{directory}: no weights here: {_SINGLE} and {_INDEX} are both missing")


def rewrite(
    weights: Weights,
    target: Path,
    changed: Mapping[str, torch.Tensor],
    progress: Callable[[], object],
) -> None:
    """Writes the checkpoint to ``target`` with some tensors replaced.

    Only files that hold such a tensor are read and written anew; the others are copied. At most
    one file's tensors are in memory. ``progress`` is called after each file.
    """
    from safetensors.torch import save_file

    size_change = 0
    for name in weights.files:
        inside = {key for key in changed if weights.file_of[key] == name}
        if inside:
            with _open(weights.directory / name) as shard:
                tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
                metadata = shard.metadata() or {"format": "pt"}
            for key in inside:
                size_change += changed[key].nbytes - tensors[key].nbytes
                tensors[key] = changed[key]
            save_file(tensors, target / name, metadata)
        else:
            shutil.copyfile(weights.directory / name, target / name)
        progress()
    if weights.index is not None:
        metadata = dict(weights.index.get("metadata") or {})
        if "total_size" in metadata:
            metadata["total_size"] = int(metadata["total_size"]) + size_change
        metadata.pop("total_parameters", None)
        write_json(target / _INDEX, {**weights.index, "metadata": metadata})


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, but the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a complete safetensors file: {error}") from None
