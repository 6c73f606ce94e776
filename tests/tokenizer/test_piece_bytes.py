"""The bytes of pieces add up to those of the text that they are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from colossal_llama.dataset.tokenization import text_tokenizer
from colossal_llama.tokenizer.fast_tokenizer import load
from colossal_llama.tokenizer.fingerprint import read_fast_json
from colossal_llama.tokenizer.piece_bytes import EVERY, FIRST, NONE, PieceBytes, piece_bytes
from tests.tokenizer.byte_level_styles import STYLES, make_all

REAL = ("llama2", "mistral-v1")
ODD = [
    *("a", "ab cd", " a space first", "  two", "a space last ", "two\n\nlines\t\n", "\n", " "),
    *(
        "中文，没有空格",
        "naïve café",
        "🙂🚀 emoji 𠀀",
        "…한국어",
        "<s>no bos</s>",
        "<0x41>",
        "x" * 50,
    ),
]


def _size(pieces: PieceBytes, ids: list[int]) -> int:
    """The bytes of one text, without the space that is put before it."""
    put_there = pieces.prefix != NONE and pieces.spaced[ids[0]]
    return int(pieces.sizes[ids].sum()) - int(put_there)


def _check(fast: dict[str, Any], texts: list[str]) -> PieceBytes:
    encoder, pieces = load(fast), piece_bytes(fast)
    for text in texts:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert _size(pieces, ids) == len(text.encode("utf-8")), text[:50]
        assert pieces.is_text[ids].all()
    return pieces


def test_small_sentencepiece_tokenizer(small: Path, english: list[str]) -> None:
    pieces = _check(json.loads(text_tokenizer(small).json), [*ODD, *english])
    assert pieces.prefix == EVERY
    # <unk>, bos and eos; nobody knows what an unknown piece stands for, but it is text.
    assert pieces.sizes[:3].tolist() == [0, 0, 0]
    assert pieces.is_text[:4].tolist() == [True, False, False, True]
    assert pieces.is_added[:4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name: str, shared_data: Path, corpora: dict[str, list[str]]) -> None:
    texts = [text for name in corpora for text in corpora[name][:30]]
    pieces = _check(read_fast_json(shared_data / "tokenizers" / name), [*ODD, *texts])
    assert pieces.prefix == EVERY


def test_byte_level_tokenizers(tmp_path: Path, english: list[str]) -> None:
    made = make_all(tmp_path, english[:40])
    assert set(made) == set(STYLES)
    for directory in made.values():
        pieces = _check(json.loads(text_tokenizer(directory).json), [*ODD, *english[:20]])
        assert pieces.prefix == NONE
        special = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        assert not pieces.is_text[[token["id"] for token in special]].any()


def test_metaspace_puts_its_space_once_or_before_every_text() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    found = []
    for scheme in ("always", "first", "never"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        found.append(_check(json.loads(tokenizer.to_str()), ["a", "aa a"]).prefix)
    assert found == [EVERY, FIRST, NONE]


def test_added_tokens_are_their_own_text() -> None:
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens([AddedToken("你好"), AddedToken("<end>", special=True)])
    pieces = piece_bytes(json.loads(tokenizer.to_str()))
    assert pieces.sizes.tolist() == [1, 1, 6, 0]
    assert pieces.is_text.tolist() == [True, True, True, False]
    assert pieces.is_added.tolist() == [False, False, True, True]
