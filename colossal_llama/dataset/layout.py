"""From the documents of the input to the rows of every part: a plan, made before rows are written.

It is a pure function of the documents' lengths, categories and hashes, so that every machine that
shares the work comes to the same plan.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.dataset.bins import bin_of_rows, seeded_order
from colossal_llama.dataset.manifest import VALIDATION_PART, CategoryCount
from colossal_llama.dataset.packing import PACKINGS, Rows, join
from colossal_llama.dataset.selection import choose_validation, epochs_of

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Documents:
    """The accepted documents of the input, in its order.

    ``names`` are the categories, sorted. int64 [documents]: ``lengths`` in tokens, ``loss_start``
    and ``loss_tokens`` (see ``DOCUMENT_FIELDS``), ``categories``, the ``chunks`` they are in and
    where their tokens start there (``offsets``); ``hashes`` uint64.
    """

    names: list[str]
    lengths: np.ndarray
    loss_start: np.ndarray
    loss_tokens: np.ndarray
    categories: np.ndarray
    hashes: np.ndarray
    chunks: np.ndarray
    offsets: np.ndarray


@dataclass
class LayoutOptions:
    """On what the plan depends beside the documents."""

    packing: str
    max_length: int
    num_bins: int
    validation_fraction: float
    shares: dict[str, float]
    seed: int


@dataclass
class PartPlan:
    """The rows of a part: where each stretch's tokens are, int64 [stretches] each.

    Row ``r`` has the stretches ``offsets[r]`` to ``offsets[r + 1]`` and the category
    ``names[categories[r]]``.
    """

    name: str
    names: list[str]
    chunks: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    categories: np.ndarray


@dataclass
class Plan:
    """All parts, the validation part (if any) last, and the sums over every category."""

    parts: list[PartPlan]
    categories: dict[str, CategoryCount]


def plan_parts(documents: Documents, options: LayoutOptions) -> Plan:
    """Selects, packs, divides into bins, and puts bin k of every category into part k.

    Each category is packed as a whole and its rows, not its documents, are divided: so only
    its very last row has to be short, whatever the number of bins.
    """
    import numpy as np

    held_out = choose_validation(
        documents.hashes, documents.categories, options.validation_fraction, options.seed
    )
    counts = {name: CategoryCount() for name in documents.names}
    members = {
        name: np.flatnonzero((documents.categories == code) & ~held_out)
        for code, name in enumerate(documents.names)
    }
    lengths = {name: documents.lengths[numbers] for name, numbers in members.items()}
    bins: list[list[Rows]] = [[] for _ in range(options.num_bins)]
    for name, epochs in epochs_of(lengths, options.shares, options.seed).items():
        count = counts[name]
        packed = [
            _pack(documents, members[name][order], options, count, name, epoch)
            for epoch, order in enumerate(epochs)
        ]
        taken = sum(int(lengths[name][order].sum()) for order in epochs)
        count.training_tokens = taken
        count.epochs = round(taken / max(1, int(lengths[name].sum())), 6)
        rows = join([*packed, _no_rows()])
        which = bin_of_rows(rows.sums(rows.stop - rows.start), options.num_bins)
        for number, content in enumerate(bins):
            content.append(rows.take(np.flatnonzero(which == number)))
    parts = [
        _part(documents, f"part-{number:05d}", rows, (options.seed, "rows", number))
        for number, rows in enumerate(bins)
    ]
    if options.validation_fraction > 0:
        parts.append(_validation_part(documents, np.flatnonzero(held_out), options, counts))
    _count_documents(documents, counts)
    return Plan(parts, counts)


def _pack(
    documents: Documents,
    order: np.ndarray,
    options: LayoutOptions,
    count: CategoryCount,
    name: str,
    epoch: int,
) -> Rows:
    """The rows of one epoch of a category, shuffled; adds to ``count``."""
    rows = PACKINGS[options.packing](documents.lengths[order], options.max_length)
    rows = dataclasses.replace(rows, document=order[rows.document])
    rows, loss_tokens, without_loss = _with_loss(documents, rows)
    count.rows += len(rows)
    count.loss_tokens += loss_tokens
    count.tokens_without_loss += without_loss
    return rows.take(seeded_order(len(rows), options.seed, "bins", name, epoch))


def _with_loss(documents: Documents, rows: Rows) -> tuple[Rows, int, int]:
    """The rows that have something to learn, their tokens with loss, and the other rows' tokens.

    A token is predicted from the one before: the first one's label is never used, and the mean
    loss over a row without any other would be NaN.
    """
    import numpy as np

    start, stop = rows.start, rows.stop
    loss_start = documents.loss_start[rows.document]
    whole = (start == 0) & (stop == documents.lengths[rows.document])
    # Documents that are cut learn everything from ``loss_start`` on.
    learned = np.where(
        whole,
        documents.loss_tokens[rows.document],
        np.clip(stop - np.maximum(start, loss_start), 0, None),
    )
    sums = rows.sums(learned)
    first = rows.offsets[:-1]
    kept = sums > (start[first] >= loss_start[first])
    lost = int(rows.sums(stop - start)[~kept].sum())
    return rows.take(np.flatnonzero(kept)), int(sums[kept].sum()), lost


def _part(
    documents: Documents, name: str, bins: list[Rows], seed: tuple[int | str, ...]
) -> PartPlan:
    """A part from one bin of every category, its rows shuffled."""
    import numpy as np

    codes = np.concatenate(
        [np.full(len(rows), code, dtype=np.int64) for code, rows in enumerate(bins)]
    )
    order = seeded_order(len(codes), *seed)
    rows = join(bins).take(order)
    return PartPlan(
        name=name,
        names=documents.names,
        chunks=documents.chunks[rows.document],
        starts=documents.offsets[rows.document] + rows.start,
        lengths=rows.stop - rows.start,
        offsets=rows.offsets,
        categories=codes[order],
    )


def _validation_part(
    documents: Documents,
    held_out: np.ndarray,
    options: LayoutOptions,
    counts: dict[str, CategoryCount],
) -> PartPlan:
    """The documents kept apart, once each, whatever the mix."""
    bins = []
    for code, name in enumerate(documents.names):
        chosen = held_out[documents.categories[held_out] == code]
        counts[name].validation_documents = len(chosen)
        counts[name].validation_tokens = int(documents.lengths[chosen].sum())
        bins.append(_pack(documents, chosen, options, CategoryCount(), name, -1))
    return _part(documents, VALIDATION_PART, bins, (options.seed, "rows", VALIDATION_PART))


def _count_documents(documents: Documents, counts: dict[str, CategoryCount]) -> None:
    import numpy as np

    found = np.bincount(documents.categories, minlength=len(counts))
    tokens = np.zeros(len(counts), dtype=np.int64)
    np.add.at(tokens, documents.categories, documents.lengths)
    for code, count in enumerate(counts.values()):
        count.documents, count.tokens = int(found[code]), int(tokens[code])


def _no_rows() -> Rows:
    import numpy as np

    nothing = np.empty(0, dtype=np.int64)
    return Rows(nothing, nothing, nothing, np.zeros(1, dtype=np.int64))
