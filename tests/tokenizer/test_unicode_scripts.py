"""Words and pieces of a script: nothing of another one in them."""

from __future__ import annotations

import unicodedata

import pytest

from colossal_llama.tokenizer.unicode_scripts import cut_words, is_script, script_filter

TEXT = "使用Python编程 的 hello, мир！「カード」12 안녕 สวัสดี a\u0301b"


def test_names() -> None:
    assert is_script("Han")
    assert is_script("cyrillic")
    assert not is_script("Hann")
    assert script_filter([]) is None


@pytest.mark.parametrize(
    ("scripts", "runs"),
    [
        (["Han"], ["使用", "编程", "的", "！「", "」"]),
        (["Cyrillic"], [" мир", "！「", "」"]),
        (["Katakana"], ["！「", "カード", "」"]),
        (["Latin"], ["Python", " hello", "！「", "」", " a\u0301b"]),
        (["Han", "Cyrillic"], ["使用", "编程", "的", " мир", "！「", "」"]),
    ],
)
def test_runs_of_scripts(scripts: list[str], runs: list[str]) -> None:
    """A space goes with the word where the script has spaces between words."""
    found = script_filter(scripts)
    assert found is not None
    assert found.cut(TEXT).split("\n") == runs
    assert all(found.allows(run) for run in runs)


@pytest.mark.parametrize("piece", ["a", "你a", " 你", " ", "，a", "\u0301", " ，", "", "1", "."])
def test_what_is_no_piece_of_han(piece: str) -> None:
    found = script_filter(["Han"])
    assert found is not None
    assert not found.allows(piece)


def test_a_space_alone_or_before_punctuation_is_no_piece() -> None:
    found = script_filter(["Cyrillic"])
    assert found is not None
    assert found.allows(" мир，")
    assert not any(map(found.allows, (" ", " ，", "  мир", "мир ", "ми р")))


def test_words_of_all_scripts(english: list[str]) -> None:
    """Every character stays but spaces and digits; one script and at most one space a word."""
    assert cut_words(TEXT).split("\n")[:6] == ["使用", "Python", "编程", "的", " hello", ","]
    for text in [TEXT, *english[:20]]:
        words = cut_words(text).split("\n")
        kept = "".join(words).replace(" ", "")
        assert kept == "".join(c for c in text if not c.isspace() and not c.isnumeric())
        for word in words:
            assert " " not in word[1:]
            names = [unicodedata.name(c) for c in word if unicodedata.category(c) < "M"]
            assert len({name.split()[0].split("-")[0] for name in names}) < 2, word
