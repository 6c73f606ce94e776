"""Extended byte-level BPE tokenizers: every piece alive, nothing old moved, slow and fast agree."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from colossal_llama.tokenizer import byte_level, extension, extension_report, neighbours
from colossal_llama.tokenizer.byte_level import ByteLevelTokenizer
from colossal_llama.tokenizer.byte_level_files import (
    read_byte_level,
)
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from tests.tokenizer.byte_level_styles import (
    HAN,
    SLOW,
    STYLES,
    foreign_text,
    make_all,
    read_json,
)


def _wanted() -> list[str]:
    """Pieces without their parents: Chinese, words with a space before them, rare scripts."""
    dice = random.Random(1)
    made = ["".join(dice.choices(HAN[:400], k=dice.randint(1, 6))) for _ in range(300)]
    made += ["▁người", "▁привет", "ще", "ﷺ", "한국어", "𠀀𠀁", "▁𠀂", "日本語の", "▁ñú", "中文字"]
    return list(dict.fromkeys(made))


@dataclass(frozen=True)
class Case:
    style: str
    source: Path
    target: Path
    old: ByteLevelTokenizer
    extended: extension.Extension
    wanted: list[str]  # with ▁ for a space

    def texts(self) -> list[str]:
        return [piece.replace("▁", " ") for piece in self.wanted]

    def fast(self) -> tuple[Tokenizer, Tokenizer]:
        """(before, after)"""
        return tuple(  # type: ignore[return-value]
            Tokenizer.from_file(str(path / "tokenizer.json")) for path in (self.source, self.target)
        )


def _extend(source: ByteLevelTokenizer, texts: list[str], **how: Any) -> extension.Extension:
    known = {*source.pieces(), *source.reserved()}
    pieces = [source.spell(text) for text in texts if source.spell(text) not in known]
    return extension.extend(source, pieces, **how)


def _written(extended: extension.Extension, target: Path, source: Path) -> Path:
    target.mkdir()
    extended.tokenizer.write(target, settings_from=source)
    return target


@pytest.fixture(scope="module")
def sources(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("byte-level"), english)


@pytest.fixture(scope="module", params=STYLES)
def case(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    source = sources[request.param]
    old, wanted = read_byte_level(source), _wanted()
    assert all(old.problem_of(piece) is None for piece in wanted)
    extended = _extend(old, wanted)
    target = _written(extended, tmp_path_factory.mktemp("extended") / request.param, source)
    return Case(request.param, source, target, old, extended, wanted)


@pytest.fixture(scope="module")
def plain(sources: dict[str, Path]) -> ByteLevelTokenizer:
    return read_byte_level(sources["gpt2"])


def _halves(case: Case) -> list[Any]:
    """Encoders of the written files: text -> ids, without special tokens."""
    _, fast = case.fast()
    auto = AutoTokenizer.from_pretrained(case.target)
    assert auto.is_fast
    found: list[Any] = [
        lambda text: fast.encode(text, add_special_tokens=False).ids,
        lambda text: auto.encode(text, add_special_tokens=False),
    ]
    if case.style in SLOW:
        slow = AutoTokenizer.from_pretrained(case.target, use_fast=False)
        assert not slow.is_fast
        found.append(lambda text: slow.encode(text, add_special_tokens=False))
    return found


# 1. every piece is produced


def test_every_piece_is_produced_by_every_tokenizer(case: Case) -> None:
    new, halves = case.extended.tokenizer, _halves(case)
    vocabulary = new.fast["model"]["vocab"]
    assert len(case.wanted) > 300
    assert {new.spell(piece) for piece in case.wanted} <= vocabulary.keys()
    for piece, text in zip(case.wanted, case.texts(), strict=True):
        own = [vocabulary[new.spell(piece)]]
        between = [
            all(e(a + text + b) == [*e(a), *own, *e(b)] for e in halves)
            for a, b in neighbours.NEIGHBOURS
        ]
        assert all(encode(text) == own for encode in halves)
        assert any(between), text


def test_merging_alone_produces_every_piece(case: Case) -> None:
    """Llama 3 looks whole words up first: without a look here, dead merges would stay unseen."""
    pieces = [case.old.spell(piece) for piece in case.wanted]
    assert case.extended.tokenizer.segment(pieces) == [[piece] for piece in pieces]


def test_dead_pieces_are_noticed(sources: dict[str, Path]) -> None:
    """The check itself: a piece whose steps are missing is found, look-up of words or not."""
    for source in map(read_byte_level, sources.values()):
        pieces = [source.spell(text) for text in ("龘靐齉", "齾")]
        assert source.extended(pieces).production(pieces).missing == pieces


def test_a_look_up_of_words_does_not_hide_dead_pieces(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between neighbours that leave it a word of its own, Llama 3 finds any piece."""
    monkeypatch.setattr(neighbours, "NEIGHBOURS", (("0", "\n"),))
    source = read_byte_level(sources["llama3"])
    piece = source.spell("龘靐齉")
    extended = source.extended([piece])
    (found,) = extended.encode(["0龘靐齉\n"])
    assert found[1] == source.size
    assert extended.production([piece]).missing == [piece]


