"""Checks the tensors of a foreign checkpoint against a model, and writes them as its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama.errors import DataError
from colossal_llama.model.checkpoint_layouts import Heads, Part
from colossal_llama.model.foreign_checkpoint import StoredTensor
from colossal_llama.model.safetensors_files import FLOATS
from colossal_llama.model.shard_writer import write_shards

if TYPE_CHECKING:
    import torch

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 4  # of a kind of problem, by name


class Origin(NamedTuple):
    """Where a tensor of the Hugging Face layout comes from."""

    name: str
    tensor: StoredTensor
    part: Part


def find_origins(
    stored: Mapping[str, StoredTensor], parts: Mapping[str, Sequence[Part]], where: str
) -> dict[str, Origin]:
    """The origin of every tensor, by its Hugging Face name.

    Raises:
        DataError: two names of the checkpoint mean the same tensor.
    """
    origins: dict[str, Origin] = {}
    for name, tensor in stored.items():
        for part in parts[name]:
            if part.name in origins:
                raise DataError(
                    f"{where}: {origins[part.name].name} and {name} are both {part.name}"
                )
            origins[part.name] = Origin(name, tensor, part)
    return origins


def vocabulary(origins: Mapping[str, Origin], size: int, where: str, *, may_trim: bool) -> int:
    """The number of embedding rows beyond ``size``: padding, to be left out.

    Raises:
        DataError: there are fewer than ``size``, or more and ``may_trim`` is false.
    """
    name, tensor, _ = origins[INPUT]
    rows = tensor.shape[0]
    if rows < size or (rows > size and not may_trim):
        remedy = (
            "give --trim_vocab_padding to drop the rest if it is padding"
            if rows > size
            else "configuration or tokenizer belong to another model"
        )
        raise DataError(f"{where}: {name} has {rows} rows for a vocabulary of {size}; {remedy}")
    return rows - size


def trimmed(origins: Mapping[str, Origin], padding: int) -> dict[str, Origin]:
    """The origins without the last ``padding`` rows of embedding and head."""
    if not padding:
        return dict(origins)
    return {
        key: Origin(name, tensor, Part(key, lambda rows, heads: rows[:-padding]))
        if key in (INPUT, OUTPUT)
        else Origin(name, tensor, part)
        for key, (name, tensor, part) in origins.items()
    }


def without_shared_head(
    origins: Mapping[str, Origin], config: Any, where: str
) -> dict[str, Origin]:
    """The origins without the head, if the model shares it with the embedding.

    Raises:
        DataError: it is to be shared, but the checkpoint has another one.
    """
    import torch

    if not config.tie_word_embeddings or OUTPUT not in origins:
        return dict(origins)
    ours, other = (origins[name].tensor.read() for name in (OUTPUT, INPUT))
    if not torch.equal(ours, other):
        raise DataError(
            f"{where}: {origins[OUTPUT].name} differs from {origins[INPUT].name}, but the "
            "configuration sets tie_word_embeddings"
        )
    return {key: origin for key, origin in origins.items() if key != OUTPUT}


def check(
    origins: Mapping[str, Origin], shapes: Mapping[str, tuple[int, ...]], heads: Heads, where: str
) -> None:
    """Compares what there is with what the model has to have.

    Raises:
        DataError: naming what is missing, not known, or of another shape or kind.
    """
    missing = [name for name in shapes if name not in origins]
    unknown = [origin.name for name, origin in origins.items() if name not in shapes]
    wrong = []
    for name in shapes.keys() & origins.keys():
        shape = _shape(origins[name], heads)
        if shape != shapes[name]:
            found = list(shape) if shape is not None else "cannot be divided"
            wrong.append(f"{name} {found} instead of {list(shapes[name])}")
        elif str(origins[name].tensor.dtype).removeprefix("torch.") not in FLOATS.values():
            wrong.append(f"{name} is {origins[name].tensor.dtype}, quantised")
    hint = " (shared with the embedding? then the configuration has to set tie_word_embeddings)"
    problems = [
        f"missing {_some(missing)}{hint if missing == [OUTPUT] else ''}" if missing else "",
        f"not known {_some(sorted(set(unknown)))}" if unknown else "",
        f"other shapes: {_some(sorted(wrong))}" if wrong else "",
    ]
    if any(problems):
        raise DataError(f"{where}: {'; '.join(filter(None, problems))}")


def _shape(origin: Origin, heads: Heads) -> tuple[int, ...] | None:
    """The shape after cutting; None where the tensor cannot be cut for these heads."""
    import torch

    try:
        return tuple(origin.part.cut(torch.empty(origin.tensor.shape, device="meta"), heads).shape)
    except (RuntimeError, IndexError):
        return None


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def write_weights(
    origins: Mapping[str, Origin],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Heads,
    dtype: torch.dtype | None,
    target: Path,
) -> None:
    """Writes the weights of a checked checkpoint in the model's order, shard by shard.

    Args:
        dtype: what to convert to; None keeps what each tensor has.
    """
    import math

    import torch

    kinds = {name: dtype or origins[name].tensor.dtype for name in shapes}

    def tensor(name: str) -> torch.Tensor:
        # A copy of its own: parts of one matrix share memory, and so do mapped files.
        origin = origins[name]
        values = origin.part.cut(origin.tensor.read(), heads)
        return torch.empty(shapes[name], dtype=kinds[name]).copy_(values)

    sizes = {name: math.prod(shape) * kinds[name].itemsize for name, shape in shapes.items()}
    write_shards(target, sizes, tensor, label="converting")
