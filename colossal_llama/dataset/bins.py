"""Divides the rows of a category into bins, and gives every shuffle its order."""

from __future__ import annotations

import hashlib
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


def bin_of_rows(sizes: np.ndarray, num_bins: int) -> np.ndarray:
    """Cuts a list of rows into ``num_bins`` stretches of near-equal tokens.

    Each holds its share of all tokens, give or take one row; where there are fewer rows than
    bins, some hold none.

    Args:
        sizes: tokens per row, int64 [rows].
        num_bins: how many stretches.

    Returns:
        The bin of every row, rising, int64 [rows].
    """
    import numpy as np

    total = max(1, int(sizes.sum()))
    middles = np.cumsum(sizes) - sizes / 2
    return np.minimum(middles * num_bins // total, num_bins - 1).astype(np.int64)