def test_a_slow_half_that_differs_is_noticed(plain: ByteLevelTokenizer) -> None:
    extended = _extend(plain, ["龘靐"])
    tokenizer, piece = extended.tokenizer, plain.spell("龘靐")
    assert isinstance(tokenizer, ByteLevelTokenizer)
    slow = tokenizer._slow
    assert slow is not None
    left, right = tokenizer._merges_into([piece])[-1]
    del slow.bpe_ranks[(left, right)]
    slow.cache.clear()
    assert tokenizer.disagreements(["龘靐", "hello"]) == ["龘靐"]
    assert tokenizer.production([piece]).missing == [piece]


@pytest.mark.parametrize("seed", range(3))
def test_random_lists_become_reachable(plain: ByteLevelTokenizer, seed: int) -> None:
    """Many overlap, few have parents, and characters share their bytes: the hardest lists."""
    dice = random.Random(seed)
    made = ("".join(dice.choices("甲申由电甴ab𠀀𠀁é", k=dice.randint(1, 6))) for _ in range(120))
    extended = _extend(plain, list(dict.fromkeys(made)))
    assert extended.tokenizer.production(extended.pieces).missing == []
    assert len(set(extended.pieces)) == len(extended.pieces)


# 3. other text stays as it was


def test_repairs_do_not_cut_characters(case: Case) -> None:
    """A character's bytes are joined before anything is joined to it: 研 + a byte is no step.

    Unless the source has pieces that cut a character: its merges come first.
    """
    text = case.extended.tokenizer.text

    def cuts(piece: str) -> bool:
        return "\ufffd" in text(piece) and text(piece).strip("\ufffd") != ""

    old = [piece for piece in case.old.pieces() if cuts(piece)]
    for piece in filter(cuts, case.extended.repaired):
        assert any(other in piece for other in old), text(piece)
    assert case.extended.characters
    assert all(len(text(piece)) == 1 for piece in case.extended.characters)
    report = extension_report.describe(case.old, case.extended)
    assert len(report["pieces_repaired"]) == len(case.extended.repaired)
    assert "\ufffd" not in "".join(report["characters_added"] + report["pieces_repaired"])


def test_text_without_an_added_piece_keeps_its_ids(case: Case, english: list[str]) -> None:
    dice = random.Random(2)
    # Also the neighbours of new characters, which share bytes with them, and every plane.
    near = [chr(ord(c) + d) for c in HAN[:400] for d in (-1, 1, 5)] + list("éñ—“”…🙂 \n\tab1")
    mixed = ["".join(dice.choices(near, k=6)) for _ in range(3000)]
    wild = [chr(dice.choice([0x80, 0x800, 0x10000]) + dice.randrange(9999)) for _ in range(3000)]
    texts = _without_added_pieces(case, [*english[::3], *mixed, *wild])
    assert len(texts) > len(english[::3]) + 500
    _same_ids(case, texts)


def _without_added_pieces(case: Case, texts: list[str]) -> list[str]:
    """The texts in whose bytes no added piece occurs, steps included."""
    spelled = ((text, byte_level._spelled(text)) for text in texts)
    added = case.extended.pieces
    return [text for text, spelling in spelled if not any(piece in spelling for piece in added)]


def _same_ids(case: Case, texts: list[str]) -> None:
    old, new = case.fast()
    for before, after in zip(old.encode_batch(texts), new.encode_batch(texts), strict=True):
        assert before.ids == after.ids


def test_untouched_characters_hold_no_added_piece(case: Case) -> None:
    touched = case.old.touched_characters(case.extended.pieces)
    alphabet = [c for c in map(chr, [*range(0xD800), *range(0x1F000, 0x22000)]) if c not in touched]
    texts = ["".join(alphabet[at : at + 1000]) for at in range(0, len(alphabet), 1000)]
    assert _without_added_pieces(case, texts) == texts


