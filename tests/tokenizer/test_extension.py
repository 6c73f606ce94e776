"""How pieces are added to a model: scores, characters, missing steps."""

from __future__ import annotations

import dataclasses
import random
import re
import struct
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import extension, fast_tokenizer
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.fingerprint import id_to_piece
from colossal_llama.tokenizer.sentencepiece_model import append_pieces, processor, read_model
from colossal_llama.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer


def _wanted(source_pieces: set[str], count: int, seed: int) -> list[str]:
    """Pieces over a small alphabet: many overlap, few have parents: the hardest lists."""
    dice = random.Random(seed)
    made = ("".join(dice.choices("甲乙丙丁ab", k=dice.randint(1, 6))) for _ in range(count))
    return [piece for piece in dict.fromkeys(made) if piece not in source_pieces]


@pytest.mark.parametrize("seed", range(5))
def test_random_lists_become_reachable(small: Path, seed: int) -> None:
    source = _read(small)
    wanted = _wanted({entry.piece for entry in source.model.pieces}, 120, seed)
    extended = extension.extend(source, wanted)
    tokenizer = _sentencepiece(extended)
    assert tokenizer.production(wanted).missing == []
    encoder = processor(tokenizer.model, dummy_prefix=False)
    assert all(encoder.encode(piece, out_type=str) == [piece] for piece in wanted)
    added = [entry.piece for entry in tokenizer.model.pieces[source.size :]]
    assert added == extended.pieces
    assert sorted(added) == sorted([*wanted, *extended.characters, *extended.repaired])
    assert len(set(added)) == len(added)
    assert sum(extended.between.values()) == len(added)


@pytest.mark.parametrize("seed", range(3))
def test_fast_and_sentencepiece_agree_on_hard_text(small: Path, seed: int) -> None:
    source = _read(small)
    wanted = _wanted({entry.piece for entry in source.model.pieces}, 120, seed)
    extended = _sentencepiece(extension.extend(source, wanted))
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
    wanted = ["甲乙", "甲乙甲乙甲", "丙丁"]
    tokenizer = _read(small).extended(["甲", "乙", *wanted])
    assert tokenizer.production(wanted).missing == ["甲乙甲乙甲", "丙丁"]


def test_a_fast_half_that_differs_is_noticed(small: Path) -> None:
    tokenizer = _sentencepiece(extension.extend(_read(small), ["甲乙"]))
    fast = {**tokenizer.fast, "model": {**tokenizer.fast["model"], "merges": []}}
    assert dataclasses.replace(tokenizer, fast=fast).production(["甲乙"]).missing == ["甲乙"]


def test_what_is_out_of_reach_is_dropped_or_refused(small: Path) -> None:
    """Without repairs a piece needs its characters and its steps in the list."""
    source = _read(small)
    wanted = ["甲", "乙", "甲乙", "甲乙甲乙甲", "丙丁", "甲乙甲乙甲甲"]
    extended = extension.extend(source, wanted, on_unreachable="drop")
    assert extended.dropped == ["甲乙甲乙甲", "丙丁", "甲乙甲乙甲甲"]
    assert extended.pieces == ["甲", "乙", "甲乙"]
    with pytest.raises(DataError, match=r"3 pieces cannot be produced.*'丙丁'.*repair or drop"):
        extension.extend(source, wanted, on_unreachable="error")
    assert extension.extend(source, wanted).dropped == []


@pytest.mark.parametrize("seed", range(3))
def test_scores_among_the_old_ones_keep_old_pieces_alive(small: Path, seed: int) -> None:
    """A new piece that is merged early may stand in the way of an old one: that is repaired."""
    source = _read(small)
    dice = random.Random(seed)
    inner = [p[at : at + 2] for p in source.pieces() for at in range(1, len(p) - 2)]
    wanted = [p for p in dict.fromkeys(inner) if p not in source.scores()]
    scores = {piece: -dice.uniform(0.1, 300) for piece in wanted}
    extended = extension.extend(source, wanted, scores=scores)
    assert extended.tokenizer.production(wanted).missing == []
    old = extension._whole(source, source.pieces())
    assert extension._whole(extended.tokenizer, old) == old
    plain = source.extended(wanted, scores=scores)
    assert extension._whole(plain, old) != old  # without the repair they would be dead
    new = [_sentencepiece(extended).scores()[piece] for piece in wanted]
    assert len({*new, *source.scores().values()}) == len({*new}) + len({*source.scores().values()})
    assert sorted(wanted, key=lambda p: -scores[p]) == [
        p for _, p in sorted(zip(new, wanted, strict=True), reverse=True)
    ]


