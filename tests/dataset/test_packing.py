"""Rows: every token of every document in exactly one, in order (the public packer loses 5-22 %)."""

from __future__ import annotations

import random

import pytest

from colossal_llama.dataset.packing import one_row_each, pack_in_sequence


def lengths_of_seed(seed: int) -> list[int]:
    generator = random.Random(seed)
    longest = generator.choice([3, 50, 1000])
    return [generator.randint(1, longest) for _ in range(generator.randint(1, 200))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("max_length", [2, 7, 64, 5000])
def test_every_token_is_in_one_row_in_order(seed, max_length):
    documents = list(enumerate(lengths_of_seed(seed)))
    rows = list(pack_in_sequence(documents, max_length))
    laid_out = [
        (segment.document, token)
        for row in rows
        for segment in row
        for token in range(segment.start, segment.stop)
    ]
    assert laid_out == [(number, token) for number, length in documents for token in range(length)]


@pytest.mark.parametrize("seed", range(20))
def test_only_the_last_row_is_short(seed):
    rows = list(pack_in_sequence(enumerate(lengths_of_seed(seed)), 64))
    sizes = [sum(stop - start for _, start, stop in row) for row in rows]
    assert set(sizes[:-1]) <= {64}
    assert 0 < sizes[-1] <= 64
    assert all(stop > start for row in rows for _, start, stop in row)


def test_conversations_are_not_concatenated():
    lengths = lengths_of_seed(1)
    rows = list(one_row_each(enumerate(lengths)))
    assert rows == [[(number, 0, length)] for number, length in enumerate(lengths)]
