"""The units that n-grams of text are made of, their hashes, and sets of such hashes.

A unit is a run of letters, marks and digits; in a script that is written without spaces (Han,
Kana, Thai, ...) every character is one. Case, white space and punctuation do not count:

    "The cat, 猫たち!" -> the · cat · 猫 · た · ち

Everything is computed on whole arrays: cutting the same text with a regular expression and
hashing strings takes ten times as long. The hashes depend on the text alone, not on the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, cached_property

import numpy as np

from colossal_llama.tokenizer.unicode_scripts import WITHOUT_SPACES

# What a character is: bits of an entry of the table of all characters.
UNIT, ALONE, LETTER, SPACE, HANGUL, UNENDING = 1, 2, 4, 8, 16, 32

# Scripts without spaces between words that have no mark for the end of a sentence either.
_WITHOUT_STOPS = ("Thai", "Lao", "Tibetan")

_CHARACTERS = 0x110000
# Odd 64-bit numbers without a pattern: the bases of the polynomials that are the hashes.
_CHARACTER_BASE = 0x9E3779B97F4A7C15
_UNIT_BASE = 0xD6E8FEB86659FD93


class TextUnits:
    """One text and what stages of cleaning ask of it, each computed once, when first asked for.

    Attributes:
        text: the text as it was given.
        folded: the text without differences of case; what follows counts its characters.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def folded(self) -> str:
        return self.text.casefold()

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points: uint32 [characters]."""
        return code_points(self.folded)

    @cached_property
    def kinds(self) -> np.ndarray:
        """Bits of UNIT, LETTER, ...: uint8 [characters]."""
        return _table()[self.codes]

    @cached_property
    def letters(self) -> int:
        """How many characters are letters."""
        return self.count(LETTER)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where units start, in characters of ``folded``: int64 [units]."""
        inside = (self.kinds & UNIT).view(np.bool_)
        alone = (self.kinds & ALONE).astype(np.bool_)
        begins = inside.copy()
        begins[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
        return np.flatnonzero(begins)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters in each unit: int64 [units]."""
        inside = np.cumsum(self.kinds & UNIT, dtype=np.int64)  # characters in units up to here
        return np.diff(inside[self.starts] - 1, append=inside[-1:])

    @cached_property
    def hashes(self) -> np.ndarray:
        """A hash of each unit: uint64 [units].

        The polynomial of its code points modulo 2^64, with its bits mixed.
        """
        if not len(self.starts):
            return np.zeros(0, dtype=np.uint64)
        codes = self.codes[(self.kinds & UNIT).view(np.bool_)]
        starts = np.cumsum(self.lengths) - self.lengths
        position = np.arange(len(codes)) - np.repeat(starts, self.lengths)
        powers = _powers(_CHARACTER_BASE, int(self.lengths.max()))
        return mix(np.add.reduceat(codes * powers[position], starts))

    @cached_property
    def unspaced(self) -> bool:
        """Whether more than half of the units are characters of scripts without spaces."""
        return 2 * self.count(ALONE) > len(self.starts)

    def count(self, kind: int) -> int:
        """How many characters have a bit of ``kind``."""
        return int(np.count_nonzero(self.kinds & kind))

    def excerpt(self, first: int, units: int) -> str:
        """The text of ``units`` units from number ``first`` on, without differences of case."""
        last = first + units - 1
        return self.folded[self.starts[first] : self.starts[last] + self.lengths[last]]


def code_points(text: str) -> np.ndarray:
    """The code points of ``text``: uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of ``n`` (from 1 on) neighbours: uint64 [max(units - n + 1, 0)].

    The hash of neighbours h is their polynomial modulo 2^64. It is put together from the hashes
    of 1, 2, 4, ... neighbours, so a long n-gram costs little more than a short one.
    """
    if len(hashes) < n:
        return hashes[:0]
    windows = len(hashes) - n + 1
    done, result = 0, np.zeros(windows, dtype=np.uint64)
    block, size, power = hashes, 1, _UNIT_BASE
    while True:
        if n & size:
            result = result * np.uint64(power) + block[done : done + windows]
            done += size
        if done == n:
            return result
        block = block[:-size] * np.uint64(power) + block[size:]
        size, power = 2 * size, power * power % 2**64


def mix(hashes: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers in which every bit depends on every bit.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
    Generators", variant 13 of Stafford).
    """
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


class HashIndex:
    """A set of 64-bit hashes, each with a number: 12 bytes a hash and 8 to 16 for the filter.

    A table of one byte for the upper bits of a hash says "no" for nearly all that are not in
    the set; only the others are searched for.
    """

    _LARGEST_TABLE = 26  # bits: 64 MB

    def __init__(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        """Keeps, for a hash that occurs more than once, its first owner.

        Args:
            hashes: uint64 [n].
            owners: integers [n], e.g. the number of the file that a hash is from.
        """
        self._hashes, first = np.unique(hashes, return_index=True)
        self._owners = owners[first].astype(np.uint32)
        bits = min(max(8 * len(self._hashes), 2).bit_length(), self._LARGEST_TABLE)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=np.bool_)
        self._table[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, hashes: np.ndarray) -> tuple[int, int] | None:
        """The first of ``hashes`` that is in the set: (its place in ``hashes``, its owner)."""
        places = np.flatnonzero(self._table[hashes >> self._shift])
        if not len(places):
            return None
        index = np.searchsorted(self._hashes, hashes[places])
        index[index == len(self._hashes)] = 0
        found = np.flatnonzero(self._hashes[index] == hashes[places])
        if not len(found):
            return None
        return int(places[found[0]]), int(self._owners[index[found[0]]])


@cache
def script_table(scripts: tuple[str, ...]) -> np.ndarray:
    """Whether a character is a letter of the scripts: bool [code points].

    A letter that scripts share (the ー of Hiragana and Katakana) counts for each of them.
    """
    table = np.zeros(_CHARACTERS, dtype=np.uint8)
    _mark(table, rf"[[{_of_scripts(scripts)}]&&\p{{L}}]", 1)
    return table.view(np.bool_)


def word_character() -> str:
    r"""A class of regex (VERSION1) for characters of units that are longer than a character."""
    return rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_of_scripts(WITHOUT_SPACES)}]]"