def test_padding_stands_for_nothing(small: Path) -> None:
    source = _read(small)
    extended = extension.extend(source, ["您好"], symbols=["<h1>"], multiple_of=100)
    tokenizer = _sentencepiece(extended)
    assert tokenizer.size % 100 == 0
    assert 0 < extended.padding == tokenizer.size - source.size - 4 < 100
    encoder, fast = processor(tokenizer.model), fast_tokenizer.load(tokenizer.fast)
    for key in range(tokenizer.size - extended.padding, tokenizer.size):
        for text in (tokenizer.model.pieces[key].piece, f"<h1>{tokenizer.model.pieces[key].piece}"):
            ids = encoder.encode(text)
            assert fast.encode(text, add_special_tokens=False).ids == ids
            assert key not in ids
    again = extension.extend(tokenizer, ["世界"], multiple_of=100)  # names stay apart
    assert again.tokenizer.size % 100 == 0
    assert again.tokenizer.production(["世界", "您好"]).missing == []


def test_padding_gets_names_that_are_free(small: Path) -> None:
    source = _read(small)
    names = [f"<|unused_{key}|>" for key in range(source.size, source.size + 3)]
    tokenizer = _sentencepiece(extension.extend(source, [], symbols=names, multiple_of=64))
    pieces = [entry.piece for entry in tokenizer.model.pieces]
    assert tokenizer.size == len(set(pieces)) == len(pieces)
    assert tokenizer.size % 64 == 0
    assert pieces[source.size : source.size + 3] == names


def test_symbols_are_cut_out_by_both_halves(small: Path) -> None:
    """As added tokens, which is how transformers converts them, each would bring a prefix."""
    extended = extension.extend(_read(small), ["您好"], symbols=["<h1>", "<h12>", "♞"])
    tokenizer = _sentencepiece(extended)
    encoder, fast = processor(tokenizer.model), fast_tokenizer.load(tokenizer.fast)
    dice = random.Random(0)
    parts = ["<h1>", "<h12>", "♞", "a", " ", "您好", "\n", "<", ">", "<0x41>", "12", "  x", "<h"]
    for _ in range(500):
        text = "".join(dice.choices(parts, k=8))
        ids = encoder.encode(text)
        quick = fast.encode(text, add_special_tokens=False)
        assert quick.ids == ids
        assert fast.decode(ids, skip_special_tokens=False) == encoder.decode(ids) == text
        cut = re.findall("<h12>|<h1>|♞", text)
        assert [piece for piece in quick.tokens if piece in ("<h1>", "<h12>", "♞")] == cut


def test_added_tokens_after_the_last_piece_stay_where_they_are(small: Path, tmp_path: Path) -> None:
    """<pad> at the first id after the pieces, as many fine-tuned Llamas have it."""
    loaded = AutoTokenizer.from_pretrained(small)
    loaded.add_special_tokens({"pad_token": "<pad>"})
    loaded.save_pretrained(tmp_path)
    source = _read(tmp_path)
    key = loaded.pad_token_id
    assert source.size == key + 1 == len(source.model.pieces) + 1
    extended = extension.extend(source, ["您好"])
    (tmp_path / "out").mkdir()
    extended.tokenizer.write(tmp_path / "out", settings_from=tmp_path)
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (new.pad_token, new.pad_token_id) == ("<pad>", key)
    assert id_to_piece(tmp_path / "out")[: key + 1] == id_to_piece(tmp_path)
    slow = AutoTokenizer.from_pretrained(tmp_path / "out", use_fast=False)
    for text in ("x<pad>您好", "<pad>", "您好 <pad"):
        assert new.encode(text) == slow.encode(text)
    assert new.encode("您好", add_special_tokens=False)[-1] == key + 3


def test_a_space_inside_a_piece(small: Path) -> None:
    """``▁`` spells a space, at the start of a piece or within it."""
    extended = _sentencepiece(extension.extend(_read(small), ["▁你好", "你好▁世界"]))
    encoder, fast = processor(extended.model), fast_tokenizer.load(extended.fast)
    for text, piece in (("你好", "▁你好"), ("x你好 世界", "你好▁世界")):
        assert piece in encoder.encode(text, out_type=str)
        assert piece in fast.encode(text).tokens


def _read(directory: Path) -> SentencePieceTokenizer:
    source = read_tokenizer(directory)
    assert isinstance(source, SentencePieceTokenizer)
    return source


def _sentencepiece(extended: extension.Extension) -> SentencePieceTokenizer:
    assert isinstance(extended.tokenizer, SentencePieceTokenizer)
    return extended.tokenizer
