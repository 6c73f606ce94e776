"""The order of samples of a run: a pure function of the data's sizes, the seed and the flags.

A run remembers one number, how many samples it has consumed over all its processes. Whatever
comes next is computed from it, in time and memory that depend on the batch alone: there is no
list of a billion shuffled row numbers to make, keep or skip through after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BUCKETS = "buckets"
SHUFFLED = "shuffled"
ORDERS = (BUCKETS, SHUFFLED)
BLOCK = 1000  # samples in which every dataset has its share

# Weights are counted in billionths, so that decimal ones are exact in whole numbers.
_UNITS = 10**9
# With six, the orders of a handful of rows are measurably not equally likely.
_ROUNDS = 10
# Of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class GlobalSampler:
    """One endless stream of rows, cut into global batches.

    Rows are numbered through: dataset after dataset, and part after part in each. Without
    weights all parts are one stream of epochs, and an epoch has every row once. ``buckets``
    takes the parts in the order given and shuffles the rows inside each, ``shuffled`` shuffles
    all rows together; both anew for each epoch. The last batch of the last epoch is full: it
    runs on into the epoch that would follow.

    With weights every dataset is such a stream of its own, at its own pace, and ``Mixture`` says
    whose turn it is.

    Args:
        datasets: rows of every part, for each dataset.
        seed: of every shuffle.
        batch_size: samples of a batch, over all processes.
        order: one of ``ORDERS``.
        weights: share of the samples for each dataset, positive; all of these have rows then.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[int]],
        seed: int,
        batch_size: int,
        order: str = BUCKETS,
        weights: Sequence[float] | None = None,
    ) -> None:
        assert batch_size > 0
        assert order in ORDERS
        self.batch_size = batch_size
        self._mixture = None if weights is None else Mixture(weights, seed)
        if weights is None:
            datasets = [[rows for parts in datasets for rows in parts]]
        else:
            assert len(weights) == len(datasets)
        self._streams = [
            Stream(parts, order, seed, "dataset", index) for index, parts in enumerate(datasets)
        ]
        self.num_rows = sum(stream.num_rows for stream in self._streams)

    def batch(self, consumed: int) -> list[int]:
        """Row numbers of the global batch that follows the first ``consumed`` samples."""
        import numpy as np

        if self._mixture is None:
            (stream,) = self._streams
            return stream.rows(np.arange(consumed, consumed + self.batch_size)).tolist()
        turns, numbers = self._mixture.turns(consumed, self.batch_size)
        found = np.empty(self.batch_size, dtype=np.int64)
        first = 0
        for index, stream in enumerate(self._streams):
            own = turns == index
            found[own] = first + stream.rows(numbers[own])
            first += stream.num_rows
        return found.tolist()


