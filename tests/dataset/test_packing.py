"""Rows: every token of every document in exactly one, in order (the public packer loses 5-22 %)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.packing import (
    MOST_PADDING,
    PACKINGS,
    best_fit,
    best_fit_uncut,
    in_sequence,
    join,
)

lengths_lists = st.lists(st.integers(1, 200), max_size=80)


def sizes_of(rows):
    return rows.sums(rows.stop - rows.start)


def check_every_token_is_in_one_row(rows, lengths, max_length):
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, stop in zip(rows.document, rows.start, rows.stop, strict=True):
        assert start < stop
        seen[document][start:stop] += 1
    assert all((tokens == 1).all() for tokens in seen)
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(rows.document)
    assert (np.diff(rows.offsets) > 0).all()
    assert (sizes_of(rows) <= max_length).all()


@pytest.mark.parametrize("packing", PACKINGS)
@given(lengths=lengths_lists, max_length=st.integers(2, 150))
def test_every_token_is_in_one_row(packing, lengths, max_length):
    rows = PACKINGS[packing](np.array(lengths, dtype=np.int64), max_length)
    check_every_token_is_in_one_row(rows, lengths, max_length)


@given(lengths=lengths_lists, max_length=st.integers(2, 150))
def test_sequence_keeps_the_order_and_only_the_last_row_is_short(lengths, max_length):
    rows = in_sequence(np.array(lengths, dtype=np.int64), max_length)
    laid_out = list(zip(rows.document, rows.start, strict=True))
    assert laid_out == sorted(laid_out)
    assert set(sizes_of(rows)[:-1]) <= {max_length}


@given(lengths=lengths_lists, max_length=st.integers(2, 150))
def test_best_fit_leaves_little_padding(lengths, max_length):
    rows = best_fit(np.array(lengths, dtype=np.int64), max_length)
    assert len(rows) <= sum(lengths) / (max_length * (1 - MOST_PADDING)) + 1


@given(lengths=st.lists(st.sampled_from([8, 16, 32, 64, 128]), max_size=60))
def test_documents_that_fit_are_not_cut(lengths):
    """Powers of two fit each other without any loss; sequential packing would cut many."""
    rows = best_fit(np.array(lengths, dtype=np.int64), 128)
    assert len(rows.document) == len(lengths)
    assert (sizes_of(rows)[:-1] > 0).all()
    assert len(rows) == -(-sum(lengths) // 128)


@given(lengths=st.lists(st.integers(1, 64), max_size=60), max_length=st.integers(64, 99))
def test_uncut_means_that_none_is_cut(lengths, max_length):
    rows = best_fit_uncut(np.array(lengths, dtype=np.int64), max_length)
    assert sorted(rows.document) == list(range(len(lengths)))
    assert (rows.stop - rows.start == np.array(lengths)[rows.document]).all()
    # No more rows than by first fit, of which at most one is less than half full.
    assert len(rows) <= 2 * sum(lengths) / max_length + 1


@given(lengths=st.lists(st.integers(1, 64), min_size=40, max_size=200))
def test_few_of_many_short_documents_are_cut(lengths):
    rows = best_fit(np.array(lengths, dtype=np.int64), 1024)
    cut = len(rows.document) - len(lengths)
    assert cut <= 1 + len(lengths) // 20
    assert cut <= len(in_sequence(np.array(lengths), 1024).document) - len(lengths) + 1


def test_lengths_that_fit_badly_are_cut_up():
    """Two of three of these do not fit into a row: uncut, a quarter of it would be padding."""
    lengths = np.full(400, 3000)
    rows = best_fit(lengths, 4096)
    check_every_token_is_in_one_row(rows, lengths.tolist(), 4096)
    assert 1 - lengths.sum() / (4096 * len(rows)) < 2 * MOST_PADDING


def test_documents_lie_in_their_order_within_a_row():
    """Longest first in every row would teach the model that short texts come late."""
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    rows = best_fit(lengths, 1000)
    first = rows.document[rows.offsets[:-1]]
    assert abs(lengths[first].mean() - lengths.mean()) < 5
    for row in range(len(rows)):
        own = rows.document[rows.offsets[row] : rows.offsets[row + 1]]
        assert (np.diff(own) >= 0).all()


def test_without_packing_documents_are_apart():
    lengths = np.array([5, 64, 65, 200])
    rows = PACKINGS["none"](lengths, 64)
    assert rows.document.tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert sizes_of(rows).tolist() == [5, 64, 64, 1, 64, 64, 64, 8]


@given(lengths=st.lists(lengths_lists, max_size=4), seed=st.integers(0, 9))
def test_taking_and_joining_keep_rows_whole(lengths, seed):
    layouts = [best_fit(np.array(part, dtype=np.int64), 50) for part in lengths]
    layouts.append(best_fit(np.array([7]), 50))
    joined = join(layouts)
    order = np.random.default_rng(seed).permutation(len(joined))
    taken = joined.take(order)
    expected = [
        list(zip(rows.document[a:b], rows.start[a:b], rows.stop[a:b], strict=True))
        for rows in layouts
        for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    ]
    found = [
        list(zip(taken.document[a:b], taken.start[a:b], taken.stop[a:b], strict=True))
        for a, b in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)
    ]
    assert found == [expected[row] for row in order]
