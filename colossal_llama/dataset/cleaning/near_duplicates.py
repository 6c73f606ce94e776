"""Documents that are equal, or nearly so, to one before.

Broder 1997, "On the resemblance of documents": two documents are as similar as the Jaccard
index s of their sets of n-grams, and a MinHash of both is equal with probability s. With the
settings of FineWeb (Penedo et al. 2024, "The FineWeb Datasets", section 3.4; 5-grams, 112 hashes
in 14 bands of 8), documents are near-duplicates if all hashes of a band are equal, which happens
with probability 1 - (1 - s^8)^14:

    s        0.50  0.60  0.70  0.75  0.80  0.85  0.90
    found    0.05  0.21  0.56  0.77  0.92  0.99  1.00

Half of the pairs are found at s = 0.685. Of documents that are connected by such pairs, directly
or through others, the first is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from colossal_llama.dataset.cleaning.units import TextUnits, mix, ngrams
from colossal_llama.dataset.records import text_hash
from colossal_llama.errors import DataError

NGRAM = 5  # units
BANDS = 14
HASHES_IN_BAND = 8

# The hashes of one run are compared with each other only; any fixed seed will do.
_SEED = 0


def band_hashes(text: str) -> np.ndarray:
    """A hash of each band of the MinHash of ``text``: uint64 [BANDS].

    A text of fewer than NGRAM units is like no text but one that is equal to it.

    Raises:
        DataError: rensa is not installed.
    """
    sketch = require_rensa()
    grams = ngrams(TextUnits(text).hashes, NGRAM)
    if not len(grams):
        grams = np.array([text_hash(text)], dtype=np.uint64)
    digest = sketch(grams, [0, len(grams)], BANDS * HASHES_IN_BAND, _SEED).to_rows()
    values = np.array(digest, dtype=np.uint64).ravel()
    return mix(ngrams(values, HASHES_IN_BAND)[::HASHES_IN_BAND])


def require_rensa() -> Any:
    """rensa's MinHash of sets of 64-bit hashes.

    Raises:
        DataError: rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise DataError(
            "near-duplicates are found with rensa, which is not installed: pip install rensa"
        ) from None
    return RMinHash.digest_matrix_from_flat_token_hashes


def first_of_each(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Which documents to keep: those with no near-duplicate before them: bool [documents].

    Memory: 8 bytes a document, and 24 more, its own column included, while a band is read.

    Args:
        bands: for each band, a hash of every document: uint64 [documents].
    """
    parent: np.ndarray | None = None
    for column in bands:
        if parent is None:
            parent = np.arange(len(column))
        members, firsts = _same_as_first(column)
        _connect(parent, members, firsts)
    if parent is None:
        return np.zeros(0, dtype=np.bool_)
    # A parent is never after its child: only the first document of a set is its own.
    return parent == np.arange(len(parent))


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """Which of ``hashes`` occur for the first time: bool [documents].

    Args:
        hashes: ``text_hash`` of every document: uint64 [documents].
    """
    keep = np.ones(len(hashes), dtype=np.bool_)
    keep[_same_as_first(hashes)[0]] = False
    return keep


def _same_as_first(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Places of values that occurred before, the first places of these): int64 [repeats]."""
    order = np.argsort(column, kind="stable")
    again = _equal_to_previous(column, order)
    places = np.flatnonzero(again)
    # From a repeat back to the first of its run: the last place before it that is no repeat.
    runs = np.maximum.accumulate(np.where(again[places - 1], 0, places - 1))
    return order[places], order[runs]


def _equal_to_previous(column: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether, in sorted order, a value is equal to the one before it: bool [documents]."""
    ordered = column[order]
    again = np.zeros(len(ordered), dtype=np.bool_)
    again[1:] = ordered[1:] == ordered[:-1]
    return again


def _connect(parent: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Joins the sets of ``ones`` and ``others``, pair by pair, in a union-find forest.

    In each round every root that has a pair with a smaller one is hung below one of these; what
    was a pair of documents goes on as a pair of roots, until both are the same.
    """
    while len(ones):
        ones, others = _roots(parent, ones), _roots(parent, others)
        apart = ones != others
        ones, others = ones[apart], others[apart]
        parent[np.maximum(ones, others)] = np.minimum(ones, others)


def _roots(parent: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The roots of the documents; shortens the paths that lead to them."""
    roots = parent[documents]
    while True:
        above = parent[roots]
        if np.array_equal(above, roots):
            break
        roots = above
    parent[documents] = roots
    return roots
