"""SentencePiece models as protocol buffers: read, checked, extended and written directly.

Going through ``LlamaTokenizer.sp_model`` would lose settings: with ``legacy: false``
transformers switches ``add_dummy_prefix`` off in memory, and that is what it would then save.
Field meanings: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# ModelProto.SentencePiece.Type
NORMAL, USER_DEFINED = 1, 4
# TrainerSpec.ModelType
_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "Unigram", 3: "word", 4: "character"}

# How SentencePiece spells a space (U+2581).
SPACE = "▁"


def read_model(path: Path) -> Any:
    """The ModelProto in ``path``.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or is one of a kind that a
            Llama tokenizer cannot be (Unigram; a normaliser that rewrites the text).
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2, set_min_log_level

    set_min_log_level(2)  # its warnings on old pieces (InternLM has a NUL) are nobody's to mend
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DecodeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    if not model.pieces or not model.HasField("trainer_spec"):
        raise DataError(f"{path}: not a SentencePiece model")
    _check_kind(path, model)
    return model


def _check_kind(path: Path, model: Any) -> None:
    kind = model.trainer_spec.model_type
    if kind != _BPE:
        raise DataError(
            f"{path}: a SentencePiece {_KINDS.get(kind, kind)} model; only SentencePiece BPE "
            "models (Llama 2, Mistral, InternLM) are supported"
        )
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        what = normalizer.name if normalizer.precompiled_charsmap else "remove_extra_whitespaces"
        raise DataError(
            f"{path}: its normaliser ({what}) rewrites the text, which a Llama fast tokenizer "
            "cannot reproduce; only models with the identity normaliser are supported"
        )


def processor(model: Any, *, dummy_prefix: bool | None = None) -> SentencePieceProcessor:
    """A SentencePieceProcessor of ``model``, with its ``add_dummy_prefix`` overridden if given."""
    from sentencepiece import SentencePieceProcessor

    if dummy_prefix is not None:
        copy = type(model)()
        copy.CopyFrom(model)
        copy.normalizer_spec.add_dummy_prefix = dummy_prefix
        model = copy
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def normal_pieces(model: Any) -> dict[str, int]:
    """Piece -> id of the pieces that merging can produce; no control, byte or user symbols."""
    return {entry.piece: key for key, entry in enumerate(model.pieces) if entry.type == NORMAL}


def tied_pieces(model: Any) -> list[str]:
    """The merged pieces whose score another piece has too, in the order of their ids.

    SentencePiece merges the leftmost of equals first, a fast tokenizer the one that its merge
    list names first: where such pieces overlap in a text, the two may differ.
    """
    scores = Counter(entry.score for entry in model.pieces if entry.type == NORMAL)
    return [
        entry.piece
        for entry in model.pieces
        if entry.type == NORMAL and len(entry.piece) > 1 and scores[entry.score] > 1
    ]


def append_pieces(model: Any, pieces: Sequence[str]) -> Any:
    """A copy of ``model`` with ``pieces`` after the old ones, which keep ids and scores.

    SentencePiece merges the pair whose result has the highest score first. Every new score is
    below every old one, so the old merges are done first and in their old order; the new scores
    fall in the order given, so an earlier piece wins.
    """
    extended = type(model)()
    extended.CopyFrom(model)
    scores = _scores_below(min(entry.score for entry in model.pieces))
    for piece, score in zip(pieces, scores, strict=False):
        extended.pieces.add(piece=piece, score=score, type=NORMAL)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    return extended


def _scores_below(start: float) -> Iterator[float]:
    """Strictly falling float32 values below ``start``.

    Steps of 1 where float32 can tell them apart, else to the next float32: Llama 2 scores its
    runs of spaces -1e9, where neighbouring float32 values are 64 apart.
    """
    score = start
    while True:
        stepped = _float32(score - 1.0)
        score = stepped if stepped < score else _next_below(score)
        yield score


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _next_below(value: float) -> float:
    """The float32 after a negative ``value``, away from zero."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (below,) = struct.unpack("<f", struct.pack("<I", bits + 1))
    return float(below)
