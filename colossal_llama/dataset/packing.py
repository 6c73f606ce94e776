"""Lays documents out in rows. Nothing is dropped: every token is in exactly one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


# Share of padding that best fit leaves rather than cut a document; half a row may come on top.
MOST_PADDING = 0.0025


@dataclass(frozen=True)
class Rows:
    """Rows of stretches of documents.

    Row ``r`` holds the stretches ``offsets[r]`` to ``offsets[r + 1]``, in this order; a stretch
    is the tokens ``start`` to ``stop`` of ``document``. int64 [stretches] three times, and
    int64 [rows + 1].
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of ``values`` [stretches] over each row, int64 [rows]."""
        import numpy as np

        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def take(self, rows: np.ndarray) -> Rows:
        """The rows ``rows``, in that order."""
        import numpy as np

        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        first = np.repeat(self.offsets[:-1][rows] - offsets[:-1], counts)
        stretches = first + np.arange(offsets[-1])
        return Rows(self.document[stretches], self.start[stretches], self.stop[stretches], offsets)


def join(parts: list[Rows]) -> Rows:
    """The rows of several layouts, one after the other."""
    import numpy as np

    ends = np.cumsum([0] + [len(part.document) for part in parts])
    starts = [part.offsets[:-1] + end for part, end in zip(parts, ends[:-1], strict=True)]
    return Rows(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
        np.concatenate([*starts, ends[-1:]]),
    )


def best_fit(lengths: np.ndarray, max_length: int) -> Rows:
    """Best fit, with few documents cut.

    Where lengths fit each other so badly that more than ``MOST_PADDING`` is left, the emptiest
    rows are cut up to fill the others.
    """
    return _fill(best_fit_uncut(lengths, max_length), max_length)


def best_fit_uncut(lengths: np.ndarray, max_length: int) -> Rows:
    """Best-fit decreasing: no document that fits into a row is cut.

    Documents longer than a row are cut into full rows and a rest. Rests and shorter documents,
    longest first, go each to the row with the least room that suffices, or to a new one (Ding
    et al. 2024, "Fewer Truncations Improve Language Modeling", section 3). Within a row,
    documents lie in the order in which they were given.

    Args:
        lengths: tokens per document, int64 [documents].
        max_length: tokens in a row.
    """
    import numpy as np

    lengths = np.asarray(lengths, dtype=np.int64)
    document, start, stop = _pieces(lengths, max_length)
    sizes = stop - start
    full = np.flatnonzero(sizes == max_length)
    rest = np.flatnonzero(sizes < max_length)
    rest = rest[np.argsort(-sizes[rest], kind="stable")]
    row = np.empty(len(document), dtype=np.int64)
    row[full] = np.arange(len(full))
    row[rest] = _rows_with_least_room(sizes[rest].tolist(), max_length, len(full))
    return _rows(row, document, start, stop)


def _rows(row: np.ndarray, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Rows:
    """Rows from stretches that each know the number of theirs; documents in order within."""
    import numpy as np

    order = np.lexsort((start, document, row))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Rows(document[order], start[order], stop[order], offsets)


def _fill(rows: Rows, max_length: int) -> Rows:
    """Cuts up the emptiest rows into the room of the others, until little padding is left."""
    import numpy as np

    loads = rows.sums(rows.stop - rows.start)
    total = int(loads.sum())
    few = max(-(-total // max_length), int(total / (max_length * (1 - MOST_PADDING))))
    if few >= len(rows):
        return rows
    by_load = np.argsort(loads, kind="stable")
    kept, dissolved = by_load[len(rows) - few :], rows.take(by_load[: len(rows) - few])
    # Both streams are laid side by side: a stretch ends where a piece or the room of a row does.
    pieces = dissolved.stop - dissolved.start
    piece_ends = np.cumsum(pieces)
    room_ends = np.cumsum(max_length - loads[kept])
    ends = np.union1d(piece_ends, room_ends[room_ends < piece_ends[-1]])
    ends = ends[ends > 0]
    begins = np.concatenate([[0], ends[:-1]])
    piece = np.searchsorted(piece_ends, begins, side="right")
    first = dissolved.start[piece] - (piece_ends - pieces)[piece]
    others = rows.take(kept)
    host = np.repeat(np.arange(few), np.diff(others.offsets))
    return _rows(
        np.concatenate([host, np.searchsorted(room_ends, begins, side="right")]),
        np.concatenate([others.document, dissolved.document[piece]]),
        np.concatenate([others.start, first + begins]),
        np.concatenate([others.stop, first + ends]),
    )


def in_sequence(lengths: np.ndarray, max_length: int) -> Rows:
    """Lays documents end to end and cuts the stream into rows of ``max_length`` tokens.

    A document that crosses the end of a row continues in the next one; the last row is short.
    """
    import numpy as np

    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, max_length))
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(ends, begin, side="right")
    first = ends[document] - np.asarray(lengths, dtype=np.int64)[document]
    row_starts = np.flatnonzero(begin % max_length == 0)
    return Rows(
        document, begin - first, end - first, np.append(row_starts, len(begin)).astype(np.int64)
    )


def one_row_each(lengths: np.ndarray, max_length: int) -> Rows:
    """Gives every document a row of its own, and one over ``max_length`` as many as it fills."""
    import numpy as np

    document, start, stop = _pieces(np.asarray(lengths, dtype=np.int64), max_length)
    return Rows(document, start, stop, np.arange(len(document) + 1))


PACKINGS: dict[str, Callable[[np.ndarray, int], Rows]] = {
    "best_fit": best_fit,
    "best_fit_uncut": best_fit_uncut,
    "sequential": in_sequence,
    "none": one_row_each,
}


def _pieces(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into consecutive pieces of ``max_length``; the last of each may be shorter.

    Returns:
        document, start and stop, int64 [pieces] each, in the order of the documents.
    """
    import numpy as np

    counts = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * max_length
    return document, start, np.minimum(start + max_length, lengths[document])


def _rows_with_least_room(sizes: list[int], max_length: int, num_rows: int) -> list[int]:
    """The row of every piece, of which none fills a row and none is longer than the one before.

    There are ``num_rows`` full rows already.

    ``open_rows[room]`` are the rows with that much room left; bit ``room`` of ``rooms`` says
    that there is one, so that the least room that suffices is found by a shift.
    """
    open_rows: list[list[int]] = [[] for _ in range(max_length)]
    rooms = 0
    rows: list[int] = []
    for size in sizes:
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, num_rows
            num_rows += 1
        rows.append(row)
        if room > size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    return rows
