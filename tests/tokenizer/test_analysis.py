"""What is counted is counted right, whatever the batches; parts of a sentence are whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import analysis, halves
from colossal_llama.tokenizer.analysis import Part, analyze, character_tokens, short_names, split
from colossal_llama.tokenizer.charsets import LEVELS, level
from colossal_llama.tokenizer.halves import Token, open_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import NORMAL, parse_model

SENTENCE = "the 依 reader"


@pytest.fixture(scope="module")
def files(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files: lines of text, and JSON lines with texts of several lines."""
    root = tmp_path_factory.mktemp("texts")
    lines = [line for text in english[:12] for line in text.splitlines() if line.strip()]
    (root / "lines.txt").write_text(
        "\n".join(["####", "##", *lines, "依山 é 🙂"]) + "\n", encoding="utf-8"
    )
    records = (json.dumps({"source": "> ", "target": text}) for text in english[12:40])
    (root / "texts.jsonl").write_text("\n".join(records), encoding="utf-8")
    return [root / "lines.txt", root / "texts.jsonl"]


@pytest.fixture(scope="module")
def texts(files: list[Path]) -> list[list[str]]:
    lines = files[0].read_text(encoding="utf-8").splitlines()
    records = map(json.loads, files[1].read_text(encoding="utf-8").splitlines())
    return [lines, [record["source"] + record["target"] for record in records]]


