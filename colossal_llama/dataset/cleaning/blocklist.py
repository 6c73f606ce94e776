"""Words and phrases that no document may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama.dataset.cleaning.units import HashIndex, TextUnits, ngrams, word_character
from colossal_llama.errors import DataError
from colossal_llama.storage import read_lines


class Blocklist:
    """Finds words and phrases in texts, whatever their case.

    A phrase is found as its units (see ``units``), whatever space and punctuation stands between
    them: as whole words, in scripts without spaces anywhere. A phrase that holds signs of its own
    (c++, f**k, 🖕) is found as it is written, not in the middle of a word.
    """

    def __init__(self, path: Path) -> None:
        """Reads a file of one word or phrase a line.

        Raises:
            DataError: it cannot be read, or holds none.
        """
        self._phrases = [" ".join(line.split()) for _, line in read_lines(path) if line.strip()]
        if not self._phrases:
            raise DataError(f"{path}: no word in it; give one word or phrase a line")
        plain: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._signed: list[tuple[str, Any, str]] = []
        for number, phrase in enumerate(self._phrases):
            units = TextUnits(phrase)
            written = units.folded.replace(" ", "")
            if len(written) == units.lengths.sum():
                n = len(units.hashes)
                plain.setdefault(n, []).append((number, ngrams(units.hashes, n)))
            else:
                self._signed.append((units.folded, _as_written(units.folded), phrase))
        self._plain = {
            n: HashIndex(
                np.concatenate([gram for _, gram in found]),
                np.array([number for number, _ in found]),
            )
            for n, found in sorted(plain.items())
        }

    def find(self, text: TextUnits) -> str | None:
        """A phrase of the list that ``text`` holds."""
        for n, index in self._plain.items():
            found = index.find(ngrams(text.hashes, n))
            if found:
                return self._phrases[found[1]]
        for folded, pattern, phrase in self._signed:
            # Nearly no text holds it, and a plain search is much faster.
            if folded in text.folded and pattern.search(text.folded):
                return phrase
        return None


def _as_written(folded: str) -> Any:
    import regex

    word = word_character()
    return regex.compile(
        (rf"(?<!{word})" if regex.match(word, folded[0], regex.VERSION1) else "")
        + regex.escape(folded)
        + (rf"(?!{word})" if regex.match(word, folded[-1], regex.VERSION1) else ""),
        regex.VERSION1,
    )
