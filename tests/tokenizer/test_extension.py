"""How pieces are added to a model: scores, characters, missing steps."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import extension, fast_tokenizer
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import append_pieces, processor, read_model


def _wanted(source_pieces: set[str], count: int, seed: int) -> list[str]:
    """Pieces over a small alphabet: many overlap, few have parents: the hardest lists."""
    dice = random.Random(seed)
    made = ("".join(dice.choices("甲乙丙丁ab", k=dice.randint(1, 6))) for _ in range(count))
    return [piece for piece in dict.fromkeys(made) if piece not in source_pieces]


@pytest.mark.parametrize("seed", range(5))
def test_random_lists_become_reachable(small: Path, seed: int) -> None:
    source = read_tokenizer(small)
    wanted = _wanted({entry.piece for entry in source.model.pieces}, 120, seed)
    extended = extension.extend(source, wanted)
    assert extension.unreachable(extended.model, extended.fast, wanted) == []
    encoder = processor(extended.model, dummy_prefix=False)
    assert all(encoder.encode(piece, out_type=str) == [piece] for piece in wanted)
    added = [entry.piece for entry in extended.model.pieces[source.size :]]
    assert sorted(added) == sorted([*wanted, *extended.characters, *extended.repaired])
    assert len(set(added)) == len(added)


@pytest.mark.parametrize("seed", range(3))
def test_fast_and_sentencepiece_agree_on_hard_text(small: Path, seed: int) -> None:
    source = read_tokenizer(small)
    wanted = _wanted({entry.piece for entry in source.model.pieces}, 120, seed)
    extended = extension.extend(source, wanted)
    encoder, fast = processor(extended.model), fast_tokenizer.load(extended.fast)
    dice = random.Random(seed)
    for _ in range(300):
        text = "".join(dice.choices("甲乙丙丁ab c", k=40))
        assert encoder.encode(text) == fast.encode(text, add_special_tokens=False).ids


def test_new_scores_are_distinct_ordered_and_below(llama2: Path, small: Path) -> None:
    """Defect 5: with equal scores fast and slow disagree; above an old one, old text changes."""
    for directory in (llama2, small):
        model = read_model(directory / "tokenizer.model")
        old = [entry.score for entry in model.pieces]
        pieces = [f"新{number}" for number in range(20000)]
        extended = append_pieces(model, pieces)
        scores = [entry.score for entry in extended.pieces]
        new = scores[len(old) :]
        assert scores[: len(old)] == old
        assert new == sorted(set(new), reverse=True)
        assert max(new) < min(old)
        assert all(struct.unpack("<f", struct.pack("<f", score)) == (score,) for score in new)
        assert [entry.piece for entry in extended.pieces[len(old) :]] == pieces


def test_dead_pieces_are_noticed(small: Path) -> None:
    """The check itself: without characters and steps a piece is found to be out of reach."""
    source = read_tokenizer(small)
    model = append_pieces(source.model, ["甲", "乙", "甲乙", "甲乙甲乙甲", "丙丁"])
    fast = fast_tokenizer.with_pieces_of(source.fast, model)
    wanted = ["甲乙", "甲乙甲乙甲", "丙丁"]
    assert extension.unreachable(model, fast, wanted) == ["甲乙甲乙甲", "丙丁"]


def test_a_fast_half_that_differs_is_noticed(small: Path) -> None:
    source = read_tokenizer(small)
    extended = extension.extend(source, ["甲乙"])
    fast = {**extended.fast, "model": {**extended.fast["model"], "merges": []}}
    with pytest.raises(DataError, match="cannot be produced"):
        extension._refuse_unreachable(extension.unreachable(extended.model, fast, ["甲乙"]))


def test_a_space_inside_a_piece(small: Path) -> None:
    """``▁`` spells a space, at the start of a piece or within it."""
    extended = extension.extend(read_tokenizer(small), ["▁你好", "你好▁世界"])
    encoder, fast = processor(extended.model), fast_tokenizer.load(extended.fast)
    for text, piece in (("你好", "▁你好"), ("x你好 世界", "你好▁世界")):
        assert piece in encoder.encode(text, out_type=str)
        assert piece in fast.encode(text).tokens
