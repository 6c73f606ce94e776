"""A learned tokenizer: Llama's format, the same for any number of threads, no text skipped."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from colossal_llama import command
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.from_scratch import PRESETS, Settings
from colossal_llama.tokenizer.piece_list import problem_of
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


def run_command(*flags: object) -> int:
    return command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, flags)))


def read_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["piece"] for line in lines]


def test_presets_can_be_flags() -> None:
    """A preset says nothing that a flag could not say, and where it comes from."""
    fields = {field.name for field in dataclasses.fields(TrainTokenizerOptions)}
    assert fields >= {field.name for field in dataclasses.fields(Settings)}
    for preset in PRESETS.values():
        assert len(preset.source) > 20
        symbols = preset.settings.user_defined_symbols
        assert len(set(symbols)) == len(symbols)
        assert all(problem_of(symbol) is None for symbol in symbols)
    baby = PRESETS["baby-llama2-chinese"].settings
    assert (baby.vocab_size, baby.character_coverage, baby.max_sentence_length) == (
        *(32_000, 0.9995, 2657),
    )
    assert PRESETS["hammerllm"].settings.vocab_size == 128_000
    assert len(PRESETS["hammerllm"].settings.user_defined_symbols) == 101


def test_symbols_and_required_characters(text: Path, tmp_path: Path) -> None:
    """However rare they are; the symbols whole, in slow and fast."""
    (tmp_path / "symbols.txt").write_text("<h1>\n</h1>\n龙\n<h1>\n", encoding="utf-8")
    (tmp_path / "characters.txt").write_text("魑魅 魍魉\n", encoding="utf-8")
    flags = ["--vocab_size", 600, "--user_defined_symbols", tmp_path / "symbols.txt"]
    flags += ["--required_chars", tmp_path / "characters.txt"]
    assert learn(text, tmp_path / "out", *flags) == 0
    tokenizer = read_tokenizer(tmp_path / "out")
    assert tokenizer.symbols() == {"<h1>", "</h1>", "龙"}
    assert set("魑魅魍魉") <= set(tokenizer.pieces())
    texts = ["<h1>title</h1>", "a<h1> 龙龙 </h1>", *ORDINARY]
    assert tokenizer.disagreements(texts) == []
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert pieces.encode("<h1>魑龙", out_type=str)[-3:] == ["<h1>", "魑", "龙"]


def test_no_byte_fallback_and_no_split_digits(text: Path, tmp_path: Path) -> None:
    flags = ["--byte_fallback", "false", "--split_digits", "false", "--vocab_size", 400]
    (tmp_path / "numbers.txt").write_text("in 2024 and 2024 and 2024\n" * 50, encoding="utf-8")
    both = f"{text},{tmp_path / 'numbers.txt'}"
    assert (
        run_command(
            *("--data_input_dirs", both, "--target_tokenizer_dir", tmp_path / "out"), *flags
        )
        == 0
    )
    tokenizer = read_tokenizer(tmp_path / "out")
    assert tokenizer.disagreements(["龘龘 x", "2024 龘", *ORDINARY]) == []
    assert any("2024" in piece for piece in tokenizer.pieces())
    assert tokenizer.size == 400


def test_the_curve_is_what_smaller_sizes_give(
    text: Path, english: list[str], tmp_path: Path
) -> None:
    (tmp_path / "held-out.txt").write_text("\n".join(english[30:40]), encoding="utf-8")
    held_out = ("--heldout_input_dirs", tmp_path / "held-out.txt")
    assert learn(text, tmp_path / "large", "--vocab_size", 800, *held_out) == 0
    curve = json.loads((tmp_path / "large" / "compression_curve.json").read_text(encoding="utf-8"))
    point = curve["points"][-3]
    assert learn(text, tmp_path / "small", "--vocab_size", point["pieces"], *held_out) == 0
    other = json.loads((tmp_path / "small" / "compression_curve.json").read_text(encoding="utf-8"))
    assert other["points"][-1]["bytes_per_token"] == pytest.approx(point["bytes_per_token"])


def test_continued(small: Path, zh_file: Path, tmp_path: Path) -> None:
    """A process as a user starts it; a number of pieces picked from its curve gives a prefix."""
    flags = ["--data_input_dirs", zh_file, "--source_tokenizer_dir", small, "--scripts", "Han"]
    result = run_process(*flags, "--target_tokenizer_dir", tmp_path / "a", "--num_new_pieces", 600)
    assert result.returncode == 0, result.stderr
    assert "learned from" in result.stdout
    pieces = read_lines(tmp_path / "a" / "pieces.jsonl")
    report = json.loads((tmp_path / "a" / "extension_report.json").read_text(encoding="utf-8"))
    curve = json.loads((tmp_path / "a" / "compression_curve.json").read_text(encoding="utf-8"))
    assert len(pieces) == 600 == report["pieces_added"]
    assert report["pieces_repaired"] == report["pieces_dropped"] == []
    ratios = [point["bytes_per_token"] for point in curve["points"]]
    assert ratios == sorted(ratios)
    assert f"{ratios[-1]:.3f}" in result.stdout

    point = curve["points"][-2]
    more = ["--num_new_pieces", point["pieces"], "--target_tokenizer_dir", tmp_path / "b"]
    assert run_command(*flags, *more) == 0
    assert read_lines(tmp_path / "b" / "pieces.jsonl") == pieces[: point["pieces"]]
    old, new = read_tokenizer(small), read_tokenizer(tmp_path / "a")
    assert new.encode(ORDINARY[:3]) == old.encode(ORDINARY[:3])
    slow = AutoTokenizer.from_pretrained(tmp_path / "a", use_fast=False)
    ids = slow.convert_tokens_to_ids(pieces)
    assert ids == list(range(old.size, old.size + 600))


def run_process(*flags: object) -> subprocess.CompletedProcess[str]:
    file = Path(__file__).parents[2] / "colossal_llama" / "tokenizer" / "train_tokenizer.py"
    arguments = [sys.executable, str(file), *map(str, flags)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_merging(
    small: Path, zh_tokenizer: Path, zh_pieces: list[str], zh_file: Path, tmp_path: Path
) -> None:
    """The other's pieces of a script, its first ones with --num_new_pieces, on our scale."""
    flags = ["--source_tokenizer_dir", small, "--merge_tokenizer_dir", zh_tokenizer]
    flags += ["--scripts", "Han"]
    assert run_command(*flags, "--target_tokenizer_dir", tmp_path / "all") == 0
    source, merged = read_tokenizer(small), read_tokenizer(tmp_path / "all")
    pieces = read_lines(tmp_path / "all" / "pieces.jsonl")
    assert sorted(pieces) == sorted(set(zh_pieces) - set(source.pieces()))
    assert not (tmp_path / "all" / "compression_curve.json").exists()
    assert merged.disagreements(ORDINARY) == []
    assert merged.encode(ORDINARY[:3]) == source.encode(ORDINARY[:3])
    report = json.loads((tmp_path / "all" / "extension_report.json").read_text(encoding="utf-8"))
    assert report["merge"]["pieces_lacking"] == len(pieces)
    assert report["merge"]["calibration"]["ratio"] > 0

    more = ["--num_new_pieces", 50, "--heldout_input_dirs", zh_file]
    assert run_command(*flags, "--target_tokenizer_dir", tmp_path / "50", *more) == 0
    assert read_lines(tmp_path / "50" / "pieces.jsonl") == pieces[:50]
    assert (tmp_path / "50" / "compression_curve.svg").exists()


