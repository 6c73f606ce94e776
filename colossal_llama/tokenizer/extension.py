"""Which pieces must join a SentencePiece BPE model so that every wanted piece can be produced.

BPE builds a piece by merging two pieces into a third, over and over, from single characters. A
piece is dead if its characters are not pieces, or if the merges on the way to it are missing or
lose against others. So characters come first, and a piece that the extended model still cuts in
two or more gets the missing steps, until every one encodes to itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colossal_llama.errors import DataError
from colossal_llama.storage import read_jsonl
from colossal_llama.tokenizer import fast_tokenizer
from colossal_llama.tokenizer.directory import TokenizerFiles
from colossal_llama.tokenizer.sentencepiece_model import (
    NORMAL,
    SPACE,
    USER_DEFINED,
    append_pieces,
    processor,
)


@dataclass(frozen=True)
class WantedPieces:
    """A list of pieces as the user gave it."""

    pieces: list[str]  # new ones, in the order of the file, each once
    asked_for: int
    already_there: int
    duplicates: int


@dataclass(frozen=True)
class Extension:
    """A model in which every wanted piece can be produced, and what that took."""

    model: Any  # ModelProto: old pieces, characters, then wanted and repair pieces in order
    fast: dict[str, Any]
    characters: list[str]  # single characters that were added without being asked for
    repaired: list[str]  # steps between characters and wanted pieces that were added


def read_pieces(path: Path, source: TokenizerFiles) -> WantedPieces:
    """Reads JSON lines of {"piece": text}.

    Raises:
        DataError: naming file:line, for a line without a usable piece.
    """
    present = {entry.piece for entry in source.model.pieces if entry.type in (NORMAL, USER_DEFINED)}
    reserved = {entry.piece for entry in source.model.pieces if entry.type != NORMAL}
    reserved |= set(source.added.values())
    # Only a piece that holds one of their first characters can hold a reserved text.
    initials = {text[0] for text in reserved if text}
    wanted: dict[str, None] = {}
    asked_for = already_there = duplicates = 0
    for line, record in read_jsonl(path):
        piece = _piece(record, f"{path}:{line}")
        if not initials.isdisjoint(piece):
            _refuse_reserved(piece, reserved - present, reserved, f"{path}:{line}")
        asked_for += 1
        if piece in present:
            already_there += 1
        elif piece in wanted:
            duplicates += 1
        else:
            wanted[piece] = None
    if not asked_for:
        raise DataError(f'{path}: no pieces; expected lines like {{"piece": "你好"}}')
    return WantedPieces(list(wanted), asked_for, already_there, duplicates)


def _piece(record: dict[str, Any], where: str) -> str:
    if "piece" not in record:
        raise DataError(f'{where}: no "piece"; expected a line like {{"piece": "你好"}}')
    piece = record["piece"]
    if not isinstance(piece, str):
        raise DataError(f"{where}: the piece is {type(piece).__name__}, expected text")
    problem = problem_of(piece)
    if problem:
        raise DataError(f"{where}: the piece {piece!r} {problem}")
    return piece


def problem_of(piece: str) -> str | None:
    """Why ``piece`` cannot be added to any SentencePiece model, or None if it can."""
    if not piece:
        return "is empty"
    for character in piece:
        category = unicodedata.category(character)
        if category == "Cs":
            return "holds half a surrogate pair"
        if character.isspace() or category == "Cc":
            return (
                f"holds the space or control character U+{ord(character):04X}; "
                f"SentencePiece spells a space as {SPACE}"
            )
    return None


def _refuse_reserved(piece: str, never: set[str], reserved: set[str], where: str) -> None:
    """A reserved text is cut out of the input before merging, so nothing can grow around it."""
    found = [text for text in reserved if text in piece and (text != piece or text in never)]
    if found:
        raise DataError(
            f"{where}: the piece {piece!r} holds {max(found, key=len)!r}, which is a special token "
            "of this tokenizer; remove the line"
        )


def extend(source: TokenizerFiles, wanted: Sequence[str]) -> Extension:
    """Adds ``wanted`` pieces (new, each once) to the source's model.

    Raises:
        DataError: an added token stands on the ids that new pieces would take, or some pieces
            stay out of reach.
    """
    _check_free_ids(source, wanted)
    old = {entry.piece for entry in source.model.pieces}
    letters = [c for c in dict.fromkeys("".join(wanted)) if c not in old]
    order = [piece for piece in wanted if len(piece) > 1]
    with tqdm(desc="checking that every piece can be produced", unit=" round", delay=1) as progress:
        while True:
            model = append_pieces(source.model, [*letters, *order])
            missing = _segmented(model, order)
            progress.update()
            steps = _missing_steps(missing, {*old, *order})
            if not steps:
                break
            order = [item for piece in order for item in (*steps.get(piece, ()), piece)]
    fast = fast_tokenizer.with_pieces_of(source.fast, model)
    _refuse_unreachable([*missing, *unreachable(model, fast, [*letters, *order])])
    asked = set(wanted)
    return Extension(
        model,
        fast,
        [letter for letter in letters if letter not in asked],
        [piece for piece in order if piece not in asked],
    )


def _check_free_ids(source: TokenizerFiles, wanted: Sequence[str]) -> None:
    taken = {key: text for key, text in source.added.items() if key >= source.size}
    if wanted and taken:
        key = min(taken)
        raise DataError(
            f"{source.path}: the added token {taken[key]!r} has id {key}, but the SentencePiece "
            f"model ends at {source.size - 1} and new pieces would take the ids from "
            f"{source.size}; remove the added token, extend, and add it again afterwards"
        )


def _segmented(model: Any, pieces: Sequence[str]) -> dict[str, list[str]]:
    """Of ``pieces``, those that the model cuts: piece -> its segmentation."""
    encoder = processor(model, dummy_prefix=False)
    segmentations = encoder.encode(list(pieces), out_type=str)
    return {
        piece: parts for piece, parts in zip(pieces, segmentations, strict=True) if parts != [piece]
    }


def _missing_steps(missing: dict[str, list[str]], known: set[str]) -> dict[str, list[str]]:
    """For each cut piece the new prefixes p1 p2, p1 p2 p3, ... that lead from its parts to it."""
    steps: dict[str, list[str]] = {}
    for piece, parts in missing.items():
        prefixes = ["".join(parts[:count]) for count in range(2, len(parts))]
        new = [prefix for prefix in prefixes if prefix not in known and piece.startswith(prefix)]
        if new:
            steps[piece] = new
            known.update(new)
    return steps


def unreachable(model: Any, fast: dict[str, Any], pieces: Sequence[str]) -> list[str]:
    """Of ``pieces``, those that the written tokenizers would not produce, measured on both.

    Checked: the piece alone is one id, in SentencePiece and in the fast tokenizer; and as a text
    of its own, dummy prefix and all, both give the same ids.
    """
    texts = list(pieces)
    alone, whole = processor(model, dummy_prefix=False), processor(model)
    bare, complete = fast_tokenizer.load_bare(fast), fast_tokenizer.load(fast)
    found = zip(
        texts,
        _ids(alone.encode(texts)),
        (entry.ids for entry in bare.encode_batch(texts, add_special_tokens=False)),
        _ids(whole.encode(texts)),
        (entry.ids for entry in complete.encode_batch(texts, add_special_tokens=False)),
        strict=True,
    )
    return [
        text
        for text, one, fast_one, ids, fast_ids in found
        if one != [alone.piece_to_id(text)] or one != fast_one or ids != fast_ids
    ]


def _ids(batch: Any) -> Iterable[list[int]]:
    """SentencePiece returns a list of lists for a list of texts, which its types do not say."""
    return batch


def _refuse_unreachable(pieces: Sequence[str]) -> None:
    if pieces:
        some = ", ".join(map(repr, list(dict.fromkeys(pieces))[:5]))
        raise DataError(
            f"{len(set(pieces))} pieces cannot be produced by this tokenizer, among them {some}; "
            "remove them from the list"
        )
