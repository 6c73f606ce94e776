"""Scores of another model on our scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.calibration import calibrate
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import parse_model, read_model, scores


def _scaled(small: Path, target: Path, factor: float) -> Path:
    """The same model with all its scores times ``factor``, and a piece that only it has."""
    model = read_model(small / "tokenizer.model")
    for entry in model.pieces:
        entry.score *= factor
    model.pieces.add(piece="您好", score=-10.0 * factor, type=1)
    target.write_bytes(model.SerializeToString())
    return target


@pytest.mark.parametrize("how", ["mean", "min", "max"])
def test_another_scale_is_undone(how: str, small: Path, tmp_path: Path) -> None:
    source = read_tokenizer(small)
    found = calibrate(source, _scaled(small, tmp_path / "other.model", 3.0), how)
    ours = scores(read_model(small / "tokenizer.model"))
    assert found.ratio == pytest.approx(1 / 3)
    assert found.scores["您好"] == pytest.approx(-10.0)
    assert found.known == sum(len(piece) > 1 and -1e8 < s < 0 for piece, s in ours.items())
    for piece, score in found.scores.items():
        assert piece == "您好" or score == pytest.approx(ours[piece])


def test_the_ratios_are_in_order(llama2: Path, shared_data: Path) -> None:
    """Real models rank their common pieces differently; the mean lies between the extremes."""
    source, other = read_tokenizer(llama2), shared_data / "tokenizers" / "internlm-7b"
    low, middle, high = (calibrate(source, other, how) for how in ("min", "mean", "max"))
    assert 0 < low.ratio < middle.ratio < high.ratio
    assert low.known == middle.known > 10000
    theirs = scores(parse_model(other / "tokenizer.model"))
    for piece in ("中国", "我们"):
        assert middle.scores[piece] == pytest.approx(theirs[piece] * middle.ratio)


def test_what_has_no_ranks_is_refused(small: Path, tmp_path: Path) -> None:
    source = read_tokenizer(small)
    model = read_model(small / "tokenizer.model")
    model.trainer_spec.model_type = 1
    (tmp_path / "unigram.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="not a BPE model"):
        calibrate(source, tmp_path / "unigram.model", "mean")
    model.trainer_spec.model_type = 2
    del model.pieces[3:]
    (tmp_path / "empty.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="no merged piece in common"):
        calibrate(source, tmp_path / "empty.model", "mean")
    with pytest.raises(DataError, match=r"nothing\.model: No such file"):
        calibrate(source, tmp_path / "nothing.model", "mean")
