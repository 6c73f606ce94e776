"""Opening parts, batches and the order of samples."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from colossal_llama.dataset.loader import IGNORE_INDEX, GlobalSampler, collate


def rows_of(*lengths, token=2):
    return [
        {"input_ids": np.full(length, token), "labels": np.full(length, token)}
        for length in lengths
    ]


def test_mask_comes_from_lengths_where_pad_is_eos():
    """A mask from ``ids != pad`` hides the separators between documents."""
    batch = collate(rows_of(3, 5, 1), pad_id=2)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 1]
    assert torch.equal(batch["attention_mask"] == 1, batch["labels"] != IGNORE_INDEX)


def test_batches_have_the_documented_form():
    batch = collate(rows_of(3, 5), pad_id=0, pad_to_multiple_of=4)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    for tensor in batch.values():
        assert tensor.shape == (2, 8)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert batch["input_ids"].tolist() == [[2] * 3 + [0] * 5, [2] * 5 + [0] * 3]
    assert collate(rows_of(3, 5), pad_id=0)["input_ids"].shape == (2, 5)


def stream(sampler, batches, consumed=0):
    found = []
    for _ in range(batches):
        found += sampler.batch(consumed + len(found))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_each_epoch_has_every_row_once_bucket_after_bucket(batch_size):
    parts = [7, 1, 12]
    sampler = GlobalSampler(parts, seed=3, batch_size=batch_size)
    found = stream(sampler, -(-60 // batch_size))
    for epoch in range(3):
        rows = found[epoch * 20 : (epoch + 1) * 20]
        assert sorted(rows[:7]) == list(range(7))
        assert rows[7] == 7
        assert sorted(rows[8:]) == list(range(8, 20))


def test_batches_are_always_full():
    sampler = GlobalSampler([5], seed=0, batch_size=12)
    batch = sampler.batch(60)
    assert len(batch) == 12
    assert set(collections.Counter(batch).values()) == {2, 3}


def test_order_differs_by_epoch_and_seed_and_nothing_else():
    sampler = GlobalSampler([50, 50], seed=1, batch_size=100)
    first, second = sampler.batch(0), sampler.batch(100)
    assert first != second
    assert first != GlobalSampler([50, 50], seed=2, batch_size=100).batch(0)
    assert first[:50] != [row - 50 for row in first[50:]]
    assert sampler.batch(0) == first


@pytest.mark.parametrize("batch_size", [1, 6, 16])
def test_another_world_size_goes_on_at_the_same_sample(batch_size):
    """A position counted in steps per rank reads other data after a resume."""
    whole = stream(GlobalSampler([30, 11], seed=5, batch_size=4), 40)
    resumed = GlobalSampler([30, 11], seed=5, batch_size=batch_size)
    after = stream(resumed, 3, consumed=36)
    assert after == whole[36 : 36 + 3 * batch_size]