@pytest.fixture(scope="module")
def damaged(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer with a fast half whose most used merge is missing."""
    target = tmp_path_factory.mktemp("damaged") / "damaged"
    target.mkdir()
    (target / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    content = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m for m in merges if m not in ("▁ t", ["▁", "t"])]
    assert len(content["model"]["merges"]) == len(merges) - 1
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def test_figures_are_those_of_the_library_file_by_file(
    small: Path, files: list[Path], texts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "_BATCH_DOCUMENTS", 3)
    result = analyze([small], small, files, SENTENCE)
    plain = SentencePieceProcessor(model_file=str(small / "tokenizer.model"))
    ids = [[plain.encode(text) for text in file] for file in texts]
    assert [file.documents for file in result.files] == [len(file) for file in texts]
    assert [file.characters for file in result.files] == [len("".join(file)) for file in texts]
    assert [file.bytes for file in result.files] == [len("".join(f).encode()) for f in texts]
    (figures,) = result.tokenizers
    assert figures.main.tokens == [sum(map(len, file)) for file in ids]
    assert figures.fast is not None
    assert figures.fast.tokens == figures.main.tokens
    assert figures.agreement is not None
    assert figures.agreement.identical == figures.agreement.documents == sum(map(len, texts))
    assert figures.main.used == len({key for file in ids for one in file for key in one})
    specials = 3
    assert figures.main.producible == figures.size - specials == plain.get_piece_size() - specials
    assert result.compression(figures) == 1


def test_batches_by_size_lose_nothing(
    small: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze([small], small, files, SENTENCE)
    monkeypatch.setattr(analysis, "_BATCH_CHARACTERS", 50)
    assert analyze([small], small, files, SENTENCE) == whole


def test_disagreement_is_counted_and_its_first_place_shown(
    small: Path,
    damaged: Path,
    files: list[Path],
    texts: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(analysis, "_BATCH_DOCUMENTS", 2)
    slow = SentencePieceProcessor(model_file=str(damaged / "tokenizer.model"))
    fast = Tokenizer.from_file(str(damaged / "tokenizer.json"))
    differ = [
        (place, number)
        for place, file in enumerate(texts)
        for number, text in enumerate(file)
        if slow.encode(text) != fast.encode(text, add_special_tokens=False).ids
    ]
    result = analyze([small, damaged], small, files, SENTENCE)
    found = result.tokenizers[1].agreement
    assert found is not None
    assert found.documents - found.identical == len(differ) > 0
    assert found.first_difference is not None
    place, number = differ[0]
    text, at = texts[place][number], found.first_difference["token"]
    assert found.first_difference["file"] == files[place].name
    assert found.first_difference["document"] == number + 1 > 2
    shown = [found.first_difference[half] for half in ("slow", "fast")]
    all_ = [slow.encode(text, out_type=str), fast.encode(text, add_special_tokens=False).tokens]
    start = max(0, at - 1)
    for part, pieces in zip(shown, all_, strict=True):
        assert part == pieces[start : start + len(part)]
    assert all_[0][:at] == all_[1][:at]
    assert all_[0][at] != all_[1][at]
    figures = result.tokenizers[1]
    assert figures.fast is not None
    assert figures.main.tokens == result.tokenizers[0].main.tokens
    assert sum(figures.fast.tokens) > sum(figures.main.tokens)
    assert "▁t" in (figures.fast.unreachable or [])
    assert figures.main.unreachable == []


def test_a_difference_in_length_only_is_one() -> None:
    opened = type("Opened", (), {"pieces": ["a", "b", None]})
    found = analysis._difference(opened, [0, 1], [0, 1, 2])  # type: ignore[arg-type]
    assert found == {"token": 2, "slow": ["b"], "fast": ["b", "<id 2>"]}


def test_compression_is_in_tokens_of_the_baseline(
    small: Path, damaged: Path, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((damaged / "tokenizer.json").read_bytes())
    result = analyze([small, tmp_path], tmp_path, files, SENTENCE)
    assert result.baseline is result.tokenizers[1]
    one, two = (figures.main.tokens for figures in result.tokenizers)
    assert result.compression(result.tokenizers[0]) == sum(one) / sum(two) < 1
    assert result.compression(result.tokenizers[0], 1) == one[1] / two[1]
    assert result.compression(result.baseline) == 1


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2", ("17.29%", "0.13%", "0.00%")),
        ("internlm-7b", ("100.00%", "65.93%", "5.67%")),
        ("hammerllm-105789", ("100.00%", "100.00%", "100.00%")),
    ],
)
def test_published_coverage_is_reproduced(
    name: str,
    published: tuple[str, ...],
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Making a fast half takes seconds, and coverage is SentencePiece's.
    monkeypatch.setattr(halves, "_converted", lambda directory: (None, "none"))
    opened = open_tokenizer(shared_data / "tokenizers" / name)
    counts = [character_tokens(opened, level(one)) for one in LEVELS]
    assert tuple(f"{found.count(1) / len(found):.2%}" for found in counts) == published
    assert {number for found in counts for number in found} <= {1, 2, 3, 4}


def test_bytes_and_unknown_characters_are_not_covered(small: Path, tmp_path: Path) -> None:
    opened = open_tokenizer(small)
    assert character_tokens(opened, ["a", "依", "𠀀"]) == [1, 3, 4]
    content = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert character_tokens(open_tokenizer(tmp_path), ["a", "依"]) == [1, 0]


def test_split_joins_what_spells_a_character_together() -> None:
    data = ["▁a".encode(), *(bytes([byte]) for byte in "依".encode()), b"b", b"\xe6\xac", b"\xb2c"]
    parts = split([Token(key, one) for key, one in enumerate(data)])
    assert parts == [
        Part("▁a", [0], ["▁a"]),
        Part("依", [1, 2, 3], ["E4", "BE", "9D"]),
        Part("b", [4], ["b"]),
        Part("欲c", [5, 6], ["E6 AC", "B2 63"]),
    ]
    assert split([Token(0, b"\xe4")]) == [Part("\ufffd", [0], ["E4"])]
    assert split([]) == []


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert short_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("/a/c/x"), Path("/b/c/x"), Path("/b/c/y")]) == [
        *("a/c/x", "b/c/x", "b/c/y"),
    ]


def test_a_sample_without_text_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="hold no text"):
        analyze([small], small, [tmp_path / "empty.txt"], SENTENCE)


def test_a_file_without_text_among_others_is_none_s_mistake(
    small: Path, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    result = analyze([small], small, [tmp_path / "empty.txt", files[0]], SENTENCE)
    assert result.tokenizers[0].main.tokens[0] == 0
    assert result.files[0].documents == 0


def test_extension_leaves_nothing_unreachable_and_appending_does(
    llama2: Path,
    zh_pieces: list[str],
    tmp_path: Path,
    write_pieces: Callable[[Iterable[str]], Path],
    run_file: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    pieces = [piece for piece in zh_pieces if len(piece) > 1][:500]
    flags = ("--source_tokenizer_dir", llama2, "--target_tokenizer_dir", tmp_path / "extended")
    done = run_file("init_tokenizer.py", "--expand_tokens_file", write_pieces(pieces), *flags)
    assert done.returncode == 0, done.stderr
    extended = open_tokenizer(tmp_path / "extended")
    assert extended.slow is not None
    assert extended.fast is not None
    assert extended.slow.unreachable() == extended.fast.unreachable() == []

    model = parse_model(llama2 / "tokenizer.model")
    old = {entry.piece for entry in model.pieces}
    for piece in pieces:
        if piece not in old:
            model.pieces.add(piece=piece, score=0.0, type=NORMAL)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    appended = open_tokenizer(tmp_path).fast
    assert appended is not None
    dead = set(appended.unreachable() or [])
    strange = {piece for piece in pieces if any(character not in old for character in piece)}
    assert strange
    assert strange <= dead