@cache
def _table() -> np.ndarray:
    """What every character is: uint8 [code points]; made once in a process, in 0.4 s."""
    table = np.zeros(_CHARACTERS, dtype=np.uint8)
    # Variation selectors are marks, but stand behind emoji as well: not letters of anything.
    units = r"[[\p{L}\p{M}\p{N}]--[\uFE00-\uFE0F\U000E0100-\U000E01EF]]"
    _mark(table, units, UNIT)
    _mark(table, rf"[{units}&&[{_of_scripts(WITHOUT_SPACES)}]]", ALONE)
    _mark(table, rf"[{units}&&[{_of_scripts(_WITHOUT_STOPS)}]]", UNENDING)
    _mark(table, r"[\p{L}&&\p{Script=Hangul}]", HANGUL)
    _mark(table, r"\p{L}", LETTER)
    _mark(table, r"\s", SPACE)
    return table


def _mark(table: np.ndarray, characters: str, bit: int) -> None:
    """Sets ``bit`` for the characters of a class of regex."""
    import regex

    for run in regex.finditer(rf"{characters}+", _every_character(), regex.VERSION1):
        table[run.start() : run.end()] |= bit


@cache
def _every_character() -> str:
    return "".join(map(chr, range(_CHARACTERS)))


def _of_scripts(scripts: Iterable[str]) -> str:
    return "".join(rf"\p{{Script={name}}}\p{{Script_Extensions={name}}}" for name in scripts)


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64: uint64 [count]."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
