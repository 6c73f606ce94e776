"""Whether a piece is produced in running text, between neighbours that leave it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Tried in this order. Whatever stands beside a piece can be swallowed by a longer one ("，我" is
# a piece of some vocabularies), so a piece counts as produced if one of these leaves it alone.
# The last are of two kinds, because "()", "xx" and "00" may be pieces themselves.
NEIGHBOURS = (
    ("，", "。"),
    ("\n", "\n"),
    ("(", ")"),
    ("x", "x"),
    ("文", "文"),
    ("0", "0"),
    ("0", "x"),
)

Encode = Callable[[list[str]], Iterable[list[int]]]


@dataclass(frozen=True)
class Production:
    """Which pieces a tokenizer produces."""

    between: dict[str, int]  # neighbours, like "，X。" -> pieces found there and nowhere before
    missing: list[str]  # pieces that it does not produce


def produced_between(ids: Mapping[str, int], encode: Encode) -> tuple[dict[str, int], list[str]]:
    """Looks for each text's own id between neighbours.

    Args:
        ids: text of a piece -> its id.
        encode: texts -> their ids, as a user gets them, without bos and eos.

    Returns:
        Neighbours, spelled like "，X。" -> the number of texts that became exactly their one id
        between them and between none before; and the texts that did so between no neighbours.
    """
    left, counts = list(ids), dict[str, int]()
    for before, after in NEIGHBOURS:
        (start, both) = encode([before, before + after])
        if both[: len(start)] != start or not left:  # the neighbours have joined each other
            continue
        end = both[len(start) :]
        found = encode([before + text + after for text in left])
        rest = [t for t, got in zip(left, found, strict=True) if got != [*start, ids[t], *end]]
        counts[f"{before}X{after}"] = len(left) - len(rest)
        left = rest
    return counts, left
