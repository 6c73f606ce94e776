"""Real text, the real Llama 2 tokenizer, and extensions of it made by the real command."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data import topics

import pytest

from colossal_llama import command
from colossal_llama.tokenizer.train_tokenizer import TrainTokenizerOptions, train_tokenizer

ROOM = Path(__file__).resolve().parents[2] / "colossal_llama" / "tokenizer"


@pytest.fixture(scope="session")
def run_file() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a file of the tokenizer room as a user does: run_file("init_tokenizer.py", *flags)."""

    def run(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOM / name), *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def corpora(shared_data: Path) -> dict[str, list[str]]:
    """The first 1500 characters of 150 documents each of Chinese, English and Python."""
    found = {}
    for name in ("zh", "en", "code"):
        with gzip.open(
            shared_data / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8"
        ) as all_:
            found[name] = [
                json.loads(line)["target"][:1500] for _, line in zip(range(150), all_, strict=False)
            ]
    return found


@pytest.fixture(scope="session")
def english() -> list[str]:
    """English that every Python brings along."""
    return [topics.topics[name] for name in sorted(topics.topics)]


@pytest.fixture(scope="session")
def small(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama tokenizer learned from English."""
    directory = tmp_path_factory.mktemp("small")
    text = directory / "text.txt"
    text.write_text("\n".join(english), encoding="utf-8")
    flags = ["--data_input_dirs", text, "--target_tokenizer_dir", directory / "out"]
    flags += ["--vocab_size", 700]
    assert command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, flags))) == 0
    return directory / "out"


@pytest.fixture(scope="session")
def llama2(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "llama2"


@pytest.fixture(scope="session")
def write_pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Iterable[str]], Path]:
    """Writes a list of pieces as the file that init_tokenizer.py reads."""

    def write(pieces: Iterable[str]) -> Path:
        path = tmp_path_factory.mktemp("pieces") / "pieces.jsonl"
        lines = (json.dumps({"piece": piece}, ensure_ascii=False) + "\n" for piece in pieces)
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def zh_file(corpora: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Chinese documents as a JSONL file."""
    path = tmp_path_factory.mktemp("zh") / "zh.jsonl"
    records = ({"source": "", "target": text, "category": "zh"} for text in corpora["zh"])
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def zh_tokenizer(
    zh_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_file: Callable[..., subprocess.CompletedProcess[str]],
) -> Path:
    """A tokenizer learned from the Chinese documents, whose pieces.jsonl holds Han pieces only."""
    target = tmp_path_factory.mktemp("learned") / "zh"
    flags = ("--vocab_size", 7000, "--scripts", "Han")
    done = run_file(
        "train_tokenizer.py", "--data_input_dirs", zh_file, "--target_tokenizer_dir", target, *flags
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def zh_pieces(zh_tokenizer: Path) -> list[str]:
    lines = (zh_tokenizer / "pieces.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["piece"] for line in lines]
