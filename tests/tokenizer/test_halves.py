"""Tokenizers of every kind are opened, and their dead pieces are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.byte_level import byte_alphabet
from colossal_llama.tokenizer.halves import open_tokenizer
from colossal_llama.tokenizer.neighbours import NEIGHBOURS
from colossal_llama.tokenizer.sentencepiece_model import NORMAL, USER_DEFINED, parse_model

TEXT = "the naïve 依山 reader  reads [1, 23]\n\tand 🙂"


def save(tokenizer: Tokenizer, directory: Path) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def byte_level(english: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(english[:10], trainer)
    return tokenizer


def unigram(english: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(english[:10], trainer)
    return tokenizer


def word_piece(english: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(english[:10], trainer)
    return tokenizer


def sentencepiece(english: list[str], directory: Path, **settings: Any) -> Path:
    from sentencepiece import SentencePieceTrainer

    directory.mkdir()
    with (directory / "tokenizer.model").open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(english[:15]).splitlines()),
            model_writer=stream,
            vocab_size=300,
            minloglevel=2,
            **settings,
        )
    return directory


@pytest.fixture(scope="module")
def kinds(
    english: list[str], small: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A directory of each kind, by the name that the analysis gives it."""
    root = tmp_path_factory.mktemp("kinds")
    only_model = root / "only-model"
    only_model.mkdir()
    (only_model / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    return {
        "byte-level BPE": save(byte_level(english), root / "byte-level"),
        "Unigram": save(unigram(english), root / "unigram"),
        "WordPiece": save(word_piece(english), root / "word-piece"),
        "SentencePiece BPE": small,
        "SentencePiece Unigram": sentencepiece(english, root / "sp-unigram", model_type="unigram"),
        "SentencePiece word": sentencepiece(
            english, root / "sp-word", model_type="word", hard_vocab_limit=False
        ),
        "bare SentencePiece BPE": only_model,
    }


def test_every_kind_is_named_and_encodes_as_its_library_does(
    kinds: dict[str, Path], english: list[str]
) -> None:
    from sentencepiece import SentencePieceProcessor

    for kind, directory in kinds.items():
        opened = open_tokenizer(directory)
        assert opened.kind == kind.removeprefix("bare ")
        texts = [*english[:5], TEXT]
        if opened.slow:
            plain = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
            assert opened.slow.encode(texts) == [plain.encode(text) for text in texts]
            assert opened.main is opened.slow
        else:
            library = Tokenizer.from_file(str(directory / "tokenizer.json"))
            assert opened.main.encode(texts) == [library.encode(text).ids for text in texts]


@pytest.mark.parametrize("half", ["slow", "fast"])
def test_tokens_spell_the_text_byte_for_byte(half: str, kinds: dict[str, Path]) -> None:
    for kind in ("byte-level BPE", "SentencePiece BPE", "SentencePiece Unigram", "Unigram"):
        found = getattr(open_tokenizer(kinds[kind]), half)
        if found is None:
            assert kind in ("byte-level BPE", "Unigram")
            continue
        # The trained normaliser of the SentencePiece Unigram model joins spaces.
        text = "the naïve 依山 reader" if "Unigram" in kind else TEXT
        tokens = found.tokens(text)
        assert [token.id for token in tokens] == found.encode([text])[0]
        spelled = b"".join(token.data for token in tokens).decode("utf-8")
        assert spelled.removeprefix("▁") == text.replace(" ", "▁")


def test_byte_alphabet_is_the_librarys() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("é 依", "\x00\x7f\n ~"):
        ((spelled, _),) = spelling.pre_tokenize_str(text)
        assert bytes(alphabet[character] for character in spelled) == text.encode("utf-8")


def test_trained_bpe_has_no_dead_pieces(kinds: dict[str, Path]) -> None:
    for kind in ("byte-level BPE", "SentencePiece BPE"):
        opened = open_tokenizer(kinds[kind])
        assert [half.unreachable() for half in (opened.slow, opened.fast) if half] in (
            [[]],
            [[], []],
        )
    assert open_tokenizer(kinds["WordPiece"]).main.unreachable() is None


def test_dead_pieces_of_a_byte_level_vocabulary_are_found(
    kinds: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads((kinds["byte-level BPE"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, spelled = content["model"]["vocab"], {v: k for k, v in byte_alphabet().items()}
    mountain = [spelled[byte] for byte in "山".encode()]
    # Merged to the end; merged half; never merged; merged, but two words for the pre-tokenizer.
    for piece in ("".join(mountain), "".join(mountain[:2]), "zqzq", "Ġ1x", "".join(mountain[1:])):
        vocabulary[piece] = len(vocabulary)
    content["model"]["merges"] += [[*mountain[:2]], ["".join(mountain[:2]), mountain[2]]]
    content["model"]["merges"] += [["Ġ", "1"], ["Ġ1", "x"]] if "Ġ1" in vocabulary else []
    vocabulary.setdefault("Ġ1", len(vocabulary))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert set(open_tokenizer(tmp_path).main.unreachable() or []) >= {
        "zqzq",
        "Ġ1x",
        "".join(mountain[1:]),
    }
    alive = {"".join(mountain), "".join(mountain[:2])}
    assert not alive & set(open_tokenizer(tmp_path).main.unreachable() or [])


def test_dead_pieces_are_found_in_both_halves_of_a_sentencepiece_model(
    small: Path, tmp_path: Path
) -> None:
    model = parse_model(small / "tokenizer.model")
    # "zqzq" has no halves; "依山" has one, but "山" is no piece.
    for piece in ("zqzq", "依山", "依"):
        model.pieces.add(piece=piece, score=-1e6, type=1)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    opened = open_tokenizer(tmp_path)
    assert opened.fast_source == "converted by transformers"
    assert opened.slow is not None
    assert opened.fast is not None
    # SentencePiece merges any two neighbours that are a piece together, known or not.
    assert opened.slow.unreachable() == ["zqzq"]
    assert opened.fast.unreachable() == ["zqzq", "依山"]


@pytest.mark.parametrize("where", ["normalizer", "pre_tokenizer"])
def test_prefix_makes_no_piece_unreachable(where: str, tmp_path: Path) -> None:
    # After a prefix "ab" would become "▁a", "b"; other characters are not known at all.
    vocabulary = {piece: key for key, piece in enumerate(["▁", "a", "b", "▁a", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("a", "b")]))
    if where == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    opened = open_tokenizer(save(tokenizer, tmp_path / "prefixed"))
    assert opened.main.encode(["ab"]) == [[3, 2]]
    assert opened.main.unreachable() == []


def test_dummy_prefix_makes_no_piece_unreachable(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    model.normalizer_spec.add_dummy_prefix = True
    model.pieces.add(piece="<unk>", type=2)
    # "ab" would lose its "a" to the prefix, and to every neighbour that is tried.
    pieces = [f"{before}a" for before in dict.fromkeys(["▁", *(one for one, _ in NEIGHBOURS)])]
    characters = sorted(set("".join([*pieces, "b"])))
    for piece in [*pieces, "ab", *characters]:
        model.pieces.add(piece=piece, score=-float(len(model.pieces)), type=NORMAL)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    opened = open_tokenizer(tmp_path)
    assert "ab" not in {opened.pieces[key] for key in opened.main.encode(["ab"])[0]}
    assert opened.main.unreachable() == []


def test_piece_that_only_running_text_gives_is_reachable(tmp_path: Path) -> None:
    # The first space of a text is lost, so " a" alone is "a".
    vocabulary = {piece: key for key, piece in enumerate(["▁", "(", ")", "a", "b", "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert open_tokenizer(save(tokenizer, tmp_path / "words")).main.unreachable() == []


def test_whole_word_look_up_hides_no_dead_piece(small: Path, tmp_path: Path) -> None:
    content = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["zqzq"] = len(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert open_tokenizer(tmp_path).main.unreachable() == ["zqzq"]


def test_user_defined_symbol_is_reachable_and_what_holds_it_is_not(
    small: Path, tmp_path: Path
) -> None:
    model = parse_model(small / "tokenizer.model")
    (symbol,) = (entry for entry in model.pieces if entry.piece == "th")
    symbol.type = USER_DEFINED
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    slow = open_tokenizer(tmp_path).slow
    assert slow is not None
    dead = slow.unreachable()
    assert dead
    assert "▁the" in dead
    assert all("th" in piece for piece in dead)


def test_special_tokens_in_a_text_are_text(small: Path) -> None:
    opened = open_tokenizer(small)
    assert opened.slow is not None
    assert opened.fast is not None
    slow, fast = (half.encode(["a </s> b<unk>"])[0] for half in (opened.slow, opened.fast))
    assert slow == fast
    assert opened.slow.producible.issuperset(slow)
    assert 2 not in slow


def test_truncation_and_padding_in_the_file_are_not_applied(
    kinds: dict[str, Path], tmp_path: Path, english: list[str]
) -> None:
    library = Tokenizer.from_file(str(kinds["byte-level BPE"] / "tokenizer.json"))
    want = len(library.encode(english[0]).ids)
    library.enable_truncation(8)
    library.enable_padding(length=5000)
    library.save(str(tmp_path / "tokenizer.json"))
    assert [len(ids) for ids in open_tokenizer(tmp_path).main.encode([english[0]])] == [want]


def test_added_tokens_count_as_ids(small: Path, tmp_path: Path) -> None:
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = len(open_tokenizer(small).pieces)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": before + 3}))
    pieces = open_tokenizer(tmp_path).pieces
    assert len(pieces) == before + 4
    assert pieces[before:] == [None, None, None, "<pad>"]


def _nothing(path: Path) -> None:
    (path / "config.json").write_text("{}")


def _broken_json(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": "x"}}}')


def _empty_json(path: Path) -> None:
    content = Tokenizer(models.BPE()).to_str()
    (path / "tokenizer.json").write_text(content)


def _not_a_model(path: Path) -> None:
    (path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as tiktoken writes it


def _bad_added(path: Path) -> None:
    (path / "tokenizer.json").write_text(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    (path / "added_tokens.json").write_text('["<pad>"]')


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_nothing, "no tokenizer.model and no tokenizer.json"),
        (_broken_json, "tokenizer.json: cannot be loaded"),
        (_empty_json, "vocabulary is empty"),
        (_not_a_model, "tokenizer.model: not a SentencePiece model"),
        (_bad_added, "its added tokens cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_named(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=said) as raised:
        open_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_that_transformers_cannot_convert_keeps_its_slow_half(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "NoSuchTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = open_tokenizer(tmp_path)
    assert opened.fast is None
    assert opened.fast_source.startswith("none: ")
    assert opened.main is opened.slow
