"""Any tokenizer directory, opened to be measured: its SentencePiece half and its fast half.

Nothing is refused that can be read: Unigram, WordPiece, normalisers that rewrite the text, halves
that disagree. What a kind of tokenizer can be extended or trained with is not asked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json
from colossal_llama.tokenizer.byte_level import byte_alphabet
from colossal_llama.tokenizer.fast_tokenizer import load, load_bare, without_prefix
from colossal_llama.tokenizer.fingerprint import added_tokens, read_fast_json
from colossal_llama.tokenizer.neighbours import produced_between
from colossal_llama.tokenizer.sentencepiece_model import (
    BYTE,
    NORMAL,
    SPACE,
    USER_DEFINED,
    parse_model,
    processor,
)

if TYPE_CHECKING:
    pass

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# TrainerSpec.ModelType
_KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    data: bytes  # what it spells, in UTF-8: spaces as "▁", perhaps only a part of a character


class Half(Protocol):
    """One of the two ways to encode that a tokenizer directory offers."""

    producible: set[int]  # ids that text can become: no special, unknown or unused ones

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without bos and eos; special tokens in a text are mere text."""

    def tokens(self, text: str) -> list[Token]:
        """The tokens of one text with what each spells."""

    def unreachable(self) -> list[str] | None:
        """Pieces that neither their own text nor that text between neutral neighbours becomes.

        A dummy prefix aside. None where a piece has no text of its own (WordPiece).
        """


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer directory with the halves that could be opened; at least one."""

    path: Path
    kind: str
    pieces: list[str | None]  # by id
    slow: Half | None
    fast: Half | None
    fast_source: str  # where the fast half is from, or why there is none

    @property
    def main(self) -> Half:
        """The half that figures are given for: SentencePiece's, else the fast one."""
        half = self.slow or self.fast
        assert half is not None
        return half


def open_tokenizer(directory: Path) -> OpenTokenizer:
    """Opens a directory with tokenizer.model, tokenizer.json or both.

    Raises:
        DataError: there is neither, or one cannot be read.
    """
    check_is_tokenizer(directory)
    has_model = (directory / "tokenizer.model").is_file()
    has_fast = (directory / "tokenizer.json").is_file()
    model = parse_model(directory / "tokenizer.model") if has_model else None
    slow = SlowHalf(directory, model) if has_model else None
    if has_fast:
        content: dict[str, Any] | None = read_fast_json(directory)
        source = "tokenizer.json"
    else:
        content, source = _converted(directory)
    added = added_tokens(directory, content or {})
    fast = FastHalf(directory, content, added) if content else None
    names: dict[int, str] = dict(enumerate(entry.piece for entry in model.pieces)) if model else {}
    if not model and content:
        names = {key: piece for piece, key in _vocabulary(content).items()}
    names.update(added)
    if not names:
        raise DataError(f"{directory}/tokenizer.json: its vocabulary is empty")
    pieces = [names.get(key) for key in range(max(names) + 1)]
    kind = f"SentencePiece {_kind_of(model)}" if model else _kind_of_fast(content or {})
    return OpenTokenizer(directory, kind, pieces, slow, fast, source)


