"""Micro-batches: every row once, no padding that nobody needs, documents kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.batches import (
    MODEL_INPUTS,
    Batch,
    BatchMaker,
    document_mask,
    loss_tokens,
    loss_tokens_by_category,
    tokens,
)
from tests.training.stand_ins import LAYOUT

CPU = torch.device("cpu")
CATEGORIES = ["code", "en", "zh"]


@dataclass
class Rows:
    """Row ``n`` consists of the token ``n + 1``, from documents of the given lengths."""

    documents: list[list[int]]
    taken: list[int] = field(default_factory=list)
    categories: tuple[str, ...] = tuple(CATEGORIES)

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        self.taken += numbers
        return [self.row(number) for number in numbers]

    def row(self, number: int) -> dict[str, Any]:
        lengths = self.documents[number]
        labels = np.full(sum(lengths), number + 1, dtype=np.int32)
        labels[1::3] = -100
        return {
            "input_ids": np.full(sum(lengths), number + 1, dtype=np.int32),
            "labels": labels,
            "document_lengths": np.array(lengths, dtype=np.int32),
            "category": CATEGORIES[number % 3],
        }


def maker(rows: Rows, micro_batch_size: int = 2, **settings: Any) -> BatchMaker:
    layout = {name: settings.pop(name) for name in list(settings) if hasattr(LAYOUT, name)}
    return BatchMaker(rows, replace(LAYOUT, **layout), micro_batch_size, 0, **settings)


documents = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(
    st.lists(documents, min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
)
@settings(deadline=None)
def test_shares_and_micro_batches_have_every_row_once(
    lengths: list[list[int]], ranks: int, micro_batch_size: int, multiple: int, pipeline: bool
) -> None:
    """In the order of the batch, ids, labels and lengths as they are in the data."""
    numbers = [n % len(lengths) for n in range(ranks * micro_batch_size * 2)]
    found = []
    for rank in range(ranks):
        rows = Rows(lengths)
        own = maker(
            rows, micro_batch_size, data_size=ranks, data_rank=rank,
            sequence_multiple=multiple, pipeline=pipeline,
        )  # fmt: skip
        batches = own.make(numbers)
        assert rows.taken == list(own.own_share(numbers)), "others' rows were read"
        assert len(batches) == 2
        widths = {batch["input_ids"].shape[1] for batch in batches}
        assert not pipeline or len(widths) == 1, "the stages of a pipeline expect one shape"
        for batch in batches:
            check_width(batch, multiple, pipeline)
            found += rows_of(batch)
    wanted = [Rows(lengths).row(number) for number in numbers]
    assert len(found) == len(wanted)
    for ours, row in zip(found, wanted, strict=True):
        assert ours["input_ids"] == row["input_ids"].tolist()
        assert ours["labels"] == row["labels"].tolist()
        assert ours["category"] == row["category"]


def check_width(batch: Batch, multiple: int, pipeline: bool) -> None:
    width, longest = batch["input_ids"].shape[1], int(batch["length"].max())
    assert width % multiple == 0
    assert width >= longest
    assert pipeline or width < longest + multiple
    for name in (*MODEL_INPUTS, "labels"):
        assert batch[name].shape == batch["input_ids"].shape
        assert batch[name].dtype == torch.int64


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch without their padding, which is checked to be that."""
    found = []
    for number, length in enumerate(batch["length"].tolist()):
        assert batch["attention_mask"][number].tolist() == [
            int(place < length) for place in range(batch["input_ids"].shape[1])
        ]
        assert (batch["labels"][number, length:] == -100).all()
        found.append(
            {
                "input_ids": batch["input_ids"][number, :length].tolist(),
                "labels": batch["labels"][number, :length].tolist(),
                "category": CATEGORIES[int(batch["category"][number])],
            }
        )
    return found


