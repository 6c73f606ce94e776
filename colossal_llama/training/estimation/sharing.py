"""Weights, gradients and optimizer as each plugin keeps them, in bytes on one process.

Written after ColossalAI 0.5.0. A weight in half precision takes 2 bytes, its gradient 2, and its
fp32 master and the two moments of Adam 4 each: 16 in all (Rajbhandari et al. 2020, "ZeRO",
section 3.1). What differs is which of them a process keeps whole, and what an update adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from colossal_llama.training.estimation.rank_model import Weight

FP32, FP64 = 4, 8
# Two moments (Kingma & Ba 2014, algorithm 1).
MOMENTS = 2 * FP32
# Gradients are reduced, and weights gathered, in buckets of this many elements
# (low_level_zero_plugin.py, reduce_bucket_size_in_m; hybrid_parallel_plugin.py,
# zero_bucket_size_in_m).
BUCKET = 12 * 1024**2


@dataclass(frozen=True)
class Held:
    """Gradients at a moment of the backward pass: kept ones, and copies for a short time."""

    kept: int
    passing: int = 0


class Sharing(Protocol):
    """What a plugin does with the weights of one process."""

    def working(self) -> int:
        """Bytes of working weights between steps."""

    def gathered(self) -> int:
        """Bytes of others' weights that are there while the model computes."""

    def optimizer(self) -> int:
        """Bytes of masters and moments on the device, and of buffers that live as long."""

    def host(self) -> int:
        """Bytes of host memory while training."""

    def backward(self, accumulated: bool) -> Iterator[tuple[Weight | None, Held]]:
        """Gradients before the pass, then as the weights get theirs, the last weight first.

        None stands for what is before, and after, all weights.

        Args:
            accumulated: whether gradients of earlier micro-batches are there.
        """

    def update(self) -> list[Held]:
        """Gradients in the stages of the update."""

    def stored(self) -> int:
        """Bytes of optimizer state that all processes with these weights save together."""


@dataclass(frozen=True)
class Replicated:
    """Every data parallel process keeps everything (MixedPrecisionOptimizer, naive_amp).

    Args:
        half: bytes of the working dtype; 4 has no masters of its own.
        ddp: whether torch's DistributedDataParallel holds a copy of all gradients to reduce.
    """

    weights: Sequence[Weight]
    half: int
    ddp: bool

    def working(self) -> int:
        return self.half * numel(self.weights)

    def gathered(self) -> int:
        return 0

    def optimizer(self) -> int:
        masters = FP32 if self.half < FP32 else 0
        # gradient_as_bucket_view is off, so the buckets are a second set of gradients.
        buckets = self.half if self.ddp else 0
        return (masters + MOMENTS + buckets) * numel(trained(self.weights))

    def host(self) -> int:
        return 0

    def backward(self, accumulated: bool) -> Iterator[tuple[Weight | None, Held]]:
        every = self.half * numel(trained(self.weights))
        done = 0
        yield None, Held(every if accumulated else 0)
        for weight in reversed(trained(self.weights)):
            done += self.half * weight.numel
            yield weight, Held(every if accumulated else done)
        yield None, Held(every)

    def update(self) -> list[Held]:
        own = trained(self.weights)
        # fp32 copies replace the gradients; the norm takes one at a time in fp64.
        return [Held(FP32 * numel(own), FP64 * largest(own))]

    def stored(self) -> int:
        return (FP32 + MOMENTS) * numel(trained(self.weights))