def check_is_tokenizer(directory: Path) -> None:
    """Raises DataError if there is nothing in ``directory`` to open."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such tokenizer directory")
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise DataError(f"{directory}: no tokenizer.model and no tokenizer.json in it")


class SlowHalf:
    """What SentencePiece itself makes of ``tokenizer.model``."""

    def __init__(self, directory: Path, model: Any) -> None:
        self._model = model
        try:
            self._encoder = processor(model)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{directory}/tokenizer.model: not usable: {reason}") from None
        kinds = (NORMAL, USER_DEFINED, BYTE)
        self.producible = {k for k, entry in enumerate(model.pieces) if entry.type in kinds}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._encoder.encode(list(texts)))

    def tokens(self, text: str) -> list[Token]:
        keys = self._encoder.encode(text)
        pieces = self._encoder.encode(text, out_type=str)  # an unknown part as the text has it
        found = []
        for key, piece in zip(keys, pieces, strict=True):
            is_byte = self._model.pieces[key].type == BYTE
            found.append(Token(key, _spelled(piece) if is_byte else piece.encode("utf-8")))
        return found

    def unreachable(self) -> list[str]:
        pieces = {
            entry.piece: key
            for key, entry in enumerate(self._model.pieces)
            if entry.type in (NORMAL, USER_DEFINED)
        }
        plain = type(self._model)()
        plain.CopyFrom(self._model)
        plain.normalizer_spec.add_dummy_prefix = False
        plain.normalizer_spec.remove_extra_whitespaces = False
        texts = [piece.replace(SPACE, " ") for piece in pieces]
        return _missing(pieces, texts, processor(plain).encode(texts), self)


class FastHalf:
    """What the library ``tokenizers`` makes of ``tokenizer.json``."""

    def __init__(self, directory: Path, content: dict[str, Any], added: dict[int, str]) -> None:
        try:
            self._encoder = load(content)
        except Exception as error:  # the library raises no other class
            reason = " ".join(str(error).split())
            raise DataError(f"{directory}/tokenizer.json: cannot be loaded: {reason}") from None
        self._content = content
        self._vocabulary = _vocabulary(content)
        self._spaced = SPACE in _steps(content, ensure_ascii=False)
        self._bytes = byte_alphabet() if "ByteLevel" in _steps(content) else {}
        self._unknown = _unknown_piece(content)
        special = {int(t["id"]) for t in content.get("added_tokens") or [] if t.get("special")}
        special |= {self._vocabulary[self._unknown]} if self._unknown in self._vocabulary else set()
        self.producible = (set(self._vocabulary.values()) | set(added)) - special

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def tokens(self, text: str) -> list[Token]:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        found = []
        parts = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        for key, piece, (start, end) in parts:
            unknown = piece == self._unknown
            found.append(Token(key, text[start:end].encode() if unknown else self._spell(piece)))
        return found

    def unreachable(self) -> list[str] | None:
        model = self._content["model"]
        if model.get("type") not in ("BPE", "Unigram") or any(
            model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")
        ):
            return None
        pieces = {
            piece: key
            for piece, key in self._vocabulary.items()
            if key in self.producible
            and not (model.get("byte_fallback") and _BYTE_PIECE.fullmatch(piece))
        }
        texts = {piece: self._text(piece) for piece in pieces}
        whole = {piece: key for piece, key in pieces.items() if texts[piece] is not None}
        dead = self._unmerged({p: key for p, key in pieces.items() if texts[p] is None})
        known = [text for text in texts.values() if text is not None]
        if not self._bytes and model.get("ignore_merges"):
            # Whole words are looked up; where nothing splits words, that finds any piece.
            model = {**model, "ignore_merges": False}
        alone = load({**without_prefix(self._content), "model": model})
        encodings = alone.encode_batch_fast(known, add_special_tokens=False)
        dead |= set(_missing(whole, known, (entry.ids for entry in encodings), self))
        return [piece for piece in pieces if piece in dead]

    def _unmerged(self, cut: dict[str, int]) -> set[str]:
        """Pieces that merging does not give. A cut character is no text, so only it is asked."""
        if not cut:
            return set()
        merged = load_bare(self._content).encode_batch_fast(list(cut), add_special_tokens=False)
        return {p for (p, key), got in zip(cut.items(), merged, strict=True) if got.ids != [key]}

    def _spell(self, piece: str) -> bytes:
        if self._bytes and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece).replace(
                b" ", b"\xe2\x96\x81"
            )
        return _spelled(piece)

    def _text(self, piece: str) -> str | None:
        """The text that a piece stands for; None if it is not whole characters."""
        if self._bytes:
            if not all(character in self._bytes for character in piece):
                return piece
            try:
                return bytes(self._bytes[character] for character in piece).decode("utf-8")
            except UnicodeDecodeError:
                return None
        return piece.replace(SPACE, " ") if self._spaced else piece


def _missing(
    pieces: dict[str, int], texts: Sequence[str], alone: Iterable[list[int]], half: Half
) -> list[str]:
    """The pieces that are not their own id ``alone``, nor between neighbours in ``half``."""
    left = {
        text: piece
        for (piece, key), text, ids in zip(pieces.items(), texts, alone, strict=True)
        if ids != [key]
    }
    _, missing = produced_between({text: pieces[left[text]] for text in left}, half.encode)
    return [left[text] for text in missing]


def _spelled(piece: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.encode("utf-8")


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {str(piece): int(key) for piece, key in vocabulary.items()}
    return {str(entry[0]): key for key, entry in enumerate(vocabulary)}  # Unigram


def _unknown_piece(content: dict[str, Any]) -> str | None:
    model = content["model"]
    if isinstance(model["vocab"], list) and isinstance(model.get("unk_id"), int):
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _steps(content: dict[str, Any], *, ensure_ascii: bool = True) -> str:
    steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    return json.dumps(steps, ensure_ascii=ensure_ascii)


def _kind_of(model: Any) -> str:
    kind = model.trainer_spec.model_type
    return _KINDS.get(kind, str(kind))


def _kind_of_fast(content: dict[str, Any]) -> str:
    kind = str(content["model"].get("type"))
    return f"byte-level {kind}" if "ByteLevel" in _steps(content) else kind


def _converted(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """The tokenizer.json that transformers makes of tokenizer.model, as AutoTokenizer does."""
    from transformers import AutoTokenizer, LlamaTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    settings = directory / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    named = isinstance(config, dict) and config.get("tokenizer_class")
    loader: Any = AutoTokenizer if named and not config.get("auto_map") else LlamaTokenizerFast
    try:
        loaded = loader.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        if not loaded.is_fast:
            return None, f"none: {type(loaded).__name__} has no fast half"
        return json.loads(loaded.backend_tokenizer.to_str()), "converted by transformers"
    except Exception as error:  # whatever a conversion can raise, the other half stays usable
        return None, f"none: transformers cannot convert it: {' '.join(str(error).split())[:200]}"
    finally:
        logging.set_verbosity(verbosity)
