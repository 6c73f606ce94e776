"""Published rules that tell prose from other text, as verdicts on whole documents.

A rule takes a document and returns why it is excluded, or None; none changes a text. Limits are
the papers' own, for web pages in English, and a value that is equal to a limit is kept.

In text that is mostly in scripts without spaces (Chinese, Japanese, Thai, ...) "words" are
characters, and the rules on the length and the letters of words do not apply.

The sources:

- Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
  arXiv:2112.11446, appendix A.1.1: ``gopher``, ``gopher_english`` and, with its table A1,
  ``gopher_repetition``.
- Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
  Transformer", JMLR 21, section 2.2: ``c4``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from colossal_llama.dataset.cleaning.units import HANGUL, LETTER, SPACE, UNENDING, TextUnits, ngrams

Rule = Callable[[TextUnits], str | None]

# Gopher, "Quality Filtering".
WORDS = (50, 100_000)
MEAN_WORD_LENGTH = (3, 10)  # characters
MOST_SYMBOLS = 0.1  # of each of # and the ellipsis, per word
MOST_BULLETS = 0.9  # share of lines
MOST_ELLIPSES = 0.3  # share of lines
LEAST_ALPHABETIC = 0.8  # share of words
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
LEAST_STOP_WORDS = 2
# The paper names no characters; these are RedPajama's, and those of plain text.
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "●", "·", "-", "*")
ELLIPSES = ("...", "…")

# Gopher, table A1: the largest share that is kept.
DUPLICATE_LINES = 0.30
DUPLICATE_PARAGRAPHS = 0.30
CHARACTERS_IN_DUPLICATE_LINES = 0.20
CHARACTERS_IN_DUPLICATE_PARAGRAPHS = 0.20
CHARACTERS_IN_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
CHARACTERS_IN_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# C4: the numbers of the paper and of its code. Some descriptions of it have them the other way.
C4_SENTENCES = 3
C4_WORDS_IN_LINE = 5
C4_ENDS = (".", "?", "!", '"')
C4_POLICIES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


def gopher(text: TextUnits) -> str | None:
    """Gopher's quality rules that hold for any language.

    The number and the mean length of words, # and ellipses per word, lines that start with a
    bullet or end with an ellipsis, and the share of words with a letter. Words are what white
    space separates. The mean length is also not asked of Korean, which writes two or three
    letters as one character; without spaces, neither is the share of words with a letter.
    """
    words = _words(text)
    if not WORDS[0] <= words <= WORDS[1]:
        return f"words: {words} not in {WORDS[0]}-{WORDS[1]}"
    return _too_symbolic(text, words) or _too_listed(text) or _odd_words(text, words)


def gopher_english(text: TextUnits) -> str | None:
    """Gopher's test of English: two different ones of eight frequent words."""
    found = set(re.findall(r"[a-z]+", text.folded)).intersection(STOP_WORDS)
    if len(found) < LEAST_STOP_WORDS:
        return f"frequent English words: {len(found)} < {LEAST_STOP_WORDS}"
    return None


def gopher_repetition(text: TextUnits) -> str | None:
    """Gopher's rules on repeated lines, paragraphs and n-grams.

    A duplicate is an occurrence after the first. Words are units (see ``units``), and characters
    are those in units, so that punctuation and white space count on neither side of a share.
    An n-gram that occurs once is no repetition, however short the document is.
    """
    paragraphs = [part for part in re.split(r"\n\s*\n", text.text.strip()) if part]
    return (
        _repeated_parts("lines", _lines(text), DUPLICATE_LINES, CHARACTERS_IN_DUPLICATE_LINES)
        or _repeated_parts(
            "paragraphs", paragraphs, DUPLICATE_PARAGRAPHS, CHARACTERS_IN_DUPLICATE_PARAGRAPHS
        )
        or _too_much_of_one(text)
        or _too_much_again(text)
    )


