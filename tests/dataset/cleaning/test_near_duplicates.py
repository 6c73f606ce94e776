"""Duplicates: found as often as theory says, and the first of each set is kept."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.cleaning import near_duplicates
from colossal_llama.dataset.cleaning.near_duplicates import (
    BANDS,
    HASHES_IN_BAND,
    band_hashes,
    first_of_each,
    first_of_equal,
)
from colossal_llama.dataset.cleaning.units import TextUnits
from colossal_llama.dataset.records import text_hash
from colossal_llama.errors import DataError


@pytest.fixture(autouse=True)
def _needs_rensa():
    pytest.importorskip("rensa")


def cut(text):
    units = TextUnits(text)
    return [units.excerpt(number, 1) for number in range(len(units.starts))]


def shingles(units):
    return {tuple(units[i : i + 5]) for i in range(len(units) - 4)}


def similarity(one, other):
    return len(one & other) / len(one | other)


def probability(s):
    return 1 - (1 - s**HASHES_IN_BAND) ** BANDS


@pytest.mark.parametrize("name", ["zh", "en"])
def test_changed_documents_are_found_as_often_as_theory_says(corpora, name):
    """Each unit of a document is replaced with a probability that leaves s from 0.4 to 1."""
    rng = np.random.default_rng(0)
    documents = [units for text in corpora[name] if len(units := cut(text)) > 200][:200]
    expected, found = [], []
    for rate, units in zip(np.linspace(0, 0.12, len(documents)), documents, strict=True):
        changed = [u if rng.random() >= rate else f"{rng.integers(10**6)}" for u in units]
        expected.append(probability(similarity(shingles(units), shingles(changed))))
        both = band_hashes(" ".join(units)), band_hashes(", ".join(changed).upper())
        found.append(bool((both[0] == both[1]).any()))
    expected, found = np.array(expected), np.array(found)
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs(found.sum() - expected.sum()) < 3.5 * spread
    assert found[expected > 0.999].all()
    assert (expected > 0.1).mean() > 0.4
    assert (expected < 0.9).mean() > 0.3


def test_half_of_the_pairs_are_found_at_the_similarity_of_the_documentation():
    assert probability(0.685) == pytest.approx(0.5, abs=0.005)
    rows = [line.split() for line in near_duplicates.__doc__.splitlines()]
    at = next(row[1:] for row in rows if row[:1] == ["s"])
    stated = next(row[1:] for row in rows if row[:1] == ["found"])
    assert [f"{probability(float(s)):.2f}" for s in at] == stated


@pytest.mark.parametrize("name", ["zh", "en", "code"])
def test_unrelated_documents_are_not_found(corpora, name):
    documents = corpora[name]
    bands = np.stack([band_hashes(text) for text in documents])
    dropped = np.flatnonzero(~first_of_each(bands.T))
    assert len(dropped) < 0.03 * len(documents)
    for number in dropped:
        alike = np.flatnonzero((bands == bands[number]).any(axis=1))
        found = [shingles(cut(documents[other])) for other in alike]
        assert len(found) > 1
        assert max(similarity(a, b) for a in found for b in found if a is not b) > 0.4


def test_copies_among_real_documents_are_dropped_and_originals_kept(corpora):
    documents = corpora["en"][:300]
    copies = [text.upper() + " The end." for text in documents[::3]]
    order = np.random.default_rng(0).permutation(len(documents) + len(copies))
    bands = np.stack([band_hashes(text) for text in [*documents, *copies]])
    keep = first_of_each(bands[order].T)
    alone = first_of_each(bands[: len(documents)].T)
    assert keep.sum() == pytest.approx(alone.sum(), abs=1)
    place = np.argsort(order)
    for copy, original in enumerate(range(0, len(documents), 3), len(documents)):
        assert not keep[max(place[copy], place[original])]


def test_short_texts_are_like_themselves_only():
    texts = ["", " ", "one two three four", "one two three Four", "一二三四", "!?"]
    bands = np.stack([band_hashes(text) for text in texts * 2])
    assert bands.shape == (12, BANDS)
    assert bands.dtype == np.uint64
    assert first_of_each(bands.T).tolist() == [True] * 6 + [False] * 6
    assert (
        band_hashes("one two three four five") == band_hashes("One-two, three four FIVE!")
    ).all()


def test_bands_are_told_apart():
    """Equal hashes in another band, or in another order, are no sign of similarity."""
    hashes = band_hashes(" ".join(map(str, range(200))))
    assert len(set(hashes.tolist())) == BANDS


def plain_first_of_each(columns):
    parent = list(range(len(columns[0]) if columns else 0))

    def root(document):
        while parent[document] != document:
            document = parent[document]
        return document

    for column in columns:
        seen = {}
        for document, value in enumerate(column):
            first, own = root(seen.setdefault(value, document)), root(document)
            parent[max(first, own)] = min(first, own)
    return [root(document) == document for document in range(len(parent))]


@given(
    st.integers(0, 40).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 30) | st.just(2**64 - 1), min_size=n, max_size=n), max_size=5
        )
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_first_of_each_is_that_of_a_plain_union_find(columns):
    arrays = [np.array(column, dtype=np.uint64) for column in columns]
    assert first_of_each(iter(arrays)).tolist() == plain_first_of_each(columns)
    if columns:
        kept = first_of_equal(arrays[0])
        assert kept.tolist() == [value not in columns[0][:i] for i, value in enumerate(columns[0])]


@pytest.mark.parametrize("seed", range(3))
def test_many_documents_in_long_chains(seed):
    """Every document is connected to the next by one band or the other, in a random order."""
    rng = np.random.default_rng(seed)
    count = 20_000
    links = np.arange(count)
    links[:: count // 10] = links[:: count // 10] + 10**6  # cuts the chain into about ten
    shuffle = rng.permutation(count)
    columns = [(links // 2)[shuffle], ((links + 1) // 2)[shuffle]]
    columns = [column.astype(np.uint64) for column in columns]
    keep = first_of_each(columns)
    assert keep.tolist() == plain_first_of_each([column.tolist() for column in columns])
    assert 5 < keep.sum() < 40


def test_columns_stay_as_they_are():
    column = np.array([3, 1, 3, 2], dtype=np.uint64)
    column.flags.writeable = False
    assert first_of_each([column, column]).tolist() == [True, True, False, True]


def test_equal_texts_have_equal_hashes(corpora):
    documents = corpora["zh"]
    assert len({text_hash(text) for text in documents}) == len(set(documents))
    assert text_hash("a") != text_hash("A")
    hashes = np.array([text_hash(text) for text in documents[:50] * 2], dtype=np.uint64)
    assert first_of_equal(hashes).tolist() == [True] * 50 + [False] * 50


def test_a_missing_rensa_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DataError, match="pip install rensa"):
        band_hashes("text")


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_has_bands_and_always_the_same(text):
    assert (band_hashes(text) == band_hashes(text)).all()
