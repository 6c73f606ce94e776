"""Scores for new pieces from another SentencePiece model that knows them.

In a SentencePiece BPE model a score is minus the rank of the merge. Another model's ranks are on
another scale; the pieces that both models know tell the ratio (as HammerLLM did when it joined
InternLM's vocabulary to Llama's).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import sentencepiece_model
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

RATIOS: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "min": min,
    "max": max,
}

# Llama 2 scores its runs of spaces -1e9: a place at the end, not a rank.
_NO_RANK = -1e8


@dataclass(frozen=True)
class Calibration:
    """Scores of another model's pieces on the scale of the source."""

    scores: dict[str, float]  # piece -> score, for all merged pieces of the other model
    known: int  # pieces that both models know
    ratio: float  # source score / other score


def calibrate(source: ExtensibleTokenizer, other: Path, how: str) -> Calibration:
    """Scores of the pieces in ``other`` on the scale of ``source``.

    Args:
        source: a SentencePiece BPE tokenizer.
        other: a SentencePiece BPE model file, or a directory with tokenizer.model.
        how: "mean", "min" or "max" of the ratios of the scores of the pieces that both know. The
            smaller the ratio, the earlier the new pieces are merged.

    Raises:
        DataError: a model is of another kind, or they have no pieces in common.
    """
    if not isinstance(source, SentencePieceTokenizer):
        raise DataError(
            f"{source.path}: a byte-level BPE tokenizer has no scores that could be calibrated; "
            "leave out --calibrate_from: its new pieces follow in the order of the list"
        )
    path = other / "tokenizer.model" if other.is_dir() else other
    model = sentencepiece_model.parse_model(path)
    if model.trainer_spec.model_type != sentencepiece_model.BPE:
        raise DataError(f"{path}: not a BPE model; its scores are not ranks of merges")
    theirs = _ranked(sentencepiece_model.scores(model))
    ours = _ranked(source.scores())
    ratios = [ours[piece] / score for piece, score in theirs.items() if piece in ours]
    if not ratios:
        raise DataError(f"{path}: has no merged piece in common with {source.path}")
    ratio = RATIOS[how](ratios)
    return Calibration({p: score * ratio for p, score in theirs.items()}, len(ratios), ratio)


def _ranked(scores: dict[str, float]) -> dict[str, float]:
    """The scores that say a rank: those of merged pieces, of which the first may be -0."""
    return {p: s for p, s in scores.items() if len(p) > 1 and _NO_RANK < s < 0}
