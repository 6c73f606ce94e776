"""What the old tokenizer made of new pieces, for both kinds of BPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from colossal_llama import command
from colossal_llama.errors import DataError
from colossal_llama.model.new_pieces import NewPieces, find_new_pieces
from colossal_llama.tokenizer.fast_tokenizer import load
from colossal_llama.tokenizer.fingerprint import id_to_piece
from colossal_llama.tokenizer.init_tokenizer import InitTokenizerOptions, init_tokenizer

# What GPT-2's vocabulary spells for these bytes.
NI, HAO = "ä½ł", "å¥½"
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


@pytest.fixture(scope="session")
def byte_level() -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with a prefix space and whole-word look-up."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(topics.topics.values()), trainer)
    return dict(json.loads(tokenizer.to_str()))


@pytest.fixture
def compare(byte_level: dict[str, Any], tmp_path: Path) -> Callable[..., NewPieces]:
    """Writes the byte-level tokenizer, and one with more pieces and tokens; compares them."""

    def compare(pieces: list[str], tokens: dict[str, bool] | None = None) -> NewPieces:
        vocabulary = byte_level["model"]["vocab"]
        new = {piece: len(vocabulary) + at for at, piece in enumerate(pieces)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": len(vocabulary) + len(new) + at, "content": text, "special": special, **flags}
            for at, (text, special) in enumerate((tokens or {}).items())
        ]
        fast = {
            **byte_level,
            "added_tokens": [*byte_level["added_tokens"], *added],
            "model": {**byte_level["model"], "vocab": {**vocabulary, **new}},
        }
        for name, content in (("source", byte_level), ("target", fast)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return find_new_pieces(tmp_path / "source", tmp_path / "target")

    return compare


def test_byte_level_pieces_are_their_text(
    compare: Callable[..., NewPieces], byte_level: dict[str, Any]
) -> None:
    vocabulary = byte_level["model"]["vocab"]
    found = compare([NI + HAO, "Ġfunctional", "Ġstatement!", NI[:2]])
    assert found.texts == ["你好", " functional", " statement!", None]
    spell = [vocabulary[character] for character in NI + HAO]
    assert found.bags[0] == spell
    assert found.bags[3] == spell[:2]
    assert "Ġstatement" in vocabulary
    assert found.bags[2] == [vocabulary["Ġstatement"], vocabulary["!"]]
    # Every bag spells its piece, without the prefix space that the tokenizer puts before a text.
    by_id = {key: piece for piece, key in vocabulary.items()}
    for bag, piece in zip(found.bags, [NI + HAO, "Ġfunctional", "Ġstatement!"], strict=False):
        assert "".join(by_id[key] for key in bag) == piece
    assert load(byte_level).encode("statement!").tokens[0].startswith("Ġ")


def test_added_tokens_are_what_they_read(
    compare: Callable[..., NewPieces], byte_level: dict[str, Any]
) -> None:
    """Special or not: to the old tokenizer they were text, and so is a special token in them."""
    found = compare(["xyzzy"], {"<| statement|>": True, "你好 x": False, "<|end|>2": False})
    by_id = {key: piece for piece, key in byte_level["model"]["vocab"].items()}
    spelled = ["".join(by_id[key] for key in bag) for bag in found.bags]
    assert spelled == ["xyzzy", "<|Ġstatement|>", f"{NI}{HAO}Ġx", "<|end|>2"]
    assert byte_level["model"]["vocab"]["Ġstatement"] in found.bags[1]
    assert byte_level["model"]["vocab"]["<|end|>"] not in found.bags[3]
    assert found.texts == ["xyzzy", None, None, None]


def test_a_real_extension_of_a_byte_level_tokenizer(
    byte_level: dict[str, Any], tmp_path: Path
) -> None:
    """Pieces, the steps to them, symbols and padding as init_tokenizer.py writes them."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    text = json.dumps(byte_level).replace('"add_prefix_space": true', '"add_prefix_space": false')
    (source / "tokenizer.json").write_text(text, encoding="utf-8")
    lines = ({"piece": "你好"}, {"piece": "▁functional"}, {"piece": "<h1>", "type": "user_defined"})
    pieces = tmp_path / "pieces.jsonl"
    pieces.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["--source_tokenizer_dir", source, "--target_tokenizer_dir", target]
    flags += ["--expand_tokens_file", pieces, "--pad_vocab_to_multiple_of", 64]
    assert command.run(InitTokenizerOptions, init_tokenizer, list(map(str, flags))) == 0
    found = find_new_pieces(source, target)
    ids = id_to_piece(target)
    old = {key: piece for piece, key in byte_level["model"]["vocab"].items()}
    spelled = {
        ids[found.old_size + at]: "".join(old[key] for key in bag)
        for at, bag in enumerate(found.bags)
    }
    assert {NI + HAO, NI, HAO, "Ġfunctional", "<h1>"} <= spelled.keys()
    padding = [piece for piece, bag in spelled.items() if not bag]
    assert all(spelled[piece] == piece for piece in spelled if piece not in padding)
    assert padding
    assert all("unused" in str(piece) for piece in padding)


