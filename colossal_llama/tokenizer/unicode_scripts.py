"""Text and pieces of chosen Unicode scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

# Scripts whose words are told apart in text of any script; letters of all others count as one.
_SPACED = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Hangul", "Armenian", "Georgian"),
    *("Devanagari", "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati", "Gurmukhi"),
    *("Sinhala", "Ethiopic", "Mongolian"),
)
_UNSPACED: tuple[tuple[str, ...], ...] = (
    ("Han", "Hiragana", "Katakana", "Bopomofo"),
    *(("Thai",), ("Lao",), ("Khmer",), ("Myanmar",), ("Tibetan",)),
)

# Scripts that write without spaces between words: a space before one belongs to no word.
WITHOUT_SPACES = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Tangut", "Nushu"),
    *("Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese", "Balinese", "Tai_Tham"),
)


def is_script(name: str) -> bool:
    """Whether ``name`` is a Unicode script such as Han, Hangul or Cyrillic."""
    import regex

    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        return False
    return True


@dataclass(frozen=True)
class ScriptFilter:
    """Words of some scripts, and non-ASCII punctuation (，, 《), which has no script.

    A word may start with one space where its script puts spaces between words: "▁мир", but
    "你好". Every piece of such a word holds a character of the scripts, or is that space, so none
    can change how a text in another script is segmented.
    """

    run: Any  # a compiled regex: one word, or neighbouring punctuation
    piece: Any  # likewise: words and punctuation in any order

    def cut(self, text: str) -> str:
        """The runs of ``text`` that belong to the scripts, a line each; spaces as spaces."""
        return "\n".join(self.run.findall(text))

    def allows(self, text: str) -> bool:
        """Whether ``text``, with spaces as spaces, can be a piece."""
        return self.piece.fullmatch(text) is not None


def script_filter(scripts: Sequence[str]) -> ScriptFilter | None:
    """The filter for some scripts; None, no restriction, for none.

    A letter that several scripts share (the ー of Hiragana and Katakana) counts for each.
    """
    import regex

    if not scripts:
        return None
    without = {name.lower() for name in WITHOUT_SPACES}
    spaced = _letters(name for name in scripts if name.lower() not in without)
    others = _letters(name for name in scripts if name.lower() in without)
    marks = r"\p{Script=Inherited}"
    words = [
        f"{space}[{letters}][{letters}{marks}]*"
        for space, letters in ((" ?", spaced), ("", others))
        if letters
    ]
    shared = rf"[[\p{{Script=Common}}{marks}]&&\p{{Punctuation}}--[\x00-\x7f]]"
    space = f"(?: (?=[{spaced}]))?" if spaced else ""
    piece = f"{space}(?:[{spaced}{others}][{spaced}{others}{marks}]*|{shared})+"
    return ScriptFilter(
        regex.compile("|".join([*words, f"{shared}+"]), regex.VERSION1),
        regex.compile(piece, regex.VERSION1),
    )


def cut_words(text: str) -> str:
    """The words of ``text``, a line each: a run of one script, or of punctuation and symbols, with
    the space before it, as SentencePiece's trainer cuts; digits, which it never merges, left out.
    """
    return "\n".join(_every_word().findall(text))


@cache
def _every_word() -> Any:
    import regex

    spaced = [_letters([name]) for name in _SPACED]
    unspaced = [_letters(names) for names in _UNSPACED]
    others = rf"\p{{L}}--[{''.join([*spaced, *unspaced])}]"
    words = [rf" ?[{letters}][{letters}\p{{M}}]*" for letters in spaced]
    words += [rf"[{letters}][{letters}\p{{M}}]*" for letters in unspaced]
    words += [rf" ?[{others}][[{others}]\p{{M}}]*", r" ?[^\s\p{L}\p{N}]+"]
    return regex.compile("|".join(words), regex.VERSION1)


def _letters(scripts: Iterable[str]) -> str:
    return "".join(
        rf"\p{{Script={name}}}[\p{{Script_Extensions={name}}}&&\p{{L}}]" for name in scripts
    )
