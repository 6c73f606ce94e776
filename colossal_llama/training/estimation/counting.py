"""Counts the bytes of the tensors that are alive, for tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Mark:
    """Bytes alive at a moment, and the most since the mark before it."""

    live: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Inside it, every operation's new storages count until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out ``tensors`` and their views; they have to outlive the counting."""
        self._sizes.update({tensor.untyped_storage()._cdata: 0 for tensor in tensors})

    def drop_gradient(self, parameter: torch.Tensor) -> None:
        """For ``register_post_accumulate_grad_hook``: a gradient counts until it is complete."""
        assert parameter.grad is not None
        parameter.grad = None

    def mark(self) -> Mark:
        """What is alive now, and the most since the last call."""
        found = Mark(self.live, self.peak)
        self.peak = self.live
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