def test_merging_byte_level(small: Path, zh_tokenizer: Path, tmp_path: Path) -> None:
    """Byte-level BPE has an order of merges and no scores; it takes and gives pieces as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(["月光如水 moonlight"] * 9, trainer)
    tokenizer.add_tokens(["moon"])
    (tmp_path / "bytes").mkdir()
    tokenizer.save(str(tmp_path / "bytes" / "tokenizer.json"))

    given = ["--source_tokenizer_dir", small, "--merge_tokenizer_dir", tmp_path / "bytes"]
    assert run_command(*given, "--target_tokenizer_dir", tmp_path / "a") == 0
    pieces = read_lines(tmp_path / "a" / "pieces.jsonl")
    assert "月光如水" in pieces
    assert not any("moon" in piece for piece in pieces)
    assert read_tokenizer(tmp_path / "a").symbols() == {"moon"}

    taken = ["--source_tokenizer_dir", tmp_path / "bytes", "--merge_tokenizer_dir", zh_tokenizer]
    taken += ["--target_tokenizer_dir", tmp_path / "b", "--scripts", "Han"]
    assert run_command(*taken, "--num_new_pieces", 50) == 0
    ids = read_tokenizer(tmp_path / "b").encode(["可以"])
    assert len(ids[0]) == 1
    assert run_command(*taken, "--overwrite", "--calibration", "min") == 2


def test_a_model_that_rewrites_text_can_be_merged(
    small: Path, shared_data: Path, tmp_path: Path
) -> None:
    """HammerLLM's own tokenizer normalises with nmt_nfkc; its pieces and symbols are of use."""
    other = shared_data / "tokenizers" / "llama-zh-128k"
    flags = ["--source_tokenizer_dir", small, "--merge_tokenizer_dir", other]
    flags += ["--target_tokenizer_dir", tmp_path / "out", "--num_new_pieces", 300]
    assert run_command(*flags) == 0
    tokenizer = read_tokenizer(tmp_path / "out")
    assert {"<h1>", "</table>"} <= tokenizer.symbols()
    assert tokenizer.disagreements(["<h1>白日依山尽</h1> 123", *ORDINARY]) == []


