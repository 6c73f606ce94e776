"""Writes a process's tensors of a checkpoint, at once or in the background, with checksums."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from colossal_llama import storage
from colossal_llama.training.tensor_file import checksum, save_file

__all__ = ["FileWriter", "HostCopies", "checksum"]


class HostCopies:
    """Copies of tensors in host memory, kept for the next save: new memory costs page faults.

    Belongs to one save at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
        """Copies ``tensors``, which are to be written to ``path``.

        Where a save before this one had a tensor of the same name, shape and type, for a file of
        the same name in a folder of the same name, its memory is used again.
        """
        return {name: self._copy(name, t.detach(), path) for name, t in tensors.items()}

    def _copy(self, name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
        key = (path.parent.name, path.name, name)
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[key] = kept
        return kept.copy_(tensor)


@dataclass
class FileWriter:
    """Takes tensors, writes them to safetensors files, and knows the files' checksums.

    An error does not leave ``write``, because other processes may be waiting for this one in
    the midst of a collective: it is kept in ``error``, with the file in ``failed``, and what
    follows is not written.

    Args:
        late: ``write`` only copies the tensors into host memory; a thread that ``start`` starts
            writes them.
        copies: what it copies into.
    """

    late: bool = False
    copies: HostCopies = field(default_factory=HostCopies)
    error: Exception | None = None
    failed: Path | None = None
    checksums: dict[Path, str] = field(default_factory=dict)
    _waiting: list[tuple[dict[str, torch.Tensor], Path]] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def write(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        """Writes ``tensors`` to ``path``; the file is on the disk after ``finish``."""
        if self.error is not None:
            return
        with self._error_kept(path):
            if self.late:
                self._waiting.append((self.copies.take(tensors, path), path))
            else:
                self._write({name: t.detach().cpu() for name, t in tensors.items()}, path)

    def start(self) -> None:
        """Begins to write what was taken late."""
        self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether everything is written, or an error has ended that."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Waits until everything is written."""
        if self._thread is not None:
            self._thread.join()

    def _write_all(self) -> None:
        while self._waiting and self.error is None:
            tensors, path = self._waiting.pop(0)
            with self._error_kept(path):
                self._write(tensors, path)
        self._waiting.clear()

    def _write(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        sum_ = save_file(tensors, path)
        storage.fsync_file(path)
        self.checksums[path] = sum_

    @contextmanager
    def _error_kept(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any: without this file the checkpoint is incomplete
            self.error, self.failed = error, path
