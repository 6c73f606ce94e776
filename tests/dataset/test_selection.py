"""What is trained on, how often, and what is kept apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.selection import check_mix, choose_validation, epochs_of, parse_mix
from colossal_llama.errors import DataError


@given(
    texts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=200),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_validation_never_shares_a_text_with_training(texts, fraction, seed):
    hashes = np.array([text for text, _ in texts], dtype=np.uint64)
    categories = np.array([category for _, category in texts])
    chosen = choose_validation(hashes, categories, fraction, seed)
    assert not set(hashes[chosen]) & set(hashes[~chosen])
    assert np.array_equal(chosen, choose_validation(hashes, categories, fraction, seed))
    if fraction == 0:
        assert not chosen.any()


@given(
    counts=st.lists(st.integers(2, 300), min_size=1, max_size=4),
    fraction=st.floats(0.001, 0.9),
)
def test_every_category_gives_its_fraction_and_keeps_some(counts, fraction):
    categories = np.repeat(np.arange(len(counts)), counts)
    hashes = np.arange(len(categories), dtype=np.uint64)
    chosen = choose_validation(hashes, categories, fraction, 42)
    for category, count in enumerate(counts):
        taken = int(chosen[categories == category].sum())
        assert taken == min(max(1, round(fraction * count)), count - 1)


def test_the_choice_does_not_depend_on_the_order_of_the_input():
    hashes = np.random.default_rng(0).integers(0, 1 << 60, 500).astype(np.uint64)
    categories = hashes.astype(np.int64) % 3
    order = np.random.default_rng(1).permutation(500)
    first = choose_validation(hashes, categories, 0.1, 7)
    second = choose_validation(hashes[order], categories[order], 0.1, 7)
    assert np.array_equal(first[order], second)
    assert not np.array_equal(first, choose_validation(hashes, categories, 0.1, 8))


lengths_lists = st.lists(st.integers(1, 50), min_size=20, max_size=100)


@given(
    zh=lengths_lists,
    en=lengths_lists,
    share=st.floats(0.01, 0.99),
)
def test_shares_come_out_and_no_document_comes_early_again(zh, en, share):
    lengths = {"zh": np.array(zh), "en": np.array(en)}
    epochs = epochs_of(lengths, {"zh": share, "en": 1 - share}, seed=3)
    total = sum(zh) + sum(en)
    for name, wanted in (("zh", share), ("en", 1 - share)):
        taken = sum(int(lengths[name][order].sum()) for order in epochs[name])
        assert abs(taken - wanted * total) <= max(lengths[name])
        for order in epochs[name][:-1]:
            assert sorted(order) == list(range(len(lengths[name])))
        assert all(len(set(order)) == len(order) for order in epochs[name])


def test_without_a_mix_all_is_taken_once_in_another_order_for_each_category():
    lengths = {"zh": np.full(100, 5), "en": np.full(100, 5)}
    epochs = epochs_of(lengths, {}, seed=1)
    orders = [order.tolist() for (order,) in epochs.values()]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1]


def test_a_text_that_is_half_of_all_does_not_become_the_validation_part():
    hashes = np.array([7] * 500 + list(range(1000, 1500)), dtype=np.uint64)
    for seed in range(8):
        chosen = choose_validation(hashes, np.zeros(1000, dtype=int), 0.2, seed)
        assert chosen.sum() == 200


def test_a_handful_of_tokens_is_not_repeated_for_ever():
    lengths = {"big": np.full(100, 1000), "tiny": np.array([10])}
    with pytest.raises(DataError, match=r"--mix: tiny has 10 tokens .*more than 1000 times"):
        epochs_of(lengths, {"big": 0.5, "tiny": 0.5}, seed=1)


def test_epochs_are_shuffled_anew_and_a_share_of_nothing_is_nothing():
    lengths = {"zh": np.full(40, 5), "en": np.full(120, 5)}
    epochs = epochs_of(lengths, {"zh": 1.0, "en": 0.0}, seed=1)
    assert epochs["en"] == []
    assert len(epochs["zh"]) == 4
    assert len({tuple(order) for order in epochs["zh"]}) == 4


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["zh"], "not CATEGORY=SHARE"),
        (["zh=x"], "not CATEGORY=SHARE"),
        (["=1"], "not CATEGORY=SHARE"),
        (["zh=1.5"], "between 0 and 1"),
        (["zh=0.5", "zh=0.5"], "named twice"),
        (["zh=0.5", "en=0.4"], "sum to 0.9"),
    ],
)
def test_mixes_that_cannot_be(items, reason):
    with pytest.raises(ValueError, match=reason):
        parse_mix(items)


def test_a_mix_names_the_categories_of_the_input():
    assert parse_mix(["a=b=0.25", "en=0.75"]) == {"a=b": 0.25, "en": 0.75}
    check_mix({}, ["en"])
    check_mix({"zh": 0.5, "en": 0.5}, ["en", "zh"])
    for categories in (["en"], ["code", "en", "zh"]):
        with pytest.raises(DataError, match="--mix names en, zh, the input has"):
            check_mix({"zh": 0.5, "en": 0.5}, categories)
