"""Rows of a part as text: what carries loss, where documents begin, special tokens as they are."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import NamedTuple

from colossal_llama.dataset.arrow_rows import ArrowRows
from colossal_llama.dataset.inspection.figures import plural, share
from colossal_llama.dataset.manifest import Part
from colossal_llama.dataset.tokenization import text_tokenizer
from colossal_llama.dataset.writer import ARROW_FILE, IGNORE_INDEX
from colossal_llama.errors import DataError, UsageError
from colossal_llama.tokenizer.analysis_format import percent, visible

# Escape sequences of a text must not reach the terminal; tabs and line ends may.
_CONTROLS: dict[int, int | str] = {
    code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"
}
_CONTROLS |= {0x7F: 0x2421} | {code: f"<U+{code:04X}>" for code in range(0x80, 0xA0)}
_REPLACEMENT = "\ufffd"  # what decoding makes of half a character
_MOST_BYTES = 4  # of a character in UTF-8


class Stretch(NamedTuple):
    """Neighbouring tokens of one document that are alike, as text; or ``hidden`` of them.

    Control characters, except tabs and line ends, are signs that one can see.
    """

    text: str
    loss: bool = False
    special: bool = False
    hidden: int = 0


class ShownDocument(NamedTuple):
    """A document of a row, or a piece of one: its place from 1, tokens, what is shown of it."""

    number: int
    tokens: int
    stretches: list[Stretch]


class ShownRow(NamedTuple):
    """A row: its number in the part, its figures, and the documents of which something shows."""

    number: int
    category: str
    tokens: int
    loss_tokens: int
    documents: int
    shown: list[ShownDocument]


class Decoder:
    """Ids to text, exactly as they read inside a row."""

    def __init__(self, tokenizer_dir: Path, vocabulary_size: int) -> None:
        from tokenizers import Tokenizer

        tokenizer = text_tokenizer(tokenizer_dir)
        self.vocabulary_size = vocabulary_size
        self._backend = Tokenizer.from_str(tokenizer.json)
        added = self._backend.get_added_tokens_decoder()
        self._special = {key for key, token in added.items() if token.special}
        self._anchor = tokenizer.bos_id
        self._anchor_text = self._decode([self._anchor])

    def is_special(self, token: int) -> bool:
        return token in self._special

    def text(self, ids: list[int]) -> str:
        """The text of neighbouring ids of a row.

        Decoders treat the start of a text in their own way (SentencePiece's drops a space): with
        bos in front, no stretch is such a start.
        """
        text = self._decode([self._anchor, *ids])
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


def open_part(directory: Path, part: Part) -> ArrowRows:
    """The rows of a part; each is read when it is asked for.

    Raises:
        DataError: they are not those of the manifest.
    """
    rows = ArrowRows(directory / ARROW_FILE)
    if len(rows) != part.rows:
        raise DataError(
            f"{rows.path}: {len(rows)} rows, the manifest says {part.rows}; prepare the dataset "
            "again"
        )
    return rows


def choose(name: str, rows: int, count: int, first: int, seed: int | None) -> list[int]:
    """The numbers of ``count`` rows of ``rows``: from ``first`` on, or drawn at random.

    Raises:
        UsageError: the part ``name`` has no row ``first``.
    """
    if seed is not None:
        return sorted(random.Random(seed).sample(range(rows), min(count, rows)))
    if first >= rows:
        raise UsageError([f"--first {first}: {name} has rows 0 to {rows - 1}"])
    return list(range(first, min(first + count, rows)))


def show_row(rows: ArrowRows, number: int, decoder: Decoder, limit: int) -> ShownRow:
    """Row ``number`` of a part, with at most about ``limit`` tokens (0: all).

    Raises:
        DataError: the row is damaged.
    """
    row = rows.row(number)
    ids = row["input_ids"].tolist()
    loss = (row["labels"] != IGNORE_INDEX).tolist()
    wrong = next((key for key in ids if not 0 <= key < decoder.vocabulary_size), None)
    if wrong is not None:
        raise DataError(
            f"{rows.path}: row {number} has the id {wrong}, the tokenizer has "
            f"{decoder.vocabulary_size}; the file was changed: prepare the dataset again"
        )
    head, tail = _cut(ids, limit, decoder)
    shown: list[ShownDocument] = []
    stop = 0
    for place, length in enumerate(row["document_lengths"].tolist(), 1):
        start, stop = stop, stop + length
        stretches = _stretches(ids, loss, start, min(stop, head), decoder)
        if start < head <= stop and head < tail:
            stretches.append(Stretch("", hidden=tail - head))
        stretches += _stretches(ids, loss, max(start, tail), stop, decoder)
        if stretches:
            shown.append(ShownDocument(place, length, stretches))
    documents = len(row["document_lengths"])
    return ShownRow(number, row["category"], len(ids), sum(loss), documents, shown)


def title(row: ShownRow) -> str:
    """What is said of a row above its text."""
    return (
        f"row {row.number} · {visible(row.category)} · {plural(row.tokens, 'token')}, "
        f"{row.loss_tokens:,} with loss ({percent(share(row.loss_tokens, row.tokens))}) · "
        f"{plural(row.documents, 'document')}"
    )


def document_title(document: ShownDocument) -> str:
    """What is said of a document above its text."""
    return f"document {document.number} · {plural(document.tokens, 'token')}"


def _cut(ids: list[int], limit: int, decoder: Decoder) -> tuple[int, int]:
    """(end of what is shown in front, start of what is shown behind), never inside a character."""
    if not limit or len(ids) <= limit:
        return len(ids), len(ids)
    head, tail = limit - limit // 2, len(ids) - limit // 2
    for end in range(head, min(head + _MOST_BYTES, tail)):
        if not decoder.text(ids[:end]).endswith(_REPLACEMENT):
            head = end
            break
    for start in range(tail, max(tail - _MOST_BYTES, head), -1):
        if not decoder.text(ids[start:]).startswith(_REPLACEMENT):
            tail = start
            break
    return head, tail


def _stretches(
    ids: list[int], loss: list[bool], start: int, stop: int, decoder: Decoder
) -> list[Stretch]:
    """The tokens from ``start`` to ``stop``, alike ones decoded together.

    A character may be spelled by several tokens: one by one they would not be text.
    """

    def kind(place: int) -> tuple[bool, bool]:
        return loss[place], decoder.is_special(ids[place])

    return [
        Stretch(decoder.text([ids[place] for place in places]).translate(_CONTROLS), *alike)
        for alike, places in itertools.groupby(range(start, stop), kind)
    ]