def test_padding_has_no_bag(compare: Callable[..., NewPieces]) -> None:
    found = compare(["<unused_0>ÿ", "<|unused_7|>"], {"<|unused_8|>": False})
    assert found.bags == [[], [], []]
    assert found.texts == [None] * 3


def test_old_texts_by_id(compare: Callable[..., NewPieces], byte_level: dict[str, Any]) -> None:
    found = compare([])
    vocabulary = byte_level["model"]["vocab"]
    assert found.old_size == len(vocabulary)
    assert found.old_texts[vocabulary["Ġstatement"]] == " statement"
    assert found.old_texts[vocabulary["Ġ"]] == " "
    assert found.old_texts[vocabulary["<|end|>"]] is None  # special
    assert found.old_texts[vocabulary["ä"]] is None  # a byte that is no text of its own


def test_sentencepiece_ids_without_the_dummy_prefix(
    old_tokenizer: Path, new_tokenizer: Path
) -> None:
    found = find_new_pieces(old_tokenizer, new_tokenizer)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((old_tokenizer / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    encoder = SentencePieceProcessor(model_proto=model.SerializeToString())
    model.ParseFromString((new_tokenizer / "tokenizer.model").read_bytes())
    pieces = [entry.piece for entry in model.pieces][found.old_size :]
    assert len(found.bags) == len(pieces) >= 7
    assert found.bags == [encoder.encode(piece) for piece in pieces]
    assert found.texts == [piece.replace("▁", " ") for piece in pieces]
    assert found.old_texts[:3] == [None] * 3  # unk, bos, eos
    assert found.old_texts[3] is None  # <0x00>
    assert " the" in found.old_texts


def test_both_spellings_of_the_dummy_prefix(
    old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """Newer files have a Metaspace pre-tokenizer where older ones have a normaliser."""
    wanted = find_new_pieces(old_tokenizer, new_tokenizer)
    fast = json.loads((old_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    fast |= {"normalizer": None, "pre_tokenizer": step}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    assert (
        load(fast).encode("the", add_special_tokens=False).tokens[0].startswith("▁")
    )  # it has the prefix
    assert find_new_pieces(tmp_path, new_tokenizer).bags == wanted.bags


def test_what_is_no_extension(old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has 700 ids and the source 7"):
        find_new_pieces(new_tokenizer, old_tokenizer)
    fast = json.loads((new_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fast["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    with pytest.raises(DataError, match=r"not an extension .* id \d+ is '[ab]' here and '[ab]'"):
        find_new_pieces(old_tokenizer, tmp_path)


def test_llama2_spells_chinese_in_characters_and_bytes(shared_data: Path, tmp_path: Path) -> None:
    """On the real tokenizers: InternLM's texts segmented by Llama 2 equal SentencePiece's."""
    llama2 = shared_data / "tokenizers" / "llama2"
    other = shared_data / "tokenizers" / "llama-zh-128k" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(other.read_bytes())
    wanted = [e.piece for e in model.pieces if e.type == 1 and not e.piece.isascii()][::40]
    fast = json.loads((llama2 / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fast["model"]["vocab"]
    new = [piece for piece in wanted if piece not in vocabulary]
    assert len(new) > 1000
    vocabulary |= {piece: 32000 + at for at, piece in enumerate(new)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    model.ParseFromString((llama2 / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    encoder = SentencePieceProcessor(model_proto=model.SerializeToString())
    found = find_new_pieces(llama2, tmp_path)
    assert found.bags == [encoder.encode(piece) for piece in new]
