"""The command as a user runs it: tables, CSV, JSON and a page that stands alone."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from colossal_llama import command
from colossal_llama.tokenizer.analyze_tokenizer import AnalyzeTokenizerOptions, analyze_tokenizer

POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
STRANGE = "<img src=x onerror=alert(1)>"


def analyze(*flags: object) -> int:
    return command.run(AnalyzeTokenizerOptions, analyze_tokenizer, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def text(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / f"{STRANGE}.txt"
    path.write_text("\n".join([*english[0].splitlines(), "依山 </script>"]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def strange(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer in a directory, and with a dead piece, whose names are markup."""
    target = tmp_path_factory.mktemp("strange") / STRANGE
    target.mkdir()
    content = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["</script><b>[bold]dead"] = len(content["model"]["vocab"])
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def done(
    small: Path,
    strange: Path,
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_file: Callable[..., subprocess.CompletedProcess[str]],
) -> tuple[Path, str]:
    """(output directory, what was printed) of one run."""
    target = tmp_path_factory.mktemp("analysis") / "out"
    result = run_file(
        *("analyze_tokenizer.py", "--tokenizer_dirs", f"{small},{strange}"),
        *("--data_input_dirs", text, "--output_dir", target),
    )
    assert result.returncode == 0, result.stderr
    return target, result.stdout


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.said).append(data)


@pytest.fixture(scope="module")
def page(done: tuple[Path, str]) -> _Page:
    return _Page((done[0] / "analysis.html").read_text(encoding="utf-8"))


def test_terminal_shows_every_measure_in_100_columns(done: tuple[Path, str]) -> None:
    _, printed = done
    lines = printed.splitlines()
    assert max(map(cell_len, lines[:-1])) <= 100
    for name in (
        *("kind", "size", "level 1", "level 3", "unreachable", "unused", "compared"),
        *("bytes per token", "SentencePiece BPE", "documents with the same ids"),
    ):
        assert name in printed
    assert "</script><b>[bold]dead" in printed
    # The poem: each byte behind the character it spells, in a tokenizer that knows no Chinese.
    assert "白<E7|99|BD>|日<E6|97|A5>" in printed.replace("\n", "")


def test_csv_has_a_row_per_tokenizer_and_file(done: tuple[Path, str], small: Path) -> None:
    with (done[0] / "analysis.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["tokenizer"], row["file"]) for row in rows] == [
        *((small.name, f"{STRANGE}.txt"), (small.name, "(all)")),
        *((STRANGE, f"{STRANGE}.txt"), (STRANGE, "(all)")),
    ]
    for row in rows:
        tokens = int(row["tokens"])
        assert float(row["bytes_per_token"]) == pytest.approx(int(row["bytes"]) / tokens, abs=1e-6)
        assert float(row["tokens_per_character"]) == pytest.approx(
            tokens / int(row["characters"]), abs=1e-6
        )
        assert float(row["tokens_per_document"]) == pytest.approx(
            tokens / int(row["documents"]), abs=1e-6
        )
        assert float(row["compared_compression"]) == 1
    assert rows[0]["unreachable_slow"] == rows[0]["unreachable_fast"] == "0"
    assert (rows[2]["unreachable_slow"], rows[2]["unreachable_fast"]) == ("", "1")
    assert rows[0]["documents_identical"] == rows[0]["documents_compared"] == rows[0]["documents"]
    assert rows[2]["documents_compared"] == ""


def test_json_has_everything(done: tuple[Path, str], small: Path) -> None:
    found = json.loads((done[0] / "analysis.json").read_text(encoding="utf-8"))
    assert found["sentence"] == POEM
    assert found["baseline"] == small.name
    first, second = found["tokenizers"]
    assert second["halves"]["fast"]["unreachable"] == ["</script><b>[bold]dead"]
    assert list(first["halves"]) == ["fast", "slow"]
    characters = first["characters_by_tokens"]
    sizes = [sum(map(len, characters[f"level{number}"].values())) for number in (1, 2, 3)]
    assert sizes == [3500, 3000, 1605]
    assert "".join(part["text"] for part in first["halves"]["slow"]["split"]) == "▁" + POEM