def test_touched_characters_are_no_more_than_share_their_bytes(plain: ByteLevelTokenizer) -> None:
    """A step of two bytes is shared by 64 characters; without steps only asked-for ones change."""
    assert plain.touched_characters([plain.spell("▁né")]) == set("né")
    step = plain.spell("本")[:2]
    assert plain.touched_characters([step]) == {chr(code) for code in range(0x6700, 0x6740)}
    assert len(plain.touched_characters([plain.spell("𠀀")[:3]])) == 64
    # The byte F4 starts no character above U+10FFFF, nor E0 one below U+0800.
    assert all(ord(c) > 0x7FF for c in plain.touched_characters([plain.spell("ࠀ")[:1]]))


def test_real_english_and_code_keep_their_ids(case: Case, corpora: dict[str, list[str]]) -> None:
    texts = _without_added_pieces(case, corpora["en"][:50] + corpora["code"][:50])
    assert len(texts) > 70
    _same_ids(case, texts)


# 2. and 4. agreement, ids, round trip


def test_slow_and_fast_agree(case: Case) -> None:
    texts = [
        *foreign_text(3, 100, HAN),
        "Hello\n\nworld  12345 it's",
        "e\u0301 I'LL",
        *case.texts(),
    ]
    encode, *others = _halves(case)
    for text in texts:
        assert all(other(text) == encode(text) for other in others)
    assert case.extended.tokenizer.disagreements(texts) == []


def test_agreement_and_round_trip_on_real_text(case: Case, corpora: dict[str, list[str]]) -> None:
    texts = [text for texts in corpora.values() for text in texts[:15]]
    assert case.extended.tokenizer.disagreements(texts) == []
    assert _kept(case, texts) > 0.9 * len(texts)


def test_text_survives_the_round_trip(case: Case, english: list[str]) -> None:
    texts = [
        *english[::3],
        *foreign_text(4, 300, HAN),
        *case.texts(),
        "a  b\t\n\n c",
        "\u0000\u0085",
    ]
    assert _kept(case, texts) > 0.9 * len(texts)


def _kept(case: Case, texts: list[str]) -> int:
    """Number of texts that came back before; all of them still do."""

    def comes_back(fast: Tokenizer, text: str) -> bool:
        ids = fast.encode(text, add_special_tokens=False).ids
        return fast.decode(ids, skip_special_tokens=False) == text

    old, new = case.fast()
    kept = [text for text in texts if comes_back(old, text)]
    assert all(comes_back(new, text) for text in kept)
    return len(kept)


def test_old_ids_and_special_tokens_stay(case: Case) -> None:
    old, new = case.fast()
    size = old.get_vocab_size()
    assert case.old.size == size
    assert [new.id_to_token(key) for key in range(size)] == [
        old.id_to_token(key) for key in range(size)
    ]
    before = {key: repr(token) for key, token in old.get_added_tokens_decoder().items()}
    assert {k: repr(t) for k, t in new.get_added_tokens_decoder().items()} == before
    text = "a<|endoftext|>b <|im_start|><|eot_id|>" + "".join(case.old.added.values())
    assert new.encode(text).ids == old.encode(text).ids  # with bos, where the style has one
    for tokenizer in (old, new):  # as text, not as special tokens
        tokenizer.encode_special_tokens = True
    assert new.encode(text).ids == old.encode(text).ids


def test_ids_follow_each_other_and_transformers_knows_them(case: Case, tmp_path: Path) -> None:
    source, auto = (AutoTokenizer.from_pretrained(path) for path in (case.source, case.target))
    extended = case.extended
    assert len(auto) == extended.tokenizer.size == case.old.size + len(extended.pieces)
    keys = range(case.old.size, len(auto))
    assert auto.convert_ids_to_tokens(keys) == extended.pieces
    assert auto.all_special_tokens == source.all_special_tokens
    assert auto.all_special_ids == source.all_special_ids
    auto.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(case.target)


def test_nothing_but_vocabulary_and_merges_changes(case: Case) -> None:
    name = "tokenizer_config.json"
    assert (case.target / name).read_bytes() == (case.source / name).read_bytes()
    assert {p.name for p in case.target.iterdir()} == {p.name for p in case.source.iterdir()}
    source, target = (read_json(p / "tokenizer.json") for p in (case.source, case.target))
    for part in set(source) - {"model"}:
        assert target[part] == source[part]
    for part in set(source["model"]) - {"vocab", "merges"}:
        assert target["model"][part] == source["model"][part]
    merges = source["model"]["merges"]
    assert target["model"]["merges"][: len(merges)] == merges
    assert {type(merge) for merge in target["model"]["merges"]} == {type(merges[0])}


