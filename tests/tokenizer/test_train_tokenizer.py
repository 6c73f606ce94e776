"""A learned tokenizer: Llama's format, the same for any number of threads, no text skipped."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from colossal_llama import command
from colossal_llama.tokenizer.sentencepiece_model import read_model
from colossal_llama.tokenizer.train_tokenizer import TrainTokenizerOptions, train_tokenizer

ORDINARY = [
    "Hello world",
    " a leading space, and  two",
    "def f(x):\n    return x + 1\n\tdone",
    "数字 123，标点。",
    "naïve café 🙂 ©",
    "trailing space ",
    "\n\nlines\r\n",
]


def learn(source: Path, target: Path, *flags: object) -> int:
    given = ["--data_input_dirs", source, "--target_tokenizer_dir", target, *flags]
    return command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, given)))


@pytest.fixture(scope="module")
def text(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text("\n".join(english[:30]), encoding="utf-8")
    return path


def test_slow_fast_and_sentencepiece_agree(small: Path, english: list[str]) -> None:
    """The default ``legacy`` is the value for which all three do the same on ordinary text."""
    encoder = SentencePieceProcessor(model_file=str(small / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(small)
    slow = AutoTokenizer.from_pretrained(small, use_fast=False)
    assert fast.is_fast
    assert not slow.is_fast
    for text in [*ORDINARY, *english]:
        ids = encoder.encode(text)
        assert fast.encode(text) == slow.encode(text) == [encoder.bos_id(), *ids]
        assert fast.decode(ids) == encoder.decode(ids)


def test_llama_settings(small: Path) -> None:
    model = read_model(small / "tokenizer.model")
    encoder = SentencePieceProcessor(model_file=str(small / "tokenizer.model"))
    assert (encoder.unk_id(), encoder.bos_id(), encoder.eos_id(), encoder.pad_id()) == (0, 1, 2, -1)
    assert [entry.piece for entry in model.pieces[3:6]] == ["<0x00>", "<0x01>", "<0x02>"]
    assert model.trainer_spec.byte_fallback
    assert model.trainer_spec.split_digits
    assert model.normalizer_spec.add_dummy_prefix
    assert not any(re.search(r"\d\d|[\x00-\x1f]", entry.piece) for entry in model.pieces[259:])
    unseen = "龘\t"
    assert encoder.decode(encoder.encode(unseen)) == unseen


def test_the_result_does_not_depend_on_threads_or_place(text: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "renamed.txt"
    copy.write_bytes(text.read_bytes())
    assert learn(text, tmp_path / "a", "--vocab_size", 500, "--num_threads", 1) == 0
    assert learn(copy, tmp_path / "b", "--vocab_size", 500, "--num_threads", 7) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"tokenizer.model", "tokenizer.json", "pieces.jsonl"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_named_limits_are_the_true_ones(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too high and too low a size are refused with a number; that number works."""
    for wrong, step in ((10_000_000, 1), (260, -1)):
        assert learn(text, tmp_path / "no", "--vocab_size", wrong) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        (limit,) = map(int, re.findall(r"(?:at most|at least) (\d+)", message))
        assert learn(text, tmp_path / f"at {limit}", "--vocab_size", limit) == 0
        assert learn(text, tmp_path / "no", "--vocab_size", limit + step) == 2
        assert not (tmp_path / "no").exists()
        capsys.readouterr()


def test_pieces_of_a_script(zh_tokenizer: Path, zh_pieces: list[str]) -> None:
    """Han pieces only: merged ones in learned order, then characters; no ASCII, no space."""
    model = read_model(zh_tokenizer / "tokenizer.model")
    rank = {entry.piece: -entry.score for entry in model.pieces}
    merged = [piece for piece in zh_pieces if len(piece) > 1]
    assert zh_pieces[: len(merged)] == merged
    assert [rank[piece] for piece in merged] == sorted(rank[piece] for piece in merged)
    for character in set("".join(zh_pieces)):
        assert ord(character) > 127
        assert "CJK" in unicodedata.name(character) or unicodedata.category(character)[0] == "P"
    assert "▁" not in "".join(zh_pieces)
    assert "，" in zh_pieces
    learned = {entry.piece for entry in model.pieces}
    han = {p for p in learned if p and all("\u4e00" <= character <= "\u9fff" for character in p)}
    assert han <= set(zh_pieces)


def test_long_lines_and_json_lines_are_learned_from(tmp_path: Path) -> None:
    """SentencePiece alone skips lines over its limit; here nothing is dropped."""
    word = "zyzzyva"
    record = {"source": "qoph ", "target": f"{word} " * 3000, "category": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    flags = ("--vocab_size", 278, "--max_sentence_length", 64)
    assert learn(tmp_path, tmp_path / "out", *flags, "--character_coverage", 1.0) == 0
    lines = (tmp_path / "out" / "pieces.jsonl").read_text(encoding="utf-8").splitlines()
    pieces = [json.loads(line)["piece"] for line in lines]
    assert f"▁{word}" in pieces
    assert {"q", "o", "p", "h"} <= set(pieces)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "a.jsonl",
            b'{"source": "a", "target": "b"}\n{"source": "a"}\n',
            "a.jsonl:2: missing key target",
        ),
        ("a.jsonl", b'{"source": "", "target": "\\ud83d"}\n', "a.jsonl:1: target holds half of a"),
        ("a.jsonl.gz", b'{"source": "", "target": "b"}\n', "a.jsonl.gz:1: the gzip stream"),
        ("a.jsonl", b"\n{}x\n", "a.jsonl:2: not JSON"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt:2: not UTF-8"),
        ("a.txt", b"\n\r\n\n", "hold no text"),
        ("a.txt", b"", "hold no text"),
        ("a.csv", b"x", "no .jsonl, .jsonl.gz, .txt or .txt.gz file"),
    ],
)
def test_bad_text_is_named(
    name: str, content: bytes, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert learn(tmp_path, tmp_path / "out", "--vocab_size", 300) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_all_flag_problems_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--vocab_size", 0, "--character_coverage", 2, "--scripts", "Han,Hann")
    assert learn(Path("x"), Path("y"), *flags) == 2
    message = capsys.readouterr().err
    for name in ("--vocab_size", "--character_coverage", "Hann"):
        assert name in message