@given(st.lists(documents, min_size=1, max_size=9), st.integers(1, 3))
@settings(deadline=None)
def test_counts_are_those_of_the_rows(lengths: list[list[int]], micro_batch_size: int) -> None:
    """A row's first label has nothing before it to predict it from."""
    rows = Rows(lengths)
    batches = maker(rows, micro_batch_size).make(range(len(lengths)))
    wanted = dict.fromkeys(CATEGORIES, 0)
    for number in range(len(lengths)):
        row = rows.row(number)
        wanted[row["category"]] += int((row["labels"][1:] != -100).sum())
    assert loss_tokens_by_category(batches, 3).tolist() == list(wanted.values())
    assert sum(map(loss_tokens, batches)) == sum(wanted.values())
    assert sum(map(tokens, batches)) == sum(map(sum, lengths))


@given(st.lists(documents, min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_mask_lets_a_token_see_its_own_document_up_to_itself(lengths: list[list[int]]) -> None:
    batch = maker(Rows(lengths), across_documents=False).collate(
        Rows(lengths).take(range(len(lengths)))
    )
    mask = document_mask(batch["position_ids"], torch.float32)
    width = batch["input_ids"].shape[1]
    assert mask.shape == (len(lengths), 1, width, width)
    for row, own in enumerate(lengths):
        # Padding is one more document: a token that saw nothing would be NaN.
        document = [n for n, length in enumerate([*own, width - sum(own)]) for _ in range(length)]
        for query in range(width):
            for key in range(width):
                seen = key <= query and document[query] == document[key]
                value = float(mask[row, 0, query, key])
                assert value == (0 if seen else torch.finfo(torch.float32).min)
    assert (mask.amax(dim=3) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_is_finite_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2, 0, 0]]), dtype)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    assert not torch.isnan(mask.softmax(dim=-1)).any()


@pytest.mark.parametrize("across", [True, False])
def test_model_gets_what_it_takes_and_nothing_else(across: bool) -> None:
    own = maker(Rows([[2, 3], [4]]), across_documents=across, dtype=torch.bfloat16)
    (batch,) = own.make([0, 1])
    inputs = own.model_inputs(batch, CPU)
    assert inputs.keys() == set(MODEL_INPUTS)
    assert inputs["attention_mask"].dim() == (2 if across else 4)
    positions = [[0, 1, 2, 3, 4]] * 2 if across else [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert inputs["position_ids"].tolist() == positions
    assert batch["attention_mask"].dim() == 2, "the batch itself is as it was"


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request: pytest.FixtureRequest) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        attn_implementation=request.param,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_of(llama: Any, own: BatchMaker, rows: list[dict[str, Any]]) -> torch.Tensor:
    inputs = own.model_inputs(own.collate(rows), CPU)
    return llama(**inputs, use_cache=False).logits


def some_row(seed: int, *lengths: int) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(1, 50, sum(lengths)).astype(np.int32)
    return {"input_ids": ids, "labels": ids, "document_lengths": list(lengths), "category": "en"}


def test_a_packed_document_is_read_as_if_it_were_alone(llama: Any) -> None:
    """In a batch with padding, too."""
    apart = maker(Rows([]), across_documents=False)
    packed, other = some_row(1, 5, 9, 3), some_row(2, 20)
    both = logits_of(llama, apart, [packed, other])
    start = 0
    for length in packed["document_lengths"]:
        ids = packed["input_ids"][start : start + length]
        alone = {**packed, "input_ids": ids, "labels": ids, "document_lengths": [length]}
        torch.testing.assert_close(
            both[0, start : start + length],
            logits_of(llama, apart, [alone])[0],
            rtol=1e-4,
            atol=1e-4,
        )
        start += length
    assert torch.isfinite(both).all()


def test_across_documents_a_token_sees_all_before_it(llama: Any) -> None:
    packed = some_row(1, 5, 9)
    whole = {**packed, "document_lengths": [14]}
    across, apart = (maker(Rows([]), across_documents=flag) for flag in (True, False))
    seen = logits_of(llama, across, [packed])
    torch.testing.assert_close(seen, logits_of(llama, across, [whole]))
    torch.testing.assert_close(seen, logits_of(llama, apart, [whole]), rtol=1e-4, atol=1e-4)
    hidden = logits_of(llama, apart, [packed])
    torch.testing.assert_close(seen[:, :5], hidden[:, :5], rtol=1e-4, atol=1e-4)
    assert (seen[:, 6:] - hidden[:, 6:]).abs().amin(dim=0).max() > 1e-2