class Stream:
    """Some parts, epoch after epoch: which row a sample of this endless order is."""

    def __init__(self, rows_per_part: Sequence[int], order: str, *seed: int | str) -> None:
        import numpy as np

        sizes = [sum(rows_per_part)] if order == SHUFFLED else list(rows_per_part)
        self.num_rows = sum(sizes)
        assert self.num_rows > 0
        self._sizes = np.array(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._seed = seed

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows at ``positions`` of the order, counted from its beginning; int64 [n] each."""
        import numpy as np

        epochs, offsets = np.divmod(positions, self.num_rows)
        parts = np.searchsorted(self._ends, offsets, side="right")
        sizes = self._sizes[parts]
        first = self._ends[parts] - sizes
        return first + permuted(offsets - first, sizes, self._keys(epochs, parts))

    def _keys(self, epochs: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """The key of each pair's shuffle, uint64 [n]; neighbours mostly share one."""
        import numpy as np

        pairs = list(zip(epochs.tolist(), parts.tolist(), strict=True))
        keys = {
            (epoch, part): _key(*self._seed, "epoch", epoch, "part", part)
            for epoch, part in dict.fromkeys(pairs)
        }
        return np.array([keys[pair] for pair in pairs], dtype=np.uint64)


class Mixture:
    """Whose turn it is: blocks of ``BLOCK`` samples, in which every dataset has its share.

    A share that is no whole number is rounded so that the rounding does not add up: after any
    number of blocks a dataset has had its weight of all samples, up to the number of datasets.
    The turns of a block are shuffled.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        self._units = [max(1, round(weight / total * _UNITS)) for weight in weights]
        self._seed = seed

    def taken(self, samples: int) -> list[int]:
        """How many of the first ``samples`` are of each dataset, at the end of a block.

        Each dataset takes its share of what those before it left, rounded down. Thus the counts
        add up to ``samples``, and none falls when ``samples`` grows: where what is left grows by
        0 or 1 with a sample, so do the share of it and the rest.
        """
        counts = []
        units = sum(self._units)
        for own in self._units:
            counts.append(samples * own // units)
            samples -= counts[-1]
            units -= own
        return counts

    def turns(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For the samples ``first`` and following, int64 [count] each:

        the dataset, and how many samples of this dataset came before.
        """
        import numpy as np

        start = first // BLOCK
        blocks = [self._block(block) for block in range(start, -(-(first + count) // BLOCK))]
        wanted = slice(first - start * BLOCK, first - start * BLOCK + count)
        turns, numbers = (np.concatenate(arrays)[wanted] for arrays in zip(*blocks, strict=True))
        return turns, numbers

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The turns and numbers of all samples of a block, int64 [BLOCK] each."""
        import numpy as np

        before, after = (self.taken(number * BLOCK) for number in (block, block + 1))
        sizes = np.full(BLOCK, BLOCK)
        key = np.full(BLOCK, _key(self._seed, "block", block), dtype=np.uint64)
        ends = np.cumsum(np.subtract(after, before))
        turns = np.searchsorted(ends, permuted(np.arange(BLOCK), sizes, key), side="right")
        numbers = np.empty(BLOCK, dtype=np.int64)
        for dataset, (low, high) in enumerate(zip(before, after, strict=True)):
            numbers[turns == dataset] = np.arange(low, high)
        return turns, numbers


def permuted(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(size)`` takes ``index``, element by element.

    A generalised Feistel cipher on pairs of numbers below about sqrt(size), with cycle walking: a
    result that is not below ``size`` is enciphered again, which seldom happens, for there are at
    most 4 sqrt(size) + 4 of them. Source: Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains", methods 2 and 3. It has to look random, not to withstand anyone.

    Args:
        index: int64 [n], 0 <= index < size.
        size: int64 [n], below 2**52: up to there a float's square root is exact enough.
        key: uint64 [n]; names the permutation.

    Returns:
        int64 [n].
    """
    import numpy as np

    sides = np.ceil(np.sqrt(size)).astype(np.uint64)
    sides += sides % np.uint64(2)  # with an odd side all permutations would be even ones
    limits = size.astype(np.uint64)
    found = index.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        enciphered = _encipher(found[walking], sides[walking], key[walking])
        found[walking] = enciphered
        walking = walking[enciphered >= limits[walking]]
    return found.astype(np.int64)


def _encipher(value: np.ndarray, side: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A permutation of ``range(side**2)``; uint64 [n] each."""
    import numpy as np

    left, right = np.divmod(value, side)
    for number in range(1, _ROUNDS + 1):
        round_key = _mixed(key + np.uint64(number * _GOLDEN_GAMMA % 2**64))
        left, right = right, (left + _mixed(right ^ round_key) % side) % side
    return left * side + right


def _mixed(value: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function: every bit of the result hangs on all bits; uint64 [n]."""
    import numpy as np

    for shift, factor in _MIX:
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))


def _key(*seed: int | str) -> int:
    """64 bits that depend on ``seed`` alone, made as ``bins.seeded_order`` makes its own."""
    digest = hashlib.sha256(repr(seed).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big")
