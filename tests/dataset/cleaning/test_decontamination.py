"""Documents that share text with evaluation files are found, and no others."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.cleaning.decontamination import EvaluationTexts
from colossal_llama.dataset.cleaning.units import TextUnits
from colossal_llama.errors import DataError


def cut(text):
    units = TextUnits(text)
    return [units.excerpt(number, 1) for number in range(len(units.starts))]


def runs(text, n=13):
    units = cut(text)
    return {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}


@pytest.fixture(scope="session", params=["zh", "en"])
def corpus(request, corpora):
    return corpora[request.param]


def test_real_documents_are_those_that_share_13_units(corpus, write_lines):
    evaluation, documents = corpus[::10], corpus[1::10]
    texts = EvaluationTexts([write_lines([{"text": text} for text in evaluation])])
    known = set.union(*map(runs, evaluation))
    expected = [not known.isdisjoint(runs(text)) for text in documents]
    assert [texts.find(TextUnits(text)) is not None for text in documents] == expected
    assert 0.02 < np.mean(expected) < 0.7


def test_13_units_of_a_test_are_found_and_12_are_not(corpus, write_lines):
    rng = np.random.default_rng(0)
    evaluation, documents = corpus[0:60:2], corpus[1:61:2]
    texts = EvaluationTexts([write_lines([{"text": text} for text in evaluation])])
    tried = 0
    for test, document in zip(evaluation, documents, strict=True):
        units = cut(test)
        if len(units) < 20 or texts.find(TextUnits(document)):
            continue
        start = int(rng.integers(len(units) - 13))
        place = int(rng.integers(len(document)))
        for n, contaminated in [(12, False), (13, True)]:
            leaked = " ,".join(units[start : start + n]).upper()
            # What stands around it must not make it longer.
            text = f"{document[:place]} qqqq {leaked} qqqq {document[place:]}"
            assert (texts.find(TextUnits(text)) is not None) == contaminated
        tried += 1
    assert tried > 10


QUESTION = "How many apples are left, if Tom eats one of his three?"


@pytest.mark.parametrize(
    ("test", "document", "found"),
    [
        (QUESTION, f"Some say: {QUESTION.upper().replace(',', ' --')} Two.", True),
        (QUESTION, QUESTION.replace("apples", "pears"), False),
        (
            "one two three four five six seven eight",
            "0 One, two three four five six SEVEN eight.",
            True,
        ),
        ("one two three four five six seven eight", "one two three four five six seven", False),
        ("one two three four five six seven", "one two three four five six seven", None),
        ("一二三四五六七八九十百千萬", "他說：「一二三四五，六七八九十百千萬」", True),
        ("一二三四五六七八九十百千", "一二三四五六七八九十百千", None),
    ],
)
def test_short_texts_are_looked_for_as_a_whole(test, document, found, write_lines):
    """``None``: the text is too short to be looked for at all."""
    path = write_lines([{"question": test}])
    if found is None:
        with pytest.raises(DataError, match="no text of 8 words or more"):
            EvaluationTexts([path])
        path = write_lines([{"question": test, "more": "a b c d e f g h i j k l m n"}])
        assert EvaluationTexts([path]).ignored == 1
    assert bool(EvaluationTexts([path]).find(TextUnits(document))) == bool(found)


def test_every_string_of_every_kind_of_file_is_read(tmp_path, write_lines):
    long = [f"{word} one two three four five six seven" for word in "abcdefg"]
    plain = write_lines(
        [
            {"id": "x-1", "a": long[0], "b": {"c": [long[1], {"d": long[2]}]}},
            {"n": 3, "e": [[long[3]]]},
        ]
    )
    packed = tmp_path / "packed.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": long[4]}) + "\n")
    text = tmp_path / "text.txt"
    wrapped = "wrapped lines\nthat go on\nfrom one to\nthe next\none until\nthirteen"
    text.write_text(f"{long[5]}\r\n\n{wrapped}\n", encoding="utf-8")
    texts = EvaluationTexts([plain, packed, text])
    owners = [plain] * 4 + [packed, text]
    for test, owner in zip(long, owners, strict=False):
        assert texts.find(TextUnits(f"so: {test}!")) == f"{test!r} is in {owner}"
    assert str(text) in texts.find(TextUnits(wrapped.replace("\n", " ")))
    assert texts.find(TextUnits(long[6])) is None
    assert texts.find(TextUnits("id a b c d e question text n")) is None


def test_bad_files_are_named(tmp_path, write_lines):
    broken = write_lines([{"a": "b"}, "{"], "broken.jsonl")
    with pytest.raises(DataError, match=r"broken\.jsonl:2: not JSON"):
        EvaluationTexts([broken])
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        EvaluationTexts([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="no text of 8 words or more"):
        EvaluationTexts([write_lines([{"answer": "A"}], "short.jsonl")])


@given(
    st.lists(st.text(st.sampled_from("ab中 ."), max_size=40), max_size=6),
    st.text(st.sampled_from("ab中 ."), max_size=60),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_texts(tmp_path_factory, tests, document):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    tests = [*tests, "c d e f g h i j"]
    path.write_text(json.dumps({"tests": tests}) + "\n", encoding="utf-8")
    expected = any(
        not runs(test, n).isdisjoint(runs(document, n))
        for test in tests
        if (n := min(len(cut(test)), 13)) >= (13 if TextUnits(test).unspaced else 8)
    )
    assert (EvaluationTexts([path]).find(TextUnits(document)) is not None) == expected
