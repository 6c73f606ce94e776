"""Batches: what was in the rows, padding that nothing sees, positions that start where asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.writer import IGNORE_INDEX

PAD = 2
# Lengths of the documents of every row of a batch.
BATCHES = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=6
)  # fmt: skip


def row_of(*lengths: int, token: int = PAD) -> dict[str, Any]:
    """A row as a loader gives it; its arrays cannot be written to."""
    ids = np.full(sum(lengths), token, dtype=np.int32)
    row = {"input_ids": ids, "labels": ids + 1, "document_lengths": np.array(lengths, np.int32)}
    for array in row.values():
        array.flags.writeable = False
    return row | {"category": "en"}


def test_mask_comes_from_lengths_where_pad_is_eos() -> None:
    """A mask from ``ids != pad`` hides the separators between documents."""
    batch = collate([row_of(3), row_of(5), row_of(1)], pad_id=PAD)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert torch.equal(batch["attention_mask"] == 1, batch["labels"] != IGNORE_INDEX)


@pytest.mark.filterwarnings("error")
def test_batches_have_the_documented_form() -> None:
    batch = collate([row_of(3), row_of(5)], pad_id=0, pad_to_multiple_of=4)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    for tensor in batch.values():
        assert tensor.shape == (2, 8)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert batch["input_ids"].tolist() == [[2] * 3 + [0] * 5, [2] * 5 + [0] * 3]
    assert collate([row_of(3), row_of(5)], pad_id=0)["input_ids"].shape == (2, 5)


@settings(deadline=None)
@given(BATCHES, st.integers(1, 9), st.booleans())
def test_a_batch_is_its_rows_and_padding(
    documents: list[list[int]], multiple: int, restart: bool
) -> None:
    rows = [row_of(*lengths, token=9 + index) for index, lengths in enumerate(documents)]
    batch = collate(rows, PAD, multiple, restart_positions=restart)
    longest = max(map(sum, documents))
    width = batch["input_ids"].shape[1]
    assert longest <= width < longest + multiple
    assert width % multiple == 0
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        for name, pad in (("input_ids", PAD), ("labels", IGNORE_INDEX)):
            assert batch[name][index].tolist() == [*row[name].tolist(), *[pad] * (width - length)]
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (width - length)


@settings(deadline=None)
@given(BATCHES, st.integers(1, 9))
def test_positions_restart_at_every_document(documents: list[list[int]], multiple: int) -> None:
    rows = [row_of(*lengths) for lengths in documents]
    restarted = collate(rows, PAD, multiple, restart_positions=True)["position_ids"]
    plain = collate(rows, PAD, multiple)["position_ids"]
    for index, lengths in enumerate(documents):
        padding = plain.shape[1] - sum(lengths)
        expected = [place for length in (*lengths, padding) for place in range(length)]
        assert restarted[index].tolist() == expected
        assert plain[index].tolist() == list(range(plain.shape[1]))


def test_lengths_that_do_not_add_up_are_noticed() -> None:
    row = row_of(3, 4) | {"document_lengths": np.array([3, 3])}
    collate([row], PAD)
    with pytest.raises(AssertionError):
        collate([row], PAD, restart_positions=True)
