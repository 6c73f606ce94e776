"""Gemini: weights packed into chunks of one size, each divided among all processes.

Written after ColossalAI 0.5.0, zero/gemini. A model below 32 Mi parameters is one chunk that every
process keeps whole. A larger one is packed in order into chunks of the size, within a range, that
leaves the least space unused; a weight larger than that has a chunk of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from colossal_llama.training.estimation.rank_model import Weight
from colossal_llama.training.estimation.sharing import (
    FP32,
    MOMENTS,
    Held,
    largest,
    numel,
    trained,
)

# GeminiPlugin's defaults: min_chunk_size_m, search_range_m, and the step of the search.
SMALLEST_CHUNK = 32 * 1024**2
SEARCH_RANGE = 32 * 1024**2
SEARCH_STEP = 1024


@dataclass(frozen=True)
class Chunk:
    """Elements that it has room for, and whether every process keeps all of it."""

    size: int
    whole: bool


@dataclass(frozen=True)
class Gemini:
    """ZeRO stage 3 in chunks over ``ranks`` processes.

    Gradients take the place of the weights in a chunk, which come back from the fp32 chunk after
    the update; with accumulation they have chunks of their own.

    Args:
        accumulates: whether there is more than one micro-batch a step.
        offload: whether divided chunks are in host memory when not in use (``gemini_auto``).
        cuda: Adam's update works on all weights at once there, on a CPU on one after the other.
    """

    weights: Sequence[Weight]
    ranks: int
    accumulates: bool
    offload: bool
    cuda: bool

    def working(self) -> int:
        frozen = numel(self.weights) - numel(trained(self.weights))
        # Gemini leaves frozen weights alone: every process keeps them.
        return 2 * (frozen + self._elements(on_device=True))

    def gathered(self) -> int:
        return self._gathered(1)

    def optimizer(self) -> int:
        if self.offload and not self.whole:
            return 0
        # Moments are of the weights, without the unused end of a chunk.
        moments = MOMENTS * self._of_each(numel(trained(self.weights)))
        return FP32 * self._elements(on_device=True) + moments

    def host(self) -> int:
        if self.whole:
            return 0
        copies = 2 + FP32 + (2 if self.accumulates else 0)
        if self.offload:
            return (copies + MOMENTS) * self._elements(on_device=False)
        # Each divided chunk has a pinned copy of the share, used or not (pin_memory).
        return copies * self._elements(on_device=False) if self.cuda else 0

    def backward(self, accumulated: bool) -> Iterator[tuple[Weight | None, Held]]:
        kept, biggest = self._gradients(), max(chunk.size for chunk in self.chunks)
        share = 2 * self._of_each(biggest)
        # One chunk is in use while another waits for the last of its gradients, and is reduced to
        # a new share. With accumulation gradients have a gathered chunk of their own, to which the
        # sum so far is added.
        last = 0 if self.whole else share
        if self.accumulates:
            last += self._gathered(1)
        passing = last + self._gathered(2) - self._gathered(1) + (share if accumulated else 0)
        yield None, Held(kept)
        for weight in reversed(trained(self.weights)):
            yield weight, Held(kept, passing)
        yield None, Held(kept, last)
        # The norm is taken of a chunk in fp32, after what was gathered is gone.
        norm = FP32 * self._of_each(biggest)
        yield None, Held(kept, max(0, norm - self.gathered()))

    def update(self) -> list[Held]:
        if self.offload and not self.whole:
            return [Held(0)]
        if self.cuda:
            # torch's fused Adam wants gradients of the masters' dtype: converted, and divided.
            passing = 2 * FP32 * self._of_each(numel(trained(self.weights)))
        else:
            # A gradient twice, and the denominator (hybrid_adam.py, ``torch_adam_update``).
            biggest = max(chunk.size for chunk in self.chunks)
            passing = 3 * FP32 * min(largest(trained(self.weights)), self._of_each(biggest))
        return [Held(self._gradients(), passing)]

    def stored(self) -> int:
        times = self.ranks if self.whole else 1
        return (FP32 + MOMENTS) * numel(trained(self.weights)) * times

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks of the working weights; those of the masters are alike."""
        return pack(self.weights, self.ranks)

    @property
    def whole(self) -> bool:
        """Whether every process keeps all chunks: they are all divided, or there is one."""
        return self.chunks[0].whole

    def _gathered(self, number: int) -> int:
        """Bytes that gathering this many chunks adds to what is there of them."""
        divided = sorted((chunk.size for chunk in self.chunks if not chunk.whole), reverse=True)
        there = 0 if self.offload else 1
        return 2 * sum(size - there * self._of_each(size) for size in divided[:number])

    def _gradients(self) -> int:
        return 2 * self._elements(on_device=True) if self.accumulates else 0

    def _elements(self, *, on_device: bool) -> int:
        """Elements of a process's parts of all chunks, there or in host memory."""
        if self.offload and not self.whole and on_device:
            return 0
        return sum(self._of_each(chunk.size) for chunk in self.chunks)

    def _of_each(self, elements: int) -> int:
        return elements if self.whole else -(-elements // self.ranks)


def pack(weights: Sequence[Weight], ranks: int) -> list[Chunk]:
    """The chunks of the trained weights (zero/gemini/chunk/manager.py, ``register_tensor``)."""
    sizes = [weight.numel for weight in weights]
    # The search also counts frozen weights, which then get no place in a chunk.
    if sum(sizes) < SMALLEST_CHUNK:
        return [Chunk(sum(sizes), whole=True)]
    size = best_size(sizes)
    size += -size % ranks
    chunks: list[Chunk] = []
    room = 0
    for weight in trained(weights):
        if weight.numel > room:
            own = max(size, weight.numel + -weight.numel % ranks)
            chunks.append(Chunk(own, whole=False))
            room = own
        room -= weight.numel
    return chunks


def best_size(sizes: Sequence[int]) -> int:
    """The size that leaves the least unused (search_utils.py, ``search_chunk_configuration``).

    Weights more than three standard deviations above the mean do not count.
    """
    limit = np.mean(sizes) + 3 * np.std(sizes)
    usual = [size for size in sizes if size <= limit]
    smallest = max(SMALLEST_CHUNK, *usual)
    smallest += -smallest % SEARCH_STEP
    candidates = np.arange(smallest, smallest + SEARCH_RANGE + 1, SEARCH_STEP)
    unused, room = np.zeros_like(candidates), np.zeros_like(candidates)
    for size in usual:
        full = room < size
        unused += np.where(full, room, 0)
        room = np.where(full, candidates, room) - size
    return int(candidates[np.argmin(unused + room)])  # the first of equals, as there
