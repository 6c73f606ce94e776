"""Units and their hashes: the same cut as a regular expression, equal hashes for equal units."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.cleaning.units import (
    HashIndex,
    TextUnits,
    mix,
    ngrams,
    script_table,
)
from colossal_llama.tokenizer.unicode_scripts import WITHOUT_SPACES

ALONE = "".join(rf"\p{{Script={name}}}\p{{Script_Extensions={name}}}" for name in WITHOUT_SPACES)
INSIDE = r"[\p{L}\p{M}\p{N}--[\uFE00-\uFE0F\U000E0100-\U000E01EF]]"
UNIT = regex.compile(rf"[{INSIDE}&&[{ALONE}]]|[{INSIDE}--[{ALONE}]]+", regex.VERSION1)

# Letters of several kinds beside each other, and what separates them.
MIXED = st.text(st.sampled_from("aZß1 .,\n中文あーアไท한글é\u0301\ufe0f☃"), max_size=60)


def cut(text):
    units = TextUnits(text)
    return [units.excerpt(number, 1) for number in range(len(units.starts))]


@pytest.fixture(scope="session", params=["zh", "en", "code"])
def corpus(request, corpora):
    return corpora[request.param][:120]


@given(MIXED | st.text(max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_cut_is_that_of_a_regular_expression(text):
    assert cut(text) == UNIT.findall(text.casefold())
    assert TextUnits(text).lengths.tolist() == [len(unit) for unit in cut(text)]


def test_examples():
    assert cut("The CAT, 猫たち! naïve 3½") == ["the", "cat", "猫", "た", "ち", "naïve", "3½"]
    assert cut("❤️ ... ﹏") == []
    assert cut("") == []


def test_real_text_is_cut_and_hashed_without_collisions(corpus):
    words, hashes = [], []
    for text in corpus:
        words += UNIT.findall(text.casefold())
        hashes += TextUnits(text).hashes.tolist()
    assert len(words) == len(hashes)
    pairs = set(zip(words, hashes, strict=True))
    assert len(pairs) == len(set(words)) == len(set(hashes))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 13])
def test_ngrams_are_equal_where_their_units_are(corpus, n):
    places = {}
    for text in corpus[:20]:
        units = cut(text)
        grams = ngrams(TextUnits(text).hashes, n).tolist()
        assert len(grams) == max(len(units) - n + 1, 0)
        for place, gram in enumerate(grams):
            places.setdefault(gram, set()).add(tuple(units[place : place + n]))
    assert all(len(texts) == 1 for texts in places.values())
    assert len(set.union(*places.values())) == len(places)


def test_ngrams_depend_on_the_order():
    one, other = TextUnits("a b c d e").hashes, TextUnits("a b d c e").hashes
    assert ngrams(one, 5) != ngrams(other, 5)
    assert ngrams(one, 3)[0] != ngrams(other, 3)[0]


def test_other_processes_find_the_same_hashes():
    text = "Straße 猫 3½"
    program = (
        "from colossal_llama.dataset.cleaning.units import TextUnits;"
        f"print(TextUnits({text!r}).hashes.tolist())"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": "."}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == TextUnits(text).hashes.tolist()


@given(
    st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), min_size=1, max_size=30),
    st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=30),
    st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_index_finds_what_a_dict_finds(kept, asked, mixed):
    kept, asked = np.array(kept, dtype=np.uint64), np.array(asked, dtype=np.uint64)
    if mixed:
        kept, asked = mix(kept), mix(asked)
    owners = {}
    for number, value in enumerate(kept.tolist()):
        owners.setdefault(value, number)
    expected = next(
        ((place, owners[v]) for place, v in enumerate(asked.tolist()) if v in owners), None
    )
    index = HashIndex(kept, np.arange(len(kept)))
    assert index.find(asked) == expected
    assert len(index) == len(owners)


def test_unspaced_is_a_matter_of_more_than_half_of_the_units():
    assert not TextUnits("猫犬 one two").unspaced
    assert TextUnits("猫犬鳥 one two").unspaced
    assert not TextUnits("").unspaced
    assert not TextUnits("한국어 문장").unspaced


def test_letters_of_scripts():
    han, kana = script_table(("Han",)), script_table(("Hiragana", "Katakana"))
    assert [bool(han[ord(c)]) for c in "中a。々1あ"] == [True, False, False, True, False, False]
    assert [bool(kana[ord(c)]) for c in "あアー中"] == [True, True, True, False]
