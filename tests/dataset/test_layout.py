"""The plan of the parts: conservation, balance, loss, validation, whatever is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.layout import Documents, LayoutOptions, plan_parts
from colossal_llama.dataset.packing import PACKINGS

SETTINGS = {
    "packing": "best_fit",
    "max_length": 64,
    "num_bins": 3,
    "validation_fraction": 0.0,
    "shares": {},
    "seed": 1,
}


def documents_of(rows):
    """Documents from (length, prefix without loss, category), several to a chunk."""
    lengths = np.array([length for length, _, _ in rows], dtype=np.int64)
    prefix = np.array([min(prefix, length - 1) for length, prefix, _ in rows], dtype=np.int64)
    chunks = np.arange(len(rows)) // 7
    ends = np.cumsum(lengths)
    first = np.array([ends[chunk * 7] - lengths[chunk * 7] for chunk in chunks], dtype=np.int64)
    return Documents(
        names=["code", "en", "zh"],
        lengths=lengths,
        loss_start=prefix,
        loss_tokens=lengths - prefix,
        categories=np.array([category for _, _, category in rows], dtype=np.int64),
        hashes=np.arange(len(rows), dtype=np.uint64),
        chunks=chunks,
        offsets=ends - lengths - first,
    )


def tokens_of(plan, documents):
    """(document, position) of every token in every row of every part, with its category."""
    at = {
        (int(chunk), int(offset) + position): (document, position)
        for document, (chunk, offset) in enumerate(
            zip(documents.chunks, documents.offsets, strict=True)
        )
        for position in range(documents.lengths[document])
    }
    for part in plan.parts:
        for row, category in enumerate(part.categories):
            found = []
            for stretch in range(part.offsets[row], part.offsets[row + 1]):
                start = int(part.starts[stretch])
                chunk = int(part.chunks[stretch])
                found += [at[chunk, start + i] for i in range(part.lengths[stretch])]
            yield part, int(category), found


rows_lists = st.lists(
    st.tuples(st.integers(2, 150), st.integers(0, 80), st.integers(0, 2)), min_size=1, max_size=60
)


@pytest.mark.parametrize("packing", PACKINGS)
@given(rows=rows_lists, num_bins=st.integers(1, 5), fraction=st.sampled_from([0.0, 0.2]))
def test_every_token_is_in_one_row_or_has_nothing_to_learn_beside_it(
    packing, rows, num_bins, fraction
):
    documents = documents_of(rows)
    settings = SETTINGS | {"packing": packing, "num_bins": num_bins}
    plan = plan_parts(documents, LayoutOptions(**settings | {"validation_fraction": fraction}))
    seen = set()
    loss_tokens = 0
    for part, category, tokens in tokens_of(plan, documents):
        assert 0 < len(tokens) <= 64
        learned = [p >= documents.loss_start[d] for d, p in tokens]
        assert any(learned[1:])
        assert not seen & set(tokens)
        seen |= set(tokens)
        assert {int(documents.categories[d]) for d, _ in tokens} == {category}
        loss_tokens += sum(learned) * (part.name != "validation")
    counts = plan.categories.values()
    assert loss_tokens == sum(count.loss_tokens for count in counts)
    missing = int(documents.lengths.sum()) - len(seen)
    assert missing >= sum(count.tokens_without_loss for count in counts)
    if fraction == 0:
        assert missing == sum(count.tokens_without_loss for count in counts)
        assert [part.name for part in plan.parts] == [f"part-{n:05d}" for n in range(num_bins)]


@given(rows=rows_lists)
def test_bins_of_a_category_are_equal_give_or_take_a_row(rows):
    documents = documents_of(rows)
    plan = plan_parts(documents, LayoutOptions(**SETTINGS))
    for code in range(3):
        tokens = []
        for part in plan.parts:
            ends = np.concatenate([[0], np.cumsum(part.lengths)])
            sizes = ends[part.offsets[1:]] - ends[part.offsets[:-1]]
            tokens.append(int(sizes[part.categories == code].sum()))
        assert max(tokens) - min(tokens) <= 2 * 64


@given(rows=rows_lists, seed=st.integers(0, 3))
def test_no_token_of_a_validation_document_is_trained_on(rows, seed):
    documents = documents_of(rows)
    settings = SETTINGS | {"validation_fraction": 0.3, "seed": seed}
    plan = plan_parts(documents, LayoutOptions(**settings))
    sides: dict[bool, set] = {True: set(), False: set()}
    for part, _, tokens in tokens_of(plan, documents):
        sides[part.name == "validation"] |= {document for document, _ in tokens}
    assert not sides[True] & sides[False]


def test_a_mix_repeats_whole_epochs_in_other_bins():
    """zh is taken twice: its repetition is in later parts, not beside the first time."""
    rows = [(40, 0, 2)] * 60 + [(40, 0, 1)] * 180
    documents = documents_of(rows)
    shares = {"code": 0.0, "en": 0.5, "zh": 0.5}
    plan = plan_parts(documents, LayoutOptions(**SETTINGS | {"num_bins": 2, "shares": shares}))
    assert plan.categories["zh"].epochs == 2.0
    assert plan.categories["en"].epochs == pytest.approx(2 / 3, abs=0.01)
    assert plan.categories["zh"].training_tokens == plan.categories["en"].training_tokens
    per_part: dict[str, list] = {}
    for part, category, tokens in tokens_of(plan, documents):
        if category == 2:
            per_part.setdefault(part.name, []).extend(tokens)
    for tokens in per_part.values():
        assert len(tokens) - len(set(tokens)) <= 64


@pytest.mark.parametrize("packing", PACKINGS)
def test_bins_are_alike(packing):
    """Packing puts full rows and long documents first; they must not all be in the first bin."""
    generator = np.random.default_rng(0)
    lengths = np.where(generator.random(900) < 0.3, 150, generator.integers(2, 30, 900))
    documents = documents_of([(int(length), 0, 1) for length in lengths])
    plan = plan_parts(documents, LayoutOptions(**SETTINGS | {"packing": packing}))
    stretches = [len(part.lengths) / len(part.categories) for part in plan.parts]
    assert max(stretches) < 1.5 * min(stretches)
    longest = [(part.lengths == 64).mean() for part in plan.parts]
    assert max(longest) < 2 * min(longest)


def test_rows_are_shuffled_over_categories():
    documents = documents_of([(64, 0, n % 3) for n in range(90)])
    plan = plan_parts(documents, LayoutOptions(**SETTINGS))
    for part in plan.parts:
        assert part.categories.tolist() != sorted(part.categories)
        assert set(part.categories.tolist()) == {0, 1, 2}


def test_the_seed_changes_the_plan_and_nothing_else_does():
    documents = documents_of([(30 + n, 0, n % 3) for n in range(60)])
    plans = [plan_parts(documents, LayoutOptions(**SETTINGS | {"seed": s})) for s in (1, 1, 2)]
    starts = [np.concatenate([part.starts for part in plan.parts]).tolist() for plan in plans]
    assert starts[0] == starts[1] != starts[2]
