"""Bins: exactly as many as asked for, near-equal; and orders that are the same everywhere."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.bins import bin_of_rows, seeded_order


@given(
    sizes=st.lists(st.integers(1, 4096), min_size=1, max_size=300),
    num_bins=st.integers(1, 40),
)
def test_every_bin_has_its_share_give_or_take_a_row(sizes, num_bins):
    bins = bin_of_rows(np.array(sizes), num_bins)
    tokens = np.bincount(bins, weights=sizes, minlength=num_bins)
    assert len(tokens) == num_bins
    assert (np.diff(bins) >= 0).all()
    assert (np.abs(tokens - sum(sizes) / num_bins) <= max(sizes)).all()


def test_exactly_as_many_bins_as_asked_for():
    """The public application gives 25 for 30, and 100 for 150 and 1000."""
    for num_bins in (1, 3, 10, 30, 60, 150, 1000):
        bins = bin_of_rows(np.full(4000, 4096), num_bins)
        assert np.unique(bins).tolist() == list(range(num_bins))
        assert np.ptp(np.bincount(bins)) <= 1


def test_few_rows_are_spread_over_the_bins():
    assert np.unique(bin_of_rows(np.full(4, 100), 10)).tolist() == [1, 3, 6, 8]
    assert bin_of_rows(np.empty(0, dtype=np.int64), 3).tolist() == []


def test_orders_are_permutations_that_differ_by_seed():
    seeds = [(1,), (2,), (1, "a"), (1, "b"), ("1",)]
    orders = [tuple(seeded_order(50, *seed)) for seed in seeds]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert seeded_order(0, 1).tolist() == []


def test_the_order_is_the_same_on_every_machine():
    # Written down once: prepared data depends on it.
    assert seeded_order(8, 42, "documents", "en").tolist() == [3, 5, 6, 0, 7, 1, 2, 4]
