"""Whether a piece is produced in running text, between neighbours that leave it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# Tried in this order. Whatever stands beside a piece can be swallowed by a longer one ("，我" is
# a piece of some vocabularies), so a piece counts as produced if one of these leaves it alone.
NEIGHBOURS = (("，", "。"), ("\n", "\n"), ("(", ")"), ("x", "x"), ("文", "文"), ("0", "0"))

Encode = Callable[[list[str]], Iterable[list[int]]]


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
        # A neighbour has the same ids with and without the piece, or it is not neutral.
        (start, both) = encode([before, before + after])
        end = both[len(start) :]
        if both[: len(start)] != start or not left:
            continue
        texts = [before + text + after for text in left]
        found = zip(left, encode(texts), strict=True)
        rest = [text for text, got in found if got != [*start, ids[text], *end]]
        counts[f"{before}X{after}"] = len(left) - len(rest)
        left = rest
    return counts, left