def c4(text: TextUnits) -> str | None:
    """The documents of which C4 keeps nothing: the same verdict, but kept documents stay whole.

    C4 discards a page with "lorem ipsum", with a curly bracket, or with fewer than 3 sentences
    in the lines that it keeps. It keeps the lines of 5 words or more that end with a full stop,
    question or exclamation mark or quotation mark, and that mention neither JavaScript nor a
    policy. Lines that C4 would cut out of a kept page are not cut out here. Its list of bad words
    is ``--blocklist_file``.

    Sentences also end with the marks of other scripts (。, ।, ؟, ...). Thai, Lao and Tibetan have
    none: there sentences are not counted.
    """
    if "lorem ipsum" in text.folded:
        return "holds 'lorem ipsum'"
    if "{" in text.text:
        return "holds a curly bracket"
    if 2 * text.count(UNENDING) > len(text.starts):
        return None
    sentences = 0
    for line in _c4_lines(text):
        sentences += max(1, len(_sentence_end().findall(line)))
        if sentences >= C4_SENTENCES:
            return None
    return f"sentences in complete lines: {sentences} < {C4_SENTENCES}"


# Sets of rules by name, in the order in which they are applied.
RULES: dict[str, Rule] = {
    "gopher": gopher,
    "gopher_english": gopher_english,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
}


def _words(text: TextUnits) -> int:
    return len(text.starts) if text.unspaced else len(_spaced_words(text))


def _spaced_words(text: TextUnits) -> np.ndarray:
    """Where the words that white space separates start, in characters: int64 [words]."""
    ink = (text.kinds & SPACE) == 0
    begins = ink.copy()
    begins[1:] &= ~ink[:-1]
    return np.flatnonzero(begins)


def _too_symbolic(text: TextUnits, words: int) -> str | None:
    hashes = text.text.count("#") / words
    ellipses = sum(map(text.text.count, ELLIPSES)) / words
    return _over("# per word", hashes, MOST_SYMBOLS) or _over(
        "ellipses per word", ellipses, MOST_SYMBOLS
    )


def _too_listed(text: TextUnits) -> str | None:
    lines = _lines(text)
    bullets = _share(sum(line.startswith(BULLETS) for line in lines), len(lines))
    ellipses = _share(sum(line.endswith(ELLIPSES) for line in lines), len(lines))
    return _over("lines with bullets", bullets, MOST_BULLETS) or _over(
        "lines that end with an ellipsis", ellipses, MOST_ELLIPSES
    )


def _odd_words(text: TextUnits, words: int) -> str | None:
    if text.unspaced:
        return None
    length = (len(text.codes) - text.count(SPACE)) / words
    low, high = MEAN_WORD_LENGTH
    korean = 2 * text.count(HANGUL) > text.letters
    if not korean and not low <= length <= high:
        return f"mean word length: {length:.3g} not in {low}-{high}"
    letters = (text.kinds & LETTER).astype(np.bool_)
    alphabetic = int(np.logical_or.reduceat(letters, _spaced_words(text)).sum()) / words
    if alphabetic < LEAST_ALPHABETIC:
        return f"words with a letter: {alphabetic:.3g} < {LEAST_ALPHABETIC}"
    return None


def _repeated_parts(name: str, parts: Sequence[str], most: float, most_chars: float) -> str | None:
    """Why lines or paragraphs are repeated too often, by their number or their characters."""
    distinct = set(parts)
    repeated = _share(len(parts) - len(distinct), len(parts))
    total = sum(map(len, parts))
    characters = _share(total - sum(map(len, distinct)), total)
    return _over(f"duplicate {name}", repeated, most) or _over(
        f"characters in duplicate {name}", characters, most_chars
    )


