"""The order of samples: complete, the same for every layout of a run, and found at once."""

from __future__ import annotations

import collections
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.sampler import BLOCK, ORDERS, GlobalSampler, Mixture, permuted

# A machine may be busy with other things.
unhurried = settings(deadline=None)
PARTS = st.lists(st.integers(1, 30), min_size=1, max_size=4)
DATASETS = st.lists(PARTS, min_size=1, max_size=4)
KEYS = st.integers(0, 2**64 - 1)


def permutation(size: int, key: int) -> np.ndarray:
    return permuted(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))


def equal_weights(datasets: list[list[int]]) -> list[float]:
    return [1 / len(datasets)] * len(datasets)


def stream(sampler: GlobalSampler, samples: int, consumed: int = 0) -> list[int]:
    found: list[int] = []
    while len(found) < samples:
        found += sampler.batch(consumed + len(found))
    return found[:samples]


@unhurried
@given(st.integers(1, 2000), KEYS)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 255, 256, 257, 65535, 65536, 65537])
def test_permutation_around_squares(size: int) -> None:
    assert np.array_equal(np.sort(permutation(size, 7)), np.arange(size))


@unhurried
@given(st.integers(10**6, 2**52 - 1), KEYS, st.integers(0, 10**6 - 1000))
def test_permutation_of_any_size_stays_inside_and_repeats_nothing(
    size: int, key: int, first: int
) -> None:
    index = np.arange(first, first + 1000)
    found = permuted(index, np.full(1000, size), np.full(1000, key, dtype=np.uint64))
    assert found.min() >= 0
    assert found.max() < size
    assert len(set(found.tolist())) == 1000


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_orders_are_equally_likely(size: int) -> None:
    """With four rounds instead of ten the statistic is over 20 standard deviations off."""
    keys = np.random.default_rng(0).integers(0, 2**64, 48_000, dtype=np.uint64)
    index = np.tile(np.arange(size), len(keys))
    orders = permuted(index, np.full(len(index), size), np.repeat(keys, size))
    counts = collections.Counter(map(tuple, orders.reshape(-1, size).tolist()))
    possible = list(itertools.permutations(range(size)))
    expected = len(keys) / len(possible)
    statistic = sum((counts[order] - expected) ** 2 / expected for order in possible)
    freedom = len(possible) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_large_permutations_have_no_trend() -> None:
    """Neighbours land anywhere: correlation of order 1/sqrt(n), and mean distance n/3."""
    size = 100_000
    found = permutation(size, 1)
    assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / size**0.5
    assert np.abs(np.diff(found)).mean() == pytest.approx(size / 3, rel=0.02)


def test_elements_do_not_depend_on_each_other() -> None:
    index, size = np.array([5, 0, 5, 77]), np.array([6, 1, 1000, 78])
    key = np.array([1, 2, 1, 2**64 - 1], dtype=np.uint64)
    alone = [permuted(index[n : n + 1], size[n : n + 1], key[n : n + 1])[0] for n in range(4)]
    assert permuted(index, size, key).tolist() == alone


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_each_epoch_has_every_row_once_bucket_after_bucket(batch_size: int) -> None:
    found = stream(GlobalSampler([[7, 1], [12]], 3, batch_size), 60)
    for epoch in range(3):
        rows = found[epoch * 20 : (epoch + 1) * 20]
        assert sorted(rows[:7]) == list(range(7))
        assert rows[7] == 7
        assert sorted(rows[8:]) == list(range(8, 20))


def test_shuffled_epochs_have_every_row_once_from_all_parts_at_any_time() -> None:
    found = stream(GlobalSampler([[500], [300, 200]], 3, 64, "shuffled"), 3000)
    for epoch in range(3):
        rows = np.array(found[epoch * 1000 : (epoch + 1) * 1000])
        assert np.array_equal(np.sort(rows), np.arange(1000))
        for tenth in np.split(rows, 10):
            assert 20 < (tenth < 500).sum() < 80


@pytest.mark.parametrize("order", ORDERS)
def test_order_differs_by_epoch_seed_and_part_and_nothing_else(order: str) -> None:
    sampler = GlobalSampler([[50, 50]], 1, 100, order)
    first, second = sampler.batch(0), sampler.batch(100)
    assert first != second
    assert first != GlobalSampler([[50, 50]], 2, 100, order).batch(0)
    assert first[:50] != [row - 50 for row in first[50:]]
    assert sampler.batch(0) == first
    assert GlobalSampler([[50], [50]], 1, 100, order).batch(0) == first


@settings(deadline=None, max_examples=30)
@given(DATASETS, st.integers(0, 300), st.integers(1, 40), st.integers(1, 70),
       st.sampled_from(ORDERS), st.booleans())  # fmt: skip
def test_another_world_size_goes_on_at_the_same_sample(
    datasets: list[list[int]], consumed: int, one: int, other: int, order: str, weighted: bool
) -> None:
    """A position counted in steps per rank reads other data after a resume."""
    weights = equal_weights(datasets) if weighted else None
    whole = stream(GlobalSampler(datasets, 5, one, order, weights), consumed + 150)
    resumed = GlobalSampler(datasets, 5, other, order, weights)
    assert stream(resumed, 150, consumed) == whole[consumed:]


