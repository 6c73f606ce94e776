"""The extended tokenizer on real text: every piece alive, nothing old moved, all halves agree."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from colossal_llama import command
from colossal_llama.tokenizer.init_tokenizer import InitTokenizerOptions, init_tokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]
WritePieces = Callable[[Iterable[str]], Path]


@pytest.fixture(scope="module", params=["closed", "half", "three-characters", "longest-first"])
def case(
    request: pytest.FixtureRequest,
    llama2: Path,
    zh_file: Path,
    zh_pieces: list[str],
    corpora: dict[str, list[str]],
    write_pieces: WritePieces,
    run_file: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[str], Path]:
    """(pieces asked for, tokenizer extended by them), for lists with and without their parents."""
    pieces = zh_pieces
    if request.param == "half":
        pieces = random.Random(0).sample(zh_pieces, len(zh_pieces) // 2)
    elif request.param == "three-characters":
        han = [p for p in zh_pieces if len(p) == 1]
        threes = Counter(text[at : at + 3] for text in corpora["zh"] for at in range(len(text)))
        pieces = [p for p, _ in threes.most_common(3000) if len(p) == 3 and set(p) <= set(han)]
    elif request.param == "longest-first":
        pieces = sorted(zh_pieces, key=lambda piece: (-len(piece), piece))
    target = tmp_path_factory.mktemp("extended") / "llama2-zh"
    done = run_file(
        "init_tokenizer.py",
        "--source_tokenizer_dir", llama2,
        "--target_tokenizer_dir", target,
        "--expand_tokens_file", write_pieces(pieces),
        "--sample_file", zh_file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return pieces, target


@pytest.fixture(scope="module")
def old_ids(llama2: Path, corpora: dict[str, list[str]]) -> dict[str, tuple[list[int], list[int]]]:
    """Of each text that is not Chinese, from both halves of Llama 2's tokenizer."""
    encoder, fast = _sentencepiece(llama2), _fast(llama2)
    texts = corpora["en"] + corpora["code"]
    return {text: (encoder.encode(text), fast.encode(text).ids) for text in texts}


@pytest.fixture(scope="module")
def surviving(llama2: Path, corpora: dict[str, list[str]]) -> list[str]:
    """The texts that come back from Llama 2's ids as they were: most of them."""
    texts, fast = [text for texts in corpora.values() for text in texts], _fast(llama2)
    found = [text for text in texts if _comes_back(fast, text)]
    assert len(found) > 0.9 * len(texts)
    return found


def _comes_back(fast: Tokenizer, text: str) -> bool:
    return bool(fast.decode(fast.encode(text, add_special_tokens=False).ids) == text)


