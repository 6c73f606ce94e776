"""Which documents are trained on, how often, and which are kept apart for validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from colossal_llama.dataset.bins import seeded_order
from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import numpy as np


_MOST_EPOCHS = 1000


def parse_mix(items: list[str]) -> dict[str, float]:
    """``["zh=0.6", "en=0.4"]`` as shares by category.

    Raises:
        ValueError: an item is not CATEGORY=SHARE, or the shares do not sum to 1.
    """
    shares: dict[str, float] = {}
    for item in items:
        name, separator, value = item.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not separator or not name or not 0 <= share <= 1:
            raise ValueError(f"{item!r} is not CATEGORY=SHARE with a share between 0 and 1")
        if name in shares:
            raise ValueError(f"{name} is named twice")
        shares[name] = share
    if shares and abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares sum to {sum(shares.values()):g}, not to 1")
    return shares


def check_mix(shares: Mapping[str, float], categories: list[str]) -> None:
    """Raises DataError if the categories of a mix are not those of the input."""
    if not shares or set(shares) == set(categories):
        return
    raise DataError(
        f"--mix names {', '.join(sorted(shares))}, the input has {', '.join(categories)}; "
        "name every category of the input, those to leave out with =0"
    )


def choose_validation(
    hashes: np.ndarray, categories: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Chooses documents for validation: ``fraction`` of every category, at least one of each.

    The choice is by text: equal texts are on the same side, in whatever categories they stand.
    A category keeps at least one text to train on.

    Args:
        hashes: of the documents' texts, uint64 [documents].
        categories: int [documents].
        fraction: of the documents of a category, 0 to 1; those that come less than a text short
            of it are taken.
        seed: of the choice.

    Returns:
        bool [documents].
    """
    import numpy as np

    chosen = [np.empty(0, dtype=np.uint64)]
    if fraction > 0:
        for category in np.unique(categories):
            texts, counts = np.unique(hashes[categories == category], return_counts=True)
            wanted = max(1, round(fraction * int(counts.sum())))
            order = seeded_order(len(texts), seed, "validation")
            # A text that alone is more than is wanted would be most of the validation part.
            order = order[counts[order] <= wanted]
            taken = int((np.cumsum(counts[order]) <= wanted).sum())
            chosen.append(texts[order[: min(taken, len(texts) - 1)]])
    return np.isin(hashes, np.concatenate(chosen))


def epochs_of(
    lengths: Mapping[str, np.ndarray], shares: Mapping[str, float], seed: int
) -> dict[str, list[np.ndarray]]:
    """How often, and in which order, the documents of every category are taken.

    Each epoch is a permutation of the category. Without shares there is one. With shares, the
    number of all tokens stays, and is divided by them: a category of which there is too little
    is taken again, as a whole as often as that fits and then in part; of one of which there is
    too much, a part is taken. No document comes twice before all have come once.

    Args:
        lengths: category -> tokens per document, int64 [documents].
        shares: category -> share of the tokens; empty takes everything once.
        seed: of the orders.

    Returns:
        category -> epochs, each the indices of its documents, int64.

    Raises:
        DataError: a category would be taken absurdly often.
    """
    total = sum(int(values.sum()) for values in lengths.values())
    found: dict[str, list[np.ndarray]] = {}
    for name, values in lengths.items():
        target = total * shares[name] if shares else values.sum()
        if target > _MOST_EPOCHS * values.sum():
            raise DataError(
                f"--mix: {name} has {int(values.sum()):,} tokens to train on, and would be taken "
                f"more than {_MOST_EPOCHS} times to be a share of {shares[name]:g}; give it less"
            )
        found[name] = []
        while target > 0 and values.sum() > 0:
            order = seeded_order(len(values), seed, "documents", name, len(found[name]))
            order = order[: _nearest_prefix(values[order], target)]
            if len(order):
                found[name].append(order)
            target -= values.sum()
    return found


def _nearest_prefix(lengths: np.ndarray, target: float) -> int:
    """How many of ``lengths`` from the start come nearest to ``target`` in sum."""
    import numpy as np

    sums = np.concatenate([[0], np.cumsum(lengths)])
    return int(np.abs(sums - target).argmin())
