"""The weight files of a Hugging Face checkpoint: one ``model.safetensors``, or shards and index.

They are read and written in blocks: what is in memory depends on no tensor's size. The format
(https://huggingface.co/docs/safetensors): the header's length in 8 bytes, the header as JSON, the
tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, write_json

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BLOCK = 8 * 2**20  # bytes read or copied at a time

# The format's names of the types that can be converted into each other -> torch's.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {name: key for key, name in FLOATS.items()}

Progress = Callable[[int], object]  # called with a number of bytes just written


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: str  # the format's name, e.g. BF16
    shape: list[int]
    start: int  # offset of its first byte from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class Weights:
    """Where every tensor of a checkpoint lies."""

    directory: Path
    file_of: Mapping[str, str]  # tensor name -> file name
    index: dict[str, Any] | None  # content of the index; None for a single file
    entries: Mapping[str, Entry]  # tensor name -> place in its file
    metadata: Mapping[str, dict[str, str]]  # file name -> free text from its header

    @property
    def files(self) -> list[str]:
        """The names of the weight files, sorted."""
        return sorted(set(self.file_of.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped: its bytes are read when they are used."""
        with _open(self.directory / self.file_of[name]) as shard:
            return shard.get_tensor(name)


@dataclass(frozen=True)
class NewRows:
    """A matrix that keeps its first ``kept`` rows and gets ``added`` rows after them.

    ``blocks`` makes these from the kept rows [kept, columns], as they lie in the file: it yields
    float32 [some rows, columns], ``added`` rows together.
    """

    kept: int
    added: int
    blocks: Callable[[torch.Tensor], Iterator[torch.Tensor]]


def find_weights(directory: Path) -> Weights:
    """Finds the tensors of the checkpoint in ``directory``.

    Raises:
        DataError: there are no safetensors weights, or a shard is missing or broken.
    """
    path = directory / _INDEX
    if path.is_file():
        index = read_index(path)
        return _read_headers(directory, index["weight_map"], index)
    if (directory / _SINGLE).is_file():
        with _open(directory / _SINGLE) as shard:
            file_of = dict.fromkeys(shard.keys(), _SINGLE)
        return _read_headers(directory, file_of, None)
    if any(directory.glob("*.bin")):
        raise DataError(
            f"{directory}: the weights are .bin files (pickles); convert them with "
            f"colossal-llama convert-checkpoint --source_checkpoint {directory}"
        )
    raise DataError(f"{directory}: no weights here: {_SINGLE} and {_INDEX} are both missing")


def read_index(path: Path) -> dict[str, Any]:
    """An index of shards: its ``weight_map`` names, for every tensor, a file beside it.

    Raises:
        DataError: it is not such an index.
    """
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise DataError(f"{path}: not an index: it has no weight_map")
    for name in index["weight_map"].values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise DataError(f"{path}: {name!r} is not the name of a file beside it")
    return index


def _read_headers(
    directory: Path, file_of: Mapping[str, str], index: dict[str, Any] | None
) -> Weights:
    found, metadata = dict[str, dict[str, Entry]](), {}
    for name in sorted(set(file_of.values())):
        found[name], metadata[name] = _read_header(directory / name)
    entries = {}
    for key, name in file_of.items():
        if key not in found[name]:
            raise DataError(f"{directory / name}: it has no tensor {key}, but the index says so")
        entries[key] = found[name][key]
    return Weights(directory, file_of, index, entries, metadata)


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensor name -> place, and the file's free text."""
    with _open(path):  # checks that the header is sound and the file as long as it says
        pass
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {"format": "pt"}
    entries = {}
    for name, described in header.items():
        start, end = described["data_offsets"]
        place = 8 + length + start
        entries[name] = Entry(described["dtype"], described["shape"], place, end - start)
    return entries, metadata


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, but the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a complete safetensors file: {error}") from None


def size_after(weights: Weights, grown: Mapping[str, NewRows], dtype: str | None) -> int:
    """Bytes of all tensors that ``rewrite`` will write; ``total_size`` in the index."""
    return sum(
        _written(entry, grown.get(name), dtype).size for name, entry in weights.entries.items()
    )


def _written(entry: Entry, rows: NewRows | None, dtype: str | None) -> Entry:
    """What a tensor will be, its place left open."""
    kind = _NAMES[dtype] if dtype is not None and entry.dtype in FLOATS else entry.dtype
    shape = [rows.kept + rows.added, *entry.shape[1:]] if rows is not None else entry.shape
    if kind == entry.dtype and rows is None:
        return replace(entry, start=0)
    return Entry(kind, shape, 0, math.prod(shape) * _item_size(kind))