def test_an_extended_tokenizer_can_be_extended(case: Case, tmp_path: Path) -> None:
    once = read_byte_level(case.target)
    twice = _extend(
        once, ["龘靐齉", "한국어사람", case.wanted[0]], symbols=["<h1>"], multiple_of=64
    )
    path = _written(twice, tmp_path / "twice", case.target)
    assert twice.tokenizer.size % 64 == 0
    old, new = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (case.target, path))
    assert all(new.id_to_token(key) == old.id_to_token(key) for key in range(once.size))
    assert read_byte_level(path).pieces() == twice.tokenizer.pieces()


def test_same_input_same_bytes(case: Case, tmp_path: Path) -> None:
    again = _extend(read_byte_level(case.source), case.wanted)
    path = _written(again, tmp_path / "again", case.source)
    for file in case.target.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


# symbols and padding


@pytest.mark.parametrize("style", STYLES)
def test_symbols_and_padding(style: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = read_byte_level(sources[style])
    symbols = [source.spell(text) for text in ("<h1>", "</h1>", "【标题】")]
    extended = _extend(source, ["龘靐"], symbols=symbols, multiple_of=64)
    path = _written(extended, tmp_path / "out", sources[style])
    fast = Tokenizer.from_file(str(path / "tokenizer.json"))
    keys = [fast.token_to_id(text) for text in ("<h1>", "</h1>", "【标题】")]
    start = source.size + len(extended.pieces)
    assert keys == [start, start + 1, start + 2]
    assert fast.encode("a<h1>龘靐</h1>【标题】").ids[-4:] == [
        keys[0], fast.token_to_id(source.spell("龘靐")), keys[1], keys[2],
    ]  # fmt: skip
    assert extended.tokenizer.symbols() - source.symbols() == set(symbols)
    assert fast.decode([keys[0], keys[2]]) == "<h1>【标题】"  # not special: stays in the text
    unused = range(keys[2] + 1, extended.tokenizer.size)
    assert len(unused) == extended.padding > 0
    _no_text_becomes(unused, fast, path)
    auto = AutoTokenizer.from_pretrained(path, use_fast=style not in SLOW)
    text = "x<h1>y【标题】 龘靐 <h1"
    assert (
        auto.encode(text, add_special_tokens=False)
        == fast.encode(text, add_special_tokens=False).ids
    )
    assert isinstance(auto.decode(list(unused)), str)


def _no_text_becomes(unused: range, fast: Tokenizer, path: Path) -> None:
    """Neither its name, nor what its bytes decode to, nor its name as one word of any cut."""
    for key in unused:
        name = fast.id_to_token(key)
        texts = {name, fast.decode([key]), f" {name}", name.replace("ÿ", "")}
        for text in texts:
            assert key not in fast.encode(text, add_special_tokens=False).ids
    model = read_json(path / "tokenizer.json")["model"]
    made = {"".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]}
    assert made.isdisjoint(map(fast.id_to_token, unused))


def test_padding_gets_names_that_are_free(plain: ByteLevelTokenizer) -> None:
    name = "<unused_0>ÿ"
    extended = _extend(plain, [], symbols=[plain.spell(name)], multiple_of=64)
    vocabulary = extended.tokenizer.fast["model"]["vocab"]
    assert vocabulary[name] == plain.size
    assert len(vocabulary) == extended.tokenizer.size
    assert extended.tokenizer.size % 64 == 0


def test_a_look_up_of_words_cannot_find_padding(sources: dict[str, Path]) -> None:
    """Without a pre-tokenizer's cuts ignore_merges looks whole texts up: the worst case."""
    source = read_byte_level(sources["llama3"])
    fast = source.extended([], padding=3).fast
    uncut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    loaded = Tokenizer.from_str(
        json.dumps({**fast, "pre_tokenizer": {**uncut, "use_regex": False}})
    )
    assert loaded.encode("the", add_special_tokens=False).tokens == ["the"]
    for key in range(source.size, source.size + 3):
        name = loaded.id_to_token(key)
        assert key not in loaded.encode(name, add_special_tokens=False).ids
        assert key not in loaded.encode(name.rstrip("ÿ"), add_special_tokens=False).ids


def test_the_alphabet_is_the_librarys() -> None:
    assert set(byte_level._CHARACTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(byte_level._BYTES) == 256
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x800))) + "一𠀀\U0010ffff"
    ((spelled, _),) = cut.pre_tokenize_str(text)
    assert byte_level._spelled(text) == spelled
