"""Lays documents out in rows. Nothing is dropped: every token is in exactly one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int


Row = list[Segment]


def pack_in_sequence(documents: Iterable[tuple[int, int]], max_length: int) -> Iterator[Row]:
    """Concatenates documents and cuts the stream into rows of ``max_length`` tokens.

    A document that crosses the end of a row continues in the next one; the last row is short.

    Args:
        documents: (number, length in tokens) in the order in which they are laid out.
        max_length: tokens in a row.
    """
    row: Row = []
    room = max_length
    for document, length in documents:
        start = 0
        while start < length:
            stop = min(length, start + room)
            row.append(Segment(document, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield row
                row, room = [], max_length
    if row:
        yield row


def one_row_each(documents: Iterable[tuple[int, int]]) -> Iterator[Row]:
    """A row of its own for every document, as conversations have it."""
    for document, length in documents:
        yield [Segment(document, 0, length)]
