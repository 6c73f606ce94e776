"""Writes safetensors files, and knows their checksums without reading them again.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, the header as
JSON, the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash

# XXH3 finds damage, not malice. SHA-256 would take longer than writing does.
_PIECE = 1 << 20  # bytes: read to be hashed, they are still in the cache to be written

# The format's names of the types.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Writes ``tensors``, which are on the CPU, to ``path``; returns the file's ``checksum``.

    Raises:
        OSError: the file could not be written.
    """
    # Wide types first, so that every tensor starts at a multiple of its items' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    try:
        with path.open("wb", buffering=0) as stream:
            _write(stream, memoryview(len(text).to_bytes(8, "little") + text), digest)
            for _, tensor in ordered:
                _write(stream, _bytes(tensor), digest)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return str(digest.hexdigest())


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, as hexadecimal text."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, not copied if it is contiguous."""
    plain = tensor.detach().as_subclass(torch.Tensor)
    return plain.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(stream: FileIO, data: memoryview, digest: Any) -> None:
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        digest.update(piece)
        while piece:  # one call of the system may write less
            piece = piece[stream.write(piece) :]