def rewrite(
    weights: Weights,
    target: Path,
    grown: Mapping[str, NewRows],
    dtype: str | None,
    progress: Progress,
) -> None:
    """Writes the checkpoint to ``target`` with rows added to the tensors of ``grown``.

    Floating tensors are written as ``dtype`` (torch's name), or with None as they are: then old
    rows and other tensors are copied byte for byte. Files keep their names and their tensors;
    those in which nothing changes are copied whole.

    Raises:
        DataError: a number is too large for ``dtype``.
    """
    for name in weights.files:
        keys = [key for key, file in weights.file_of.items() if file == name]
        plan = {key: _written(weights.entries[key], grown.get(key), dtype) for key in keys}
        source = weights.directory / name
        with source.open("rb", 0) as reader, (target / name).open("wb", 0) as writer:
            if all(
                key not in grown and plan[key].dtype == weights.entries[key].dtype for key in keys
            ):
                _copy(reader, writer, 0, source.stat().st_size, progress)
                continue
            _write_header(writer, plan, weights.metadata[name])
            for key in _ordered(plan):
                _write_tensor(weights, key, grown.get(key), plan[key], reader, writer, progress)
    if weights.index is not None:
        metadata = {
            **(weights.index.get("metadata") or {}),
            "total_size": size_after(weights, grown, dtype),
        }
        metadata.pop("total_parameters", None)
        write_json(target / _INDEX, {**weights.index, "metadata": metadata})


def _item_size(dtype: str) -> int:
    import torch

    return int(getattr(torch, FLOATS[dtype]).itemsize)


def _ordered(plan: Mapping[str, Entry]) -> list[str]:
    """Wide types first, so that every tensor starts at a multiple of its items' size."""

    def key(name: str) -> tuple[int, str]:
        items = math.prod(plan[name].shape)
        return (-(plan[name].size // items) if items else 0, name)

    return sorted(plan, key=key)


def _write_header(writer: FileIO, plan: Mapping[str, Entry], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in _ordered(plan):
        start, end = end, end + plan[name].size
        entry = plan[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    _write(writer, len(text).to_bytes(8, "little") + text)


def _write_tensor(
    weights: Weights,
    name: str,
    rows: NewRows | None,
    planned: Entry,
    reader: FileIO,
    writer: FileIO,
    progress: Progress,
) -> None:
    entry = weights.entries[name]
    row_size = entry.size // entry.shape[0] if rows is not None else 0
    size = rows.kept * row_size if rows is not None else entry.size
    if planned.dtype == entry.dtype:
        _copy(reader, writer, entry.start, size, progress)
    else:
        for block in _read_blocks(reader, entry, size):
            _write_numbers(writer, block, planned.dtype, name, progress)
    if rows is None:
        return
    added = 0
    for block in rows.blocks(weights.tensor(name)[: rows.kept]):
        _write_numbers(writer, block, planned.dtype, name, progress)
        added += len(block)
    assert added == rows.added, f"{added} new rows, not {rows.added}"


def _copy(reader: FileIO, writer: FileIO, start: int, size: int, progress: Progress) -> None:
    """Copies bytes inside the kernel (on some file systems they are then shared, not copied)."""
    end = start + size
    while start < end:
        wanted = min(16 * _BLOCK, end - start)
        try:
            done = os.copy_file_range(reader.fileno(), writer.fileno(), wanted, start)
        except (OSError, AttributeError):  # not on this system, or not between these two disks
            reader.seek(start)
            done = _write(writer, reader.read(min(_BLOCK, wanted)))
        if not done:
            raise DataError(f"{reader.name}: the file was cut short while it was being read")
        start += done
        progress(done)


def _read_blocks(reader: FileIO, entry: Entry, size: int) -> Iterator[torch.Tensor]:
    """The first ``size`` bytes of a tensor as flat tensors of its type."""
    import torch

    for at in range(0, size, _BLOCK):
        buffer = bytearray(min(_BLOCK, size - at))
        reader.seek(entry.start + at)
        if reader.readinto(buffer) != len(buffer):
            raise DataError(f"{reader.name}: the file was cut short while it was being read")
        yield torch.frombuffer(buffer, dtype=getattr(torch, FLOATS[entry.dtype]))


def _write_numbers(
    writer: FileIO, block: torch.Tensor, dtype: str, name: str, progress: Progress
) -> None:
    import torch

    rounded = block.to(getattr(torch, FLOATS[dtype])).contiguous()
    finite = torch.isfinite(rounded)
    if not finite.all() and (torch.isfinite(block) & ~finite).any():
        raise DataError(
            f"{name}: it holds {block.abs().max().item():.3g}, too large for {FLOATS[dtype]}; "
            "give --dtype bfloat16 or float32"
        )
    progress(_write(writer, rounded.view(-1).view(torch.uint8).numpy().data))


def _write(writer: FileIO, data: bytes | memoryview) -> int:
    """Writes all of ``data`` and returns its length; one call of the system may write less."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += writer.write(view[done:]) or 0
    return done
