"""Bins: exactly as many as asked for, near-equal, with every category in each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from colossal_llama.dataset.bins import divide, seeded_order


def corpus(seed: int, documents: int = 500) -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 2000, documents)
    return lengths, generator.integers(0, 3, documents), ["code", "en", "zh"]


@pytest.mark.parametrize("num_bins", [1, 3, 10, 30, 60, 150, 1000])
def test_exactly_as_many_bins_as_asked_for_and_no_document_lost(num_bins):
    lengths, categories, names = corpus(0)
    bins = divide(lengths, categories, names, num_bins, seed=42)
    assert len(bins) == num_bins
    assert all(len(bucket) == len(names) for bucket in bins)
    for index in range(len(names)):
        found = np.concatenate([bucket[index] for bucket in bins])
        assert sorted(found) == np.flatnonzero(categories == index).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_bins_of_a_category_are_near_equal(seed):
    lengths, categories, names = corpus(seed)
    bins = divide(lengths, categories, names, 10, seed)
    for index in range(len(names)):
        tokens = [lengths[bucket[index]].sum() for bucket in bins]
        assert min(tokens) > 0
        assert max(tokens) - min(tokens) <= lengths[categories == index].max()


def test_sorted_input_is_shuffled_into_the_bins():
    documents = 1000
    categories = np.zeros(documents, dtype=np.int64)
    bins = divide(np.full(documents, 10), categories, ["en"], 10, seed=1)
    for bucket in bins:
        assert abs(bucket[0].mean() - documents / 2) < documents / 8
        assert (np.diff(bucket[0]) < 0).any()


@pytest.mark.parametrize("num_bins", [1, 3, 10, 30])
def test_a_handful_of_documents_fills_as_many_buckets_as_it_can(num_bins):
    categories = np.array([0, 0, 1, 1])
    bins = divide(np.array([5, 900, 7, 3]), categories, ["en", "zh"], num_bins, seed=42)
    filled = [bucket for bucket in bins if sum(map(len, bucket))]
    assert len(filled) == min(num_bins, 4)


def test_a_category_is_divided_alike_whatever_stands_beside_it():
    lengths, categories, names = corpus(3)
    both = divide(lengths, categories, names, 4, seed=9)
    alone = divide(lengths[categories == 2], np.zeros((categories == 2).sum()), ["zh"], 4, seed=9)
    numbers = np.flatnonzero(categories == 2)
    assert {tuple(numbers[bucket[0]]) for bucket in alone} == {tuple(b[2]) for b in both}


def test_orders_are_permutations_that_differ_by_seed():
    seeds = [(1,), (2,), (1, "a"), (1, "b"), ("1",)]
    orders = [tuple(seeded_order(50, *seed)) for seed in seeds]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert seeded_order(0, 1).tolist() == []


def test_the_order_is_the_same_on_every_machine():
    # Written down once: prepared data and resumed runs depend on it.
    assert seeded_order(8, 42, "documents", "en").tolist() == [3, 5, 6, 0, 7, 1, 2, 4]
