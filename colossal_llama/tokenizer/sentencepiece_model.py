"""SentencePiece models as protocol buffers: read, checked, extended and written directly.

Going through ``LlamaTokenizer.sp_model`` would lose settings: with ``legacy: false``
transformers switches ``add_dummy_prefix`` off in memory, and that is what it would then save.
Field meanings: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# ModelProto.SentencePiece.Type
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
# TrainerSpec.ModelType
UNIGRAM, BPE = 1, 2
_KINDS = {UNIGRAM: "Unigram", 3: "word", 4: "character"}

# How SentencePiece spells a space (U+2581).
SPACE = "▁"


def read_model(path: Path) -> Any:
    """The ModelProto in ``path``, of a kind that a Llama tokenizer can be.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or is one of another kind
            (Unigram; a normaliser that rewrites the text).
    """
    model = parse_model(path)
    _check_kind(path, model)
    return model


def parse_model(path: Path) -> Any:
    """The ModelProto in ``path``, of any kind.

    Raises:
        DataError: the file is missing or is no SentencePiece model.
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
    return model


def _check_kind(path: Path, model: Any) -> None:
    kind = model.trainer_spec.model_type
    if kind != BPE:
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
    """Piece -> id of the pieces that merging can produce; no control, byte or user symbols.

    Where SentencePiece 0.2.3 has bytes, it spells NUL as one even if it is a piece (InternLM).
    """
    no_nul = model.trainer_spec.byte_fallback
    return {
        entry.piece: key
        for key, entry in enumerate(model.pieces)
        if entry.type == NORMAL and not (no_nul and entry.piece == "\0")
    }


def scores(model: Any) -> dict[str, float]:
    """The score of every piece that merging can produce: the higher, the earlier its merge."""
    return {entry.piece: entry.score for entry in model.pieces if entry.type == NORMAL}


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


def append_pieces(
    model: Any,
    pieces: Sequence[str],
    *,
    scores: Mapping[str, float] | None = None,
    symbols: Sequence[str] = (),
    padding: int = 0,
) -> Any:
    """A copy of ``model`` with ``pieces`` after the old ones, which keep ids and scores.

    SentencePiece merges the pair whose result has the highest score first. A piece that
    ``scores`` names gets that score, or the next lower one that no other piece has. All others
    get a score below every old one, so that the old merges are done first and in their old
    order; these fall in the order given, so an earlier piece wins.

    ``symbols`` become user-defined pieces, cut out of the text before anything is merged;
    ``padding`` many ids after them stand for no text at all.
    """
    extended = type(model)()
    extended.CopyFrom(model)
    old = [entry.score for entry in model.pieces]
    named = {piece: scores[piece] for piece in pieces if piece in scores} if scores else {}
    given = _distinct(named, old)
    below = _scores_below(min([*old, *given.values()]))
    for piece in pieces:
        score = given[piece] if piece in given else next(below)
        extended.pieces.add(piece=piece, score=score, type=NORMAL)
    for symbol in symbols:
        extended.pieces.add(piece=symbol, score=0.0, type=USER_DEFINED)
    taken = {entry.piece for entry in extended.pieces}
    names = (f"<|unused_{key}|>" for key in itertools.count(len(extended.pieces)))
    for name in itertools.islice((name for name in names if name not in taken), padding):
        extended.pieces.add(piece=name, score=0.0, type=UNUSED)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    return extended


def _distinct(scores: Mapping[str, float], taken: Iterable[float]) -> dict[str, float]:
    """The scores as float32, each moved down to the next value that is free; order is kept."""
    used, free = set(taken), dict[str, float]()
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        score = float32(scores[piece])
        while score in used:
            score = next_below(score)
        used.add(score)
        free[piece] = score
    return free


def _scores_below(start: float) -> Iterator[float]:
    """Strictly falling float32 values below ``start``.

    Steps of 1 where float32 can tell them apart, else to the next float32: Llama 2 scores its
    runs of spaces -1e9, where neighbouring float32 values are 64 apart.
    """
    score = start
    while True:
        stepped = float32(score - 1.0)
        score = stepped if stepped < score else next_below(score)
        yield score


def float32(value: float) -> float:
    """The nearest float32, the type of a score."""
    import numpy as np

    return float(np.float32(value))


def next_below(value: float) -> float:
    """The largest float32 below ``value``."""
    import numpy as np

    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))
