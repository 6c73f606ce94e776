"""A user's list of pieces: what it asks for, and every line that no tokenizer could honour."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_jsonl
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer

# How a list spells a space (U+2581), as SentencePiece does.
SPACE = "▁"

# In characters. No word is longer, and the merges of a run (=====) grow with its square.
_LONGEST = 256


@dataclass(frozen=True)
class WantedPieces:
    """What a list asks for beyond what the tokenizer has."""

    pieces: list[str]  # in the tokenizer's spelling and the list's order, each once
    symbols: list[str]  # user-defined ones, likewise
    asked_for: int
    already_there: int
    duplicates: int


@dataclass(frozen=True)
class _Line:
    where: str  # file:line
    text: str
    is_symbol: bool


def read_pieces(path: Path | None, source: ExtensibleTokenizer) -> WantedPieces:
    """Reads JSON lines of {"piece": text}, with "type": "user_defined" for a symbol.

    Without a file nothing is asked for.

    Raises:
        DataError: naming file:line, for a line that cannot be added to ``source``.
    """
    if path is None:
        return WantedPieces([], [], 0, 0, 0)
    lines = [_line(record, f"{path}:{number}") for number, record in read_jsonl(path)]
    if not lines:
        raise DataError(f'{path}: no pieces; expected lines like {{"piece": "你好"}}')
    present, old_symbols = set(source.pieces()), source.symbols()
    new_symbols = {source.spell(line.text) for line in lines if line.is_symbol}
    reserved = source.reserved() | new_symbols
    # Only a piece that holds one of their first characters can hold a reserved text.
    initials = {text[0] for text in reserved if text}
    pieces, symbols = dict[str, None](), dict[str, None]()
    already_there = duplicates = 0
    for line in lines:
        _refuse_unusable(line, source)
        piece = source.spell(line.text)
        wanted, old = (symbols, old_symbols) if line.is_symbol else (pieces, present)
        if piece in old or (not line.is_symbol and piece in old_symbols):
            already_there += 1
            continue
        if line.is_symbol and piece in present:
            raise DataError(f"{line.where}: {line.text!r} is an ordinary piece already; remove it")
        if not initials.isdisjoint(piece):
            _refuse_reserved(line, piece, reserved, old_symbols | new_symbols)
        duplicates += piece in wanted
        wanted[piece] = None
    return WantedPieces(list(pieces), list(symbols), len(lines), already_there, duplicates)


def _line(record: dict[str, Any], where: str) -> _Line:
    if "piece" not in record:
        raise DataError(f'{where}: no "piece"; expected a line like {{"piece": "你好"}}')
    piece, kind = record["piece"], record.get("type", "normal")
    if not isinstance(piece, str):
        raise DataError(f"{where}: the piece is {type(piece).__name__}, expected text")
    if kind not in ("normal", "user_defined"):
        raise DataError(f"{where}: the type is {kind!r}, expected normal or user_defined")
    return _Line(where, piece, kind == "user_defined")


def _refuse_unusable(line: _Line, source: ExtensibleTokenizer) -> None:
    problem = problem_of(line.text)
    if problem is None and not line.is_symbol:
        problem = source.problem_of(line.text)
    if problem:
        shown = line.text if len(line.text) <= 60 else line.text[:60] + "..."
        raise DataError(f"{line.where}: the piece {shown!r} {problem}")


def problem_of(piece: str) -> str | None:
    """Why ``piece`` cannot be added to any tokenizer, or None if it can."""
    if not piece:
        return "is empty"
    if len(piece) > _LONGEST:
        return f"has {len(piece)} characters, more than {_LONGEST}"
    for character in piece:
        category = unicodedata.category(character)
        if category == "Cs":
            return "holds half a surrogate pair"
        if character.isspace() or category == "Cc":
            return (
                f"holds the space or control character U+{ord(character):04X}; "
                f"a space is spelled {SPACE}"
            )
    return None


def _refuse_reserved(line: _Line, piece: str, reserved: set[str], symbols: set[str]) -> None:
    """A reserved text is cut out of the input before merging, so nothing can grow around it."""
    found = [text for text in reserved if text and text in piece]
    if line.is_symbol:  # of two symbols, one inside the other, the longer one is found
        found = [text for text in found if text not in symbols]
    if found:
        what = max(found, key=len)
        kind = "user-defined symbol" if what in symbols else "special token"
        raise DataError(
            f"{line.where}: the piece {line.text!r} holds {what!r}, which is a {kind} of this "
            "tokenizer; remove the line"
        )


def new_characters(characters: Sequence[str], source: ExtensibleTokenizer) -> list[str]:
    """Of ``characters``, in the source's spelling, those that are no piece of it.

    Raises:
        DataError: naming one that cannot be added.
    """
    for character in characters:
        problem = problem_of(character) or source.problem_of(character)
        if problem:
            raise DataError(f"the required character {character!r} {problem}")
    known = {*source.pieces(), *source.reserved()}
    return [piece for piece in map(source.spell, characters) if piece not in known]