def _over(what: str, value: float, most: float) -> str | None:
    # A quotient of integers is rounded as the literal of the limit is: equal means equal.
    return f"{what}: {value:.3g} > {most}" if value > most else None


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _too_much_of_one(text: TextUnits) -> str | None:
    """Why the most frequent 2-, 3- or 4-gram covers too many characters.

    Of n-grams that are equally frequent, the longest counts.
    """
    total = int(text.lengths.sum())
    frequency = len(text.lengths)
    for n, most in CHARACTERS_IN_TOP_NGRAM.items():
        if len(text.lengths) < n:
            return None
        sizes = _window_sums(text.lengths, n)
        # No n-gram is more frequent than the shorter ones in it, and none covers more than its
        # occurrences side by side: where that stays below the limit, no need to look closer.
        if frequency * int(sizes.max()) / total <= most:
            continue
        grams = ngrams(text.hashes, n)
        frequency, places = _most_frequent(grams, sizes)
        if frequency < 2:
            return None
        covered = _covered(text.lengths, places, n) / total
        if covered > most:
            return _over(f"characters in the top {n}-gram", covered, most)
    return None


def _too_much_again(text: TextUnits) -> str | None:
    """Why n-grams that occurred before cover too many characters.

    What a repeated n-gram covers, repeated shorter ones cover as well: once the share is below
    the limits of all longer n-grams, the document is kept.
    """
    total = int(text.lengths.sum())
    for n, most in CHARACTERS_IN_DUPLICATE_NGRAMS.items():
        covered = _share(_covered(text.lengths, _repeats(ngrams(text.hashes, n)), n), total)
        if covered > most:
            return _over(f"characters in duplicate {n}-grams", covered, most)
        if covered <= min(CHARACTERS_IN_DUPLICATE_NGRAMS.values()):
            return None
    return None


def _most_frequent(grams: np.ndarray, sizes: np.ndarray) -> tuple[int, np.ndarray]:
    """(How often the most frequent n-gram occurs, where), the longest of several."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    counts = np.diff(starts, append=len(ordered))
    frequency = int(counts.max())
    most = starts[counts == frequency]
    top = most[np.argmax(sizes[order[most]])]
    return frequency, order[top : top + frequency]


def _repeats(grams: np.ndarray) -> np.ndarray:
    """The places of n-grams that occurred before: int64 [repeats]."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    return order[1:][ordered[1:] == ordered[:-1]]


def _covered(lengths: np.ndarray, places: np.ndarray, n: int) -> int:
    """Characters of the units that n-grams at ``places`` (no place twice) are made of."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    edges[places] += 1
    edges[places + n] -= 1
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())


def _window_sums(values: np.ndarray, n: int) -> np.ndarray:
    """Sums of all runs of ``n`` neighbours."""
    sums = np.cumsum(values)
    return sums[n - 1 :] - np.append(0, sums[:-n])


def _c4_lines(text: TextUnits) -> Iterator[str]:
    """The lines that C4 keeps, without marks of citations."""
    for line in _lines(text):
        if line.endswith("]"):
            line = _CITATION.sub("", line).rstrip()
        folded = line.casefold()
        if (
            _ends_sentence().search(line[-9:])
            and not line.endswith(ELLIPSES)
            and (len(line) if text.unspaced else len(line.split())) >= C4_WORDS_IN_LINE
            and "javascript" not in folded
            and not any(policy in folded for policy in C4_POLICIES)
        ):
            yield line


def _lines(text: TextUnits) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line for line in map(str.strip, text.text.splitlines()) if line]


# Closing quotation marks and brackets, which may follow the end of a sentence.
_CLOSING = r"[\"'\p{Pe}\p{Pf}]"


@cache
def _ends_sentence() -> Any:
    """Finds the end of a line that C4 keeps, or of one in another script that it would keep."""
    import regex

    ends = regex.escape("".join(C4_ENDS), special_only=False)
    return regex.compile(rf"[{ends}”’」』]$|[\p{{STerm}}--[\x00-\x7f]]{_CLOSING}*$", regex.VERSION1)


@cache
def _sentence_end() -> Any:
    """Finds the ends of sentences: a mark before a space or the end, or one of CJK, anywhere."""
    import regex

    # Only from the first mark of a run: from each of many, it would take the square of the time.
    return regex.compile(
        rf"(?<!\p{{STerm}})\p{{STerm}}++{_CLOSING}*+(?=\s|$)|[。！？｡]+{_CLOSING}*", regex.VERSION1
    )