@dataclass(frozen=True)
class Zero:
    """ZeRO stages 1 and 2 over ``ranks`` processes (zero/low_level/low_level_optim.py).

    Args:
        half: bytes of the working dtype; masters are copies also if it is fp32.
        stage: 1 keeps gradients whole, 2 only the process's share.
        offload: whether masters and moments are in host memory.
        hooked: whether gradients are reduced while the backward pass runs, or after it.
        late: whether they are reduced after all micro-batches only, as in a pipeline.
        gloo: whether collectives make copies of their own, as on a CPU.
    """

    weights: Sequence[Weight]
    half: int
    ranks: int
    stage: int
    offload: bool
    hooked: bool
    late: bool
    gloo: bool

    def working(self) -> int:
        return self.half * numel(self.weights)

    def gathered(self) -> int:
        return 0

    def optimizer(self) -> int:
        return 0 if self.offload else (FP32 + MOMENTS) * self._share()

    def host(self) -> int:
        # Gradients come to the masters as fp32.
        return (FP32 + MOMENTS + FP32) * self._share() if self.offload else 0

    def backward(self, accumulated: bool) -> Iterator[tuple[Weight | None, Held]]:
        own = trained(self.weights)
        if self.late:
            yield from self._backward_late(own, accumulated)
            return
        kept = self._kept(numel(own)) if accumulated else 0
        waiting: list[Weight] = []
        yield None, Held(kept)
        for weight in reversed(own):
            if self.hooked and waiting and not _fits(weight, waiting):
                yield weight, self._reduction(kept, waiting, 0)
                kept += 0 if accumulated else self._kept(numel(waiting))
                waiting = []
            waiting.append(weight)
            yield weight, Held(kept + self.half * numel(waiting))
        for bucket, rest in _buckets(waiting):
            yield None, self._reduction(kept, bucket, self.half * rest)
            kept += 0 if accumulated else self._kept(numel(bucket))

    def _backward_late(
        self, own: list[Weight], accumulated: bool
    ) -> Iterator[tuple[Weight | None, Held]]:
        yield from Replicated(own, self.half, ddp=False).backward(accumulated)
        kept = 0
        for bucket, rest in _buckets(own):
            yield None, self._reduction(kept, bucket, self.half * rest)
            kept += self._kept(numel(bucket))

    def update(self) -> list[Held]:
        own, share = trained(self.weights), self._share()
        kept = self._kept(numel(own))
        converted = 0 if self.offload or self.half == FP32 else FP32 * share
        norm = FP64 * -(-largest(own) // self.ranks)
        # Then the new weights are gathered: shares, joined, from all ranks, and one is unpacked.
        bucket = min(BUCKET, share)
        gather = self.half * (bucket * (2 + self.ranks) + largest(own))
        if self.gloo:
            gather += self.half * bucket * self.ranks
        return [Held(kept + converted, norm), Held(kept, gather)]

    def stored(self) -> int:
        return (FP32 + MOMENTS) * self._share() * self.ranks

    def _reduction(self, kept: int, bucket: Sequence[Weight], waiting: int) -> Held:
        """A bucket is joined, and its sum over ranks received."""
        size = self.half * numel(bucket)
        received = size // self.ranks if self.stage == 2 else 0
        copies = size if self.gloo and self.stage == 2 else 0
        return Held(kept + waiting + size, size + received + copies)

    def _kept(self, elements: int) -> int:
        return self.half * (-(-elements // self.ranks) if self.stage == 2 else elements)

    def _share(self) -> int:
        return sum(-(-weight.numel // self.ranks) for weight in trained(self.weights))


def trained(weights: Iterable[Weight]) -> list[Weight]:
    """Those with a gradient."""
    return [weight for weight in weights if weight.trained]


def numel(weights: Iterable[Weight]) -> int:
    """The elements of all."""
    return sum(weight.numel for weight in weights)


def largest(weights: Iterable[Weight]) -> int:
    """The elements of the largest; 0 if there is none."""
    return max((weight.numel for weight in weights), default=0)


def _fits(weight: Weight, bucket: Sequence[Weight]) -> bool:
    """Whether a bucket takes one more: it has one group of parameters, and a size."""
    return bucket[-1].matrix == weight.matrix and numel([*bucket, weight]) <= BUCKET


def _buckets(weights: Sequence[Weight]) -> Iterator[tuple[list[Weight], int]]:
    """Fills buckets in turn; with each the number of elements that still wait."""
    bucket: list[Weight] = []
    for index, weight in enumerate(weights):
        if bucket and not _fits(weight, bucket):
            yield bucket, numel(weights[index:])
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket, 0
