"""Finds documents that share text with evaluation files.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: a document of the training
set collides with a test set if they share 13 words in a row, apart from case and punctuation.
There only the surroundings of a collision were cut out of the document, and 13-grams that are
frequent in the training set were ignored. Here a document with one collision is excluded: simple
to explain, and strict with long documents that quote what a test set quotes as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama.dataset.cleaning.units import HashIndex, TextUnits, ngrams
from colossal_llama.errors import DataError
from colossal_llama.storage import find_files, read_jsonl, read_lines

NGRAM = 13  # units; the largest N of Brown et al.
SHORTEST = 8  # units; their smallest N, "due to spurious collisions at lower values"
_LONGEST_EXCERPT = 80  # characters
EVALUATION_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


class EvaluationTexts:
    """Every 13-gram of evaluation files, and every text of 8 to 12 units as a whole.

    Where a text is in a script without spaces, units are characters, and 13 of them are about 8
    words: shorter ones ("中华人民共和国国务院") are names as often as test items, and are ignored.

    Attributes:
        ignored: how many texts were too short to be looked for.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Reads .jsonl and .jsonl.gz (every string in a line is a text) and .txt files.

        A .txt file is one text, in which n-grams run across lines; its lines are texts as well.

        Raises:
            DataError: a file cannot be read, or none holds a text that is long enough.
        """
        self._files = find_files(paths, EVALUATION_SUFFIXES)
        self.ignored = 0
        grams: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        for owner, file in enumerate(self._files):
            for text in _texts(file):
                found = self._grams(TextUnits(text))
                if found is not None:
                    n, hashes = found
                    grams.setdefault(n, []).append(hashes)
                    owners.setdefault(n, []).append(np.full(len(hashes), owner))
        if not grams:
            names = ", ".join(map(str, self._files))
            raise DataError(f"{names}: no text of {SHORTEST} words or more to look for")
        self._index = {
            n: HashIndex(np.concatenate(grams[n]), np.concatenate(owners[n]))
            for n in sorted(grams, reverse=True)
        }

    def find(self, text: TextUnits) -> str | None:
        """The first text that ``text`` shares with a file and the file's name, or None."""
        for n, index in self._index.items():
            found = index.find(ngrams(text.hashes, n))
            if found:
                place, owner = found
                shared = " ".join(text.excerpt(place, n).split())
                if len(shared) > _LONGEST_EXCERPT:
                    shared = shared[:_LONGEST_EXCERPT] + "..."
                return f"{shared!r} is in {self._files[owner]}"
        return None

    def _grams(self, text: TextUnits) -> tuple[int, np.ndarray] | None:
        """(n, hashes of the n-grams to look for), None for a text that is too short."""
        shortest = NGRAM if text.unspaced else SHORTEST
        n = min(len(text.hashes), NGRAM)
        if n < shortest:
            self.ignored += 1
            return None
        return n, ngrams(text.hashes, n)


def _texts(file: Path) -> Iterator[str]:
    if file.suffix == ".txt":
        lines = [line for _, line in read_lines(file)]
        yield "".join(lines)
        yield from lines
        return
    for _, record in read_jsonl(file):
        yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys apart, in order."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)