def test_too_short_lines_and_too_few_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("short\n" * 9, encoding="utf-8")
    assert learn(tmp_path / "a.txt", tmp_path / "out") == 2
    assert "no line of 10 characters (--min_line_length)" in capsys.readouterr().err
    flags = ("--min_line_length", 1, "--vocab_size", 265)
    assert learn(tmp_path / "a.txt", tmp_path / "out", *flags) == 0
    assert "--heldout_input_dirs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaints"),
    [
        ([], ["--data_input_dirs is required"]),
        (
            ["--num_new_pieces", "5", "--merge_tokenizer_dir", "y", "--calibration", "max"],
            ["num_new_pieces needs", "merge_tokenizer_dir needs", "calibration needs"],
        ),
        (
            ["--source_tokenizer_dir", "x", "--vocab_size", "9", "--byte_fallback", "false"],
            [
                *("--data_input_dirs is required", "--num_new_pieces is required"),
                *("--vocab_size is not read", "--byte_fallback is not read"),
            ],
        ),
        (
            [
                *("--source_tokenizer_dir", "x", "--merge_tokenizer_dir", "y"),
                *("--data_input_dirs", "z", "--preset", "llama", "--max_piece_length", "0"),
            ],
            [
                *("--data_input_dirs is not read", "--preset is not read"),
                *("--max_piece_length is not read", "--max_piece_length must be positive"),
            ],
        ),
        (["--source_tokenizer_dir", "t"], ["must not be one of the tokenizers read"]),
        (
            ["--data_input_dirs", "z", "--max_line_length", "3"],
            ["--max_line_length must be at least --min_line_length"],
        ),
    ],
)
def test_flags_that_a_mode_does_not_read(
    flags: list[str], complaints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--target_tokenizer_dir", "t", *flags) == 2
    message = capsys.readouterr().err
    for complaint in complaints:
        assert complaint in message


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("user_defined_symbols", "<a b>", "the symbol '<a b>' holds the space"),
        ("user_defined_symbols", "<h1>,<s>", "the symbol '<s>' is a special token"),
        ("user_defined_symbols", "<0x41>", "the symbol '<0x41>' is a special token"),
        ("user_defined_symbols", "<h1>\n\n<h2>\n", "list.txt:2: the symbol '' is empty"),
        ("required_chars", "龙\x00\n", "the required character '\\x00' holds"),
        ("required_chars", "▅\n", "the required character '▅' is U+2585"),
    ],
)
def test_a_symbol_or_character_that_cannot_be(
    flag: str,
    value: str,
    complaint: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if value.endswith("\n"):
        (tmp_path / "list.txt").write_text(value, encoding="utf-8")
        value = str(tmp_path / "list.txt")
    assert learn(text, tmp_path / "out", f"--{flag}", value) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_flag_problems_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--vocab_size", 0, "--character_coverage", 2, "--scripts", "Han,Hann")
    assert learn(Path("x"), Path("y"), *flags) == 2
    message = capsys.readouterr().err
    for name in ("--vocab_size", "--character_coverage", "Hann"):
        assert name in message