def _sentencepiece(directory: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def _fast(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _slow(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, use_fast=False)


def test_every_piece_is_produced_by_every_tokenizer(case: tuple[list[str], Path]) -> None:
    """Defects 5 and 20: a new piece that no tokenizer can produce is a wasted embedding row."""
    pieces, directory = case
    encoder, fast, slow = _sentencepiece(directory), _fast(directory), _slow(directory)
    assert len(pieces) > 500
    # A line end, spelled as a byte, keeps the dummy prefix away from the piece.
    before = encoder.encode("\n")
    assert before == [encoder.piece_to_id("▁"), encoder.piece_to_id("<0x0A>")]
    for number, piece in enumerate(pieces):
        expected = [*before, encoder.piece_to_id(piece)]
        assert expected[-1] != encoder.unk_id()
        assert encoder.encode("\n" + piece) == expected
        assert fast.encode("\n" + piece, add_special_tokens=False).ids == expected
        if number % 7 == 0:  # the slow tokenizer is slow
            assert slow.encode("\n" + piece, add_special_tokens=False) == expected


def test_old_text_keeps_its_ids(
    case: tuple[list[str], Path], old_ids: dict[str, tuple[list[int], list[int]]]
) -> None:
    """Defect 5: text without new characters is segmented exactly as before."""
    pieces, directory = case
    letters = set("".join(pieces))
    new, new_fast = _sentencepiece(directory), _fast(directory)
    texts = [text for text in old_ids if letters.isdisjoint(text)]
    assert len(texts) > 200
    for text in texts:
        assert (new.encode(text), new_fast.encode(text).ids) == old_ids[text]
    assert new.encode("Hello world") == [15043, 3186]


def test_tokenizers_agree_on_real_text(
    case: tuple[list[str], Path], corpora: dict[str, list[str]]
) -> None:
    """Defect 20: fast and slow must give the same ids, new pieces or not."""
    _, directory = case
    encoder, fast, slow = _sentencepiece(directory), _fast(directory), _slow(directory)
    auto = AutoTokenizer.from_pretrained(directory)
    assert auto.is_fast
    for texts in corpora.values():
        for number, text in enumerate(texts):
            ids = encoder.encode(text)
            assert fast.encode(text, add_special_tokens=False).ids == ids
            if number < 10:
                assert slow.encode(text, add_special_tokens=False) == ids
                assert auto.encode(text, add_special_tokens=False) == ids


def test_text_survives_the_round_trip(case: tuple[list[str], Path], surviving: list[str]) -> None:
    _, directory = case
    new = _fast(directory)
    assert all(_comes_back(new, text) for text in surviving)


def test_settings_and_old_ids_are_carried_over(case: tuple[list[str], Path], llama2: Path) -> None:
    """Defect 19: normaliser, legacy and every other flag stay what they were."""
    _, directory = case
    name = "tokenizer_config.json"
    assert (directory / name).read_bytes() == (llama2 / name).read_bytes()
    source, target = (json.loads((d / "tokenizer.json").read_text()) for d in (llama2, directory))
    for part in set(source) - {"model"}:
        assert target[part] == source[part]
    for part in set(source["model"]) - {"vocab", "merges"}:
        assert target["model"][part] == source["model"][part]
    assert source["model"]["vocab"].items() <= target["model"]["vocab"].items()
    old, new = _slow(llama2), _slow(directory)
    assert (new.legacy, new.add_bos_token, new.special_tokens_map) == (
        old.legacy,
        old.add_bos_token,
        old.special_tokens_map,
    )
    for key in range(len(old)):
        assert new.sp_model.id_to_piece(key) == old.sp_model.id_to_piece(key)
        assert new.sp_model.get_score(key) == old.sp_model.get_score(key)


def test_report_adds_up(case: tuple[list[str], Path], llama2: Path) -> None:
    pieces, directory = case
    report = json.loads((directory / "extension_report.json").read_text(encoding="utf-8"))
    assert report["pieces_asked_for"] == len(pieces)
    assert report["pieces_added"] + report["pieces_already_there"] == len(pieces)
    assert report["pieces_unreachable"] == 0
    grown = report["size_after"] - report["size_before"]
    besides = len(report["characters_added"]) + len(report["pieces_repaired"])
    assert grown == report["pieces_added"] + besides
    assert report["size_after"] == len(_sentencepiece(directory))
    assert sum(report["pieces_produced_between"].values()) == grown
    sample = report["sample"]
    assert sample["documents"] == 150
    assert sample["bytes_per_token_after"] > 1.15 * sample["bytes_per_token_before"]
    assert sample["documents_that_came_back_before"] > 140


def test_closed_list_needs_no_repair(
    llama2: Path, zh_pieces: list[str], write_pieces: WritePieces, tmp_path: Path
) -> None:
    """A list in learned order brings its own parents; duplicates and old pieces are counted."""
    pieces = [*zh_pieces, *zh_pieces[:20], "the", "的"]
    assert extend(_flags(llama2, tmp_path / "out", write_pieces(pieces))) == 0
    report = json.loads((tmp_path / "out" / "extension_report.json").read_text(encoding="utf-8"))
    vocabulary = _vocabulary(llama2)
    there = sum(piece in vocabulary for piece in pieces)
    assert report["pieces_already_there"] == there
    assert report["pieces_duplicate"] + report["pieces_added"] + there == len(pieces)
    assert report["pieces_duplicate"] > 0
    assert len(report["pieces_repaired"]) < 0.02 * len(pieces)


def test_same_input_same_bytes(small: Path, write_pieces: WritePieces, tmp_path: Path) -> None:
    path = write_pieces(["您好", "程序设计语言", "▁hola", "señor", "123"])
    for name in ("a", "b"):
        assert extend(_flags(small, tmp_path / name, path)) == 0
    files = sorted(item.name for item in (tmp_path / "a").iterdir())
    assert files == sorted(item.name for item in (tmp_path / "b").iterdir())
    assert {"tokenizer.model", "tokenizer.json", "special_tokens_map.json"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_source_without_a_fast_half(
    shared_data: Path, corpora: dict[str, list[str]], write_pieces: WritePieces, tmp_path: Path
) -> None:
    """A missing tokenizer.json and missing settings are made."""
    source = shared_data / "tokenizers" / "mistral-v1"
    pieces = ["龘靐齉", "齾爩", "葡萄美酒夜光杯"]
    assert extend(_flags(source, tmp_path / "out", write_pieces(pieces))) == 0
    old, new = _sentencepiece(source), _sentencepiece(tmp_path / "out")
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.is_fast
    assert all(piece in new.encode(piece, out_type=str) for piece in pieces)
    for name, texts in corpora.items():
        for text in texts[:50]:
            ids = new.encode(text)
            assert auto.encode(text, add_special_tokens=False) == ids
            assert name == "zh" or old.encode(text) == ids


BAD_LINES = {
    "no key": ('{"token": "你好"}', 'no "piece"'),
    "not text": ('{"piece": 3}', "int"),
    "empty": ('{"piece": ""}', "empty"),
    "space": ('{"piece": "你 好"}', "U+0020"),
    "ideographic space": ('{"piece": "你\u3000"}', "U+3000"),
    "line end": ('{"piece": "你\\n"}', "U+000A"),
    "null": ('{"piece": "\\u0000"}', "U+0000"),
    "half a pair": ('{"piece": "\\ud83d"}', "surrogate"),
    "special token": ('{"piece": "</s>"}', "special token"),
    "special token inside": ('{"piece": "你</s>好"}', "special token"),
    "byte token": ('{"piece": "<0x41>"}', "special token"),
    "unknown type": ('{"piece": "你", "type": "control"}', "expected normal or user_defined"),
    "symbol that is a piece": ('{"piece": "e", "type": "user_defined"}', "ordinary piece"),
    "symbol in a special token": ('{"piece": "x</s>", "type": "user_defined"}', "special token"),
    "piece with a symbol": (
        '{"piece": "<h1>", "type": "user_defined"}\n{"piece": "x<h1>"}',
        "user-defined symbol",
    ),
    "piece and symbol": (
        '{"piece": "<h1>", "type": "user_defined"}\n{"piece": "<h1>"}',
        "user-defined symbol",
    ),
    "too long": ('{"piece": "' + "字" * 257 + '"}', "257 characters, more than 256"),
    "not JSON": ('{"piece": ', "not JSON"),
    "not an object": ('["你好"]', "expected a JSON object"),
}


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(
    line: str, complaint: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pieces.jsonl"
    path.write_text('{"piece": "您好"}\n' + line + "\n", encoding="utf-8")
    assert extend(_flags(small, tmp_path / "out", path)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"{path}:{line.count(chr(10)) + 2}:" in message
    assert complaint in message
    assert [item.name for item in tmp_path.iterdir()] == ["pieces.jsonl"]


def test_a_required_character_may_be_a_symbol(small: Path, tmp_path: Path) -> None:
    (tmp_path / "required.txt").write_text("\ufeff龘好\n", encoding="utf-8")  # with a mark
    (tmp_path / "pieces.jsonl").write_text('{"piece": "龘", "type": "user_defined"}')
    flags = _flags(small, tmp_path / "out", tmp_path / "pieces.jsonl")
    assert extend([*flags, "--required_chars", tmp_path / "required.txt"]) == 0
    report = json.loads((tmp_path / "out" / "extension_report.json").read_text(encoding="utf-8"))
    assert (report["symbols_added"], report["required_characters_added"]) == (["龘"], ["好"])
    assert report["size_after"] == report["size_before"] + 2


def test_a_symbol_may_hold_an_old_symbol(small: Path, tmp_path: Path) -> None:
    """The longer one is found in a text."""
    for source, target, symbol in ((small, "one", "<h1>"), (tmp_path / "one", "two", "x<h1>")):
        path = tmp_path / "pieces.jsonl"
        path.write_text(json.dumps({"piece": symbol, "type": "user_defined"}), encoding="utf-8")
        assert extend(_flags(source, tmp_path / target, path)) == 0
    encoder, fast = _sentencepiece(tmp_path / "two"), _fast(tmp_path / "two")
    assert encoder.encode("ax<h1>b<h1>") == fast.encode("ax<h1>b<h1>").ids[1:]
    assert fast.encode("ax<h1>b<h1>").tokens[-3:] == ["x<h1>", "b", "<h1>"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--calibration", "max"], "--calibrate_from, which is missing"),
        (["--pad_vocab_to_multiple_of", 0], "from 1 to 65536"),
        (["--pad_vocab_to_multiple_of", 10**9], "from 1 to 65536"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[object],
    complaint: str,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert extend([*_flags(small, tmp_path / "out", tmp_path / "none.jsonl"), *flags]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert complaint in message


def test_a_mistake_ends_the_real_command_with_2(
    small: Path, write_pieces: WritePieces, run_file: Run, tmp_path: Path
) -> None:
    done = run_file("init_tokenizer.py", *_flags(small, tmp_path / "out", write_pieces(["a b"])))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_refused_sources(
    shared_data: Path,
    small: Path,
    write_pieces: WritePieces,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A source that cannot be extended truly is refused by name, and nothing is written."""
    unigram, broken, padded, other = (
        tmp_path / name for name in ("unigram", "broken", "padded", "other")
    )
    for directory in (unigram, broken):
        directory.mkdir()
    fast = {"model": {"type": "Unigram", "vocab": [["a", 0]]}}
    (unigram / "tokenizer.json").write_text(json.dumps(fast))
    (broken / "tokenizer.model").write_bytes(b"no model")
    shutil.copytree(small, padded)
    (padded / "added_tokens.json").write_text('{"<pad>": 702}')
    shutil.copytree(small, other)
    shutil.copyfile(
        shared_data / "tokenizers" / "llama2" / "tokenizer.model", other / "tokenizer.model"
    )
    cases = {
        tmp_path / "nowhere": "no such tokenizer directory",
        unigram: "Unigram",
        broken: "not a SentencePiece model",
        padded: "id 700 is nobody's",
        other: "disagree",
        shared_data / "tokenizers" / "llama-zh-128k": "nmt_nfkc",
    }
    path = write_pieces(["您好"])
    for source, complaint in cases.items():
        assert extend(_flags(source, tmp_path / "out", path)) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert str(source) in message
        assert complaint in message
        assert not (tmp_path / "out").exists()


def test_existing_output_needs_overwrite(
    small: Path, write_pieces: WritePieces, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    flags = _flags(small, tmp_path / "out", write_pieces(["您好"]))
    assert extend(flags) == 2
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert extend([*flags, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def extend(flags: list[object]) -> int:
    """The command, in this process; the exit code."""
    return command.run(InitTokenizerOptions, init_tokenizer, list(map(str, flags)))


def _flags(source: Path, target: Path, pieces: Path) -> list[object]:
    return [
        "--source_tokenizer_dir", source,
        "--target_tokenizer_dir", target,
        "--expand_tokens_file", pieces,
    ]  # fmt: skip


def _vocabulary(directory: Path) -> dict[str, int]:
    return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