def test_page_needs_nothing_beside_itself(done: tuple[Path, str], page: _Page) -> None:
    html = (done[0] / "analysis.html").read_text(encoding="utf-8")
    assert len(html) < 600_000
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", html)
    assert not [tag for tag, found in page.tags if {"src", "href"} & set(found)]
    (policy,) = (f for t, f in page.tags if t == "meta" and "http-equiv" in f)
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert page.open == []


def test_page_escapes_what_others_wrote(page: _Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"img"}
    assert STRANGE in "".join(page.said)
    assert "</script><b>[bold]dead" in "".join(page.said)
    assert [tag for tag, _ in page.tags].count("script") == 2


def test_grid_has_every_character_and_its_tokens(page: _Page, done: tuple[Path, str]) -> None:
    data = json.loads(page.scripts[0])
    found = json.loads((done[0] / "analysis.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in data["tokenizers"]] == [t["name"] for t in found["tokenizers"]]
    for drawn, measured in zip(data["tokenizers"], found["tokenizers"], strict=True):
        for level, characters in data["levels"].items():
            by_tokens: dict[str, str] = {}
            for character, number in zip(characters, drawn["counts"][level], strict=True):
                by_tokens[number] = by_tokens.get(number, "") + character
            assert by_tokens == measured["characters_by_tokens"][level]


def test_page_has_a_choice_per_tokenizer_that_a_keyboard_reaches(page: _Page) -> None:
    choices = [found for tag, found in page.tags if tag == "input" and found.get("type") == "radio"]
    assert [choice["value"] for choice in choices] == ["0", "1"]
    assert ["checked" in choice for choice in choices] == [True, False]


def test_same_input_gives_the_same_bytes(
    done: tuple[Path, str], small: Path, strange: Path, text: Path, tmp_path: Path
) -> None:
    flags: list[Any] = ["--tokenizer_dirs", f"{small},{strange}", "--data_input_dirs", text]
    assert analyze(*flags, "--output_dir", tmp_path / "again") == 0
    for name in ("analysis.csv", "analysis.json", "analysis.html"):
        assert (tmp_path / "again" / name).read_bytes() == (done[0] / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        *("analysis.csv", "analysis.html", "analysis.json"),
    ]


def test_baseline_from_outside_the_list_joins_it_and_results_are_not_overwritten(
    small: Path, strange: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[Any] = ["--tokenizer_dirs", small, "--baseline", strange]
    flags += ["--data_input_dirs", text, "--sentence", STRANGE, "--output_dir", tmp_path / "out"]
    assert analyze(*flags) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert found["baseline"] == STRANGE
    assert [one["name"] for one in found["tokenizers"]] == [STRANGE, small.name]
    capsys.readouterr()
    assert analyze(*flags) == 2
    assert capsys.readouterr().out == ""  # refused before anything was measured
    assert analyze(*flags, "--overwrite") == 0
    page = _Page((tmp_path / "out" / "analysis.html").read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}


def test_mistakes_are_one_line_and_leave_nothing(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"source": "", "target": "a"}\n{"source": ""}\n')
    (tmp_path / "empty").mkdir()
    shutil.copytree(small, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {}}')
    for dirs, inputs, said in (
        ("", text, "--tokenizer_dirs is empty"),
        (f"{small},{small}/", text, "is given twice"),
        (f"{small},{tmp_path}/none", text, "none: no such tokenizer directory"),
        (f"{small},{tmp_path}", text, "no tokenizer.model and no tokenizer.json"),
        (tmp_path / "broken", text, "tokenizer.json: not a tokenizer"),
        (small, bad, "bad.jsonl:2: missing key target"),
        (small, tmp_path / "none.txt", "no such file"),
        (small, tmp_path / "empty", "no .jsonl"),
    ):
        flags = ("--tokenizer_dirs", dirs, "--data_input_dirs", inputs)
        assert analyze(*flags, "--output_dir", tmp_path / "out") == 2, said
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert said in error
        assert not (tmp_path / "out").exists()
    assert analyze("--tokenizer_dirs", small, "--data_input_dirs", text, "--sentence", "") == 2
    assert "--sentence is empty" in capsys.readouterr().err
