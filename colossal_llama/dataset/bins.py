"""Divides the documents of a category into bins, and gives every shuffle its order."""

from __future__ import annotations

import hashlib
import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def seeded_order(count: int, *seed: int | str) -> np.ndarray:
    """A permutation of ``range(count)``, int64 [count], that depends on ``seed`` alone.

    It sorts raw 64-bit words of PCG64: NumPy promises these to stay the same from release to
    release, which it does not promise of ``Generator.permutation`` (NEP 19).
    """
    import numpy as np

    digest = hashlib.sha256(repr(seed).encode("utf-8")).digest()
    words = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(count)
    return np.argsort(words, kind="stable")


def divide(
    lengths: np.ndarray, categories: np.ndarray, names: list[str], num_bins: int, seed: int
) -> list[list[np.ndarray]]:
    """Divides every category into ``num_bins`` bins of near-equal tokens.

    Each category is shuffled; then every document goes to the bin of its category that holds
    the fewest tokens so far, so that two bins of a category never differ by more than its
    longest document. A tie goes to the bucket that the categories before have filled least:
    a handful of documents ends up in as many buckets as possible.

    Args:
        lengths: tokens per document, [documents].
        categories: index into ``names`` per document, [documents].
        names: the categories; each is shuffled by its name, whatever other categories exist.
        num_bins: how many bins (and buckets).
        seed: the shuffle.

    Returns:
        ``bins[bucket][category]``: document numbers, int64.
    """
    import numpy as np

    buckets: list[list[np.ndarray]] = [[] for _ in range(num_bins)]
    filled = [0] * num_bins
    for index, name in enumerate(names):
        documents = np.flatnonzero(categories == index)
        documents = documents[seeded_order(len(documents), seed, "documents", name)]
        heap = [(0, filled[bucket], bucket) for bucket in range(num_bins)]
        heapq.heapify(heap)
        members: list[list[int]] = [[] for _ in range(num_bins)]
        for document, length in zip(documents.tolist(), lengths[documents].tolist(), strict=True):
            tokens, before, bucket = heap[0]
            heapq.heapreplace(heap, (tokens + length, before, bucket))
            members[bucket].append(document)
        for tokens, _, bucket in heap:
            filled[bucket] += tokens
        for bucket, chosen in enumerate(members):
            buckets[bucket].append(np.array(chosen, dtype=np.int64))
    return buckets