def test_batches_are_always_full() -> None:
    batch = GlobalSampler([[5]], 0, 12).batch(60)
    assert len(batch) == 12
    assert set(collections.Counter(batch).values()) == {2, 3}


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([0.7, 0.2, 0.1], [700, 200, 100]), ([0.333, 0.333, 0.334], [333, 333, 334])],
)
def test_whole_weights_are_exact_in_every_block(weights: list[float], counts: list[int]) -> None:
    mixture = Mixture(weights, 0)
    for block in (0, 1, 10**9):
        turns, _ = mixture.turns(block * BLOCK, BLOCK)
        assert np.bincount(turns).tolist() == counts


WEIGHTS = st.lists(st.floats(1e-6, 1), min_size=1, max_size=8)


@unhurried
@given(WEIGHTS, st.integers(0, 10**10))
def test_rounding_does_not_add_up(weights: list[float], block: int) -> None:
    mixture = Mixture(weights, 0)
    before, after = mixture.taken(block * BLOCK), mixture.taken((block + 1) * BLOCK)
    assert sum(after) == (block + 1) * BLOCK
    assert all(low <= high for low, high in zip(before, after, strict=True))
    # A billionth of the samples apart, in which weights are counted.
    allowed = len(weights) * (1 + block * BLOCK / 1e9)
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - block * BLOCK * weight / sum(weights)) <= allowed


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.integers(0, 5 * BLOCK), st.integers(1, 2 * BLOCK))
def test_turns_count_the_samples_of_each_dataset(
    weights: list[float], first: int, count: int
) -> None:
    turns, numbers = Mixture(weights, 3).turns(0, first + count)
    for dataset in range(len(weights)):
        own = numbers[turns == dataset]
        assert np.array_equal(own, np.arange(len(own)))
    later = Mixture(weights, 3).turns(first, count)
    assert np.array_equal(later[0], turns[first:])
    assert np.array_equal(later[1], numbers[first:])


def test_turns_are_spread_over_a_block_and_differ_by_block_and_seed() -> None:
    turns, _ = Mixture([0.5, 0.5], 0).turns(0, 2 * BLOCK)
    for tenth in np.split(turns, 20):
        assert 20 < tenth.sum() < 80
    assert not np.array_equal(turns[:BLOCK], turns[BLOCK:])
    assert not np.array_equal(turns, Mixture([0.5, 0.5], 1).turns(0, 2 * BLOCK)[0])


def test_each_weighted_dataset_goes_through_epochs_of_its_own() -> None:
    """The small one five times while the large one is not through once."""
    datasets = [[400, 600], [30, 20]]
    found = stream(GlobalSampler(datasets, 9, 17, weights=[0.75, 0.25]), 1000)
    large = [row for row in found if row < 1000]
    small = [row - 1000 for row in found if row >= 1000]
    assert (len(large), len(small)) == (750, 250)
    assert large == stream(GlobalSampler(datasets[:1], 9, 17), 750)
    assert sorted(large[:400]) == list(range(400))
    for epoch in range(5):
        rows = small[epoch * 50 : (epoch + 1) * 50]
        assert sorted(rows[:30]) == list(range(30))
        assert sorted(rows[30:]) == list(range(30, 50))
    assert small[:50] != small[50:100]


@pytest.mark.parametrize("order", ORDERS)
def test_one_dataset_with_all_the_weight_is_one_without_weights(order: str) -> None:
    weighted, plain = (GlobalSampler([[40, 9]], 2, 8, order, w) for w in ([1.0], None))
    assert stream(weighted, 200) == stream(plain, 200)


@pytest.mark.parametrize("weights", [None, [0.9, 0.1]])
@pytest.mark.parametrize("order", ORDERS)
def test_a_billion_rows_are_no_more_work_than_ten(order: str, weights: list[float] | None) -> None:
    """Their row numbers alone would take 8 GB."""
    sampler = GlobalSampler([[10**9 - 11, 1], [10]], 0, 4096, order, weights)
    tracemalloc.start()
    batch = sampler.batch(10**9 * 7 + 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6
    assert len(batch) == 4096
    assert min(batch) >= 0
    assert max(batch) < 10**9


def test_orders_that_runs_depend_on() -> None:
    """A run that is resumed goes on in the order of the program that began it."""
    datasets = [[4, 3], [5]]
    golden = {
        ("buckets", None): "0 5 4 6 10 9 7 8 11 1 2 0 3 5 6 4 8 10 11 9 7 0 2 3",
        ("shuffled", None): "3 9 2 5 11 7 1 10 0 6 3 5 10 1 11 9 7 8 2 0 4 0 3 10",
        ("buckets", (0.6, 0.4)): "9 8 2 3 0 10 5 8 4 6 1 10 2 0 3 5 7 6 4 0 9 11 8 10",
        ("shuffled", (0.6, 0.4)): "9 8 0 6 3 10 1 8 2 5 6 10 3 5 0 1 7 4 2 0 9 11 8 10",
    }
    found = {
        key: " ".join(map(str, GlobalSampler(datasets, 42, 24, *key).batch(3))) for key in golden
    }
    assert found == golden
    assert GlobalSampler([[10**12]], 42, 4).batch(10**13) == [
        *(647711780171, 378190941869, 171838728008, 403341361366)
    ]
