"""What a model's old tokenizer made of the pieces that a new one has besides."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.fast_tokenizer import load, load_bare, without_prefix
from colossal_llama.tokenizer.fingerprint import added_tokens, id_to_piece, read_fast_json
from colossal_llama.tokenizer.sentencepiece_model import SPACE

# How init_tokenizer.py names ids that only round the vocabulary up (in SentencePiece, in byte-level
# BPE), and how SentencePiece names bytes.
_PADDING = re.compile(r"<\|unused_\d+\|>|<unused_\d+>ÿ")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class NewPieces:
    """The new pieces of an extended tokenizer, in the order of their ids.

    A text is None where a piece has none: special tokens, bytes, parts of a character, padding.
    """

    bags: list[list[int]]  # the old ids that spelled each new piece; empty for padding
    texts: list[str | None]  # of the new pieces
    old_texts: list[str | None]  # of the old pieces, by id

    @property
    def old_size(self) -> int:
        """Number of ids of the old tokenizer."""
        return len(self.old_texts)


def find_new_pieces(source: Path, target: Path) -> NewPieces:
    """What the tokenizer in ``source`` makes of every piece that ``target`` has on top of it.

    The piece's own text is segmented, without the dummy prefix and without special tokens. What
    the source has no piece for, it spells in bytes.

    Raises:
        DataError: ``target`` is not an extension of ``source``: some old id has another piece.
    """
    old, new = id_to_piece(source), id_to_piece(target)
    _check_extension(source, target, old, new)
    old_fast, new_fast = read_fast_json(source), read_fast_json(target)
    old_texts = _texts(old, added_tokens(source, old_fast), old_fast)
    tokens = added_tokens(target, new_fast)
    texts = _texts(new, tokens, new_fast)[len(old) :]
    added = {key - len(old): text for key, text in tokens.items() if key >= len(old)}
    return NewPieces(_segmented(old_fast, new[len(old) :], texts, added), texts, old_texts)


def _check_extension(
    source: Path, target: Path, old: Sequence[str | None], new: Sequence[str | None]
) -> None:
    for key, piece in enumerate(old):
        if key >= len(new):
            raise DataError(
                f"{target}: not an extension of {source}: it has {len(new)} ids and the source "
                f"{len(old)}"
            )
        if new[key] != piece:
            raise DataError(
                f"{target}: not an extension of {source}: id {key} is {new[key]!r} here and "
                f"{piece!r} there"
            )


def _segmented(
    fast: dict[str, Any],
    pieces: Sequence[str | None],
    texts: Sequence[str | None],
    added: dict[int, str],
) -> list[list[int]]:
    """Each piece through the old tokenizer: all with a text in one batch, the others as spelled.

    Added tokens are segmented as what they read: they, too, were only text to the old tokenizer.
    """
    bags: list[list[int]] = [[] for _ in pieces]
    readable = {key: text for key, text in enumerate(texts) if text is not None} | added
    spelled = {
        key: piece
        for key, piece in enumerate(pieces)
        if key not in readable and piece is not None and not _PADDING.fullmatch(piece)
    }
    readable = {key: text for key, text in readable.items() if not _PADDING.fullmatch(text)}
    for encoder, chosen in ((load(without_prefix(fast)), readable), (load_bare(fast), spelled)):
        encodings = encoder.encode_batch(list(chosen.values()), add_special_tokens=False)
        for key, encoding in zip(chosen, encodings, strict=True):
            bags[key] = encoding.ids
    return bags


def _texts(
    pieces: Sequence[str | None], added: dict[int, str], fast: dict[str, Any]
) -> list[str | None]:
    """The text that each piece stands for, without the added tokens' names."""
    return [
        None if piece is None or key in added else read(piece)
        for read in (_reader(fast),)
        for key, piece in enumerate(pieces)
    ]


def _reader(fast: dict[str, Any]) -> Any:
    """A function from a piece in the vocabulary's spelling to its text, or None."""
    if "ByteLevel" not in json.dumps([fast.get("pre_tokenizer"), fast.get("decoder")]):
        return lambda piece: (
            None
            if _BYTE.fullmatch(piece) or _PADDING.fullmatch(piece)
            else piece.replace(SPACE, " ")
        )
    from tokenizers.decoders import ByteLevel

    decoder = ByteLevel()

    def read(piece: str) -> str | None:
        text = decoder.decode([piece])
        return None if "\ufffd" in text or _PADDING.fullmatch(piece) else text

    return read


def script_of(text: str | None) -> str | None:
    """The script of most letters of ``text``, or None where there is no letter.

    A script is the first word of a letter's Unicode name ("CJK UNIFIED IDEOGRAPH-4F60", "LATIN
    SMALL LETTER A"). Letters with names of their own ("MICRO SIGN") only make a small class.
    """
    scripts = Counter(_script_of_letter(letter) for letter in text or "" if letter.isalpha())
    return scripts.most_common(1)[0][0] if scripts else None


@functools.cache
def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "unnamed").split(" ")[0]
