"""The page: the same as in the terminal, in one file that needs nothing beside it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    read_manifest,
)
from tests.dataset.inspection.prepared import (
    CATEGORIES,
    decode,
    documents_of,
    loss_texts,
)
from tests.dataset.made_parts import RowData


class Page(HTMLParser):
    """What a page marks as learned, what it shows of rows in all, its charts and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loss, self.rows = "", ""
        self.bars: list[float] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.references += [name for name in given if name in ("src", "href", "onload")]
        if tag in ("script", "link", "img"):
            self.references.append(tag)
        if tag == "rect":
            self.bars.append(float(given["height"] or ""))
        if tag not in ("meta", "rect", "line"):
            self.open.append(given.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            self.open.pop()

    def handle_data(self, text: str) -> None:
        if "text" in self.open:
            self.rows += text
            self.loss += text if "mark" in self.open else ""


def test_the_page_says_the_same_and_needs_nothing_beside_it(
    inspect: Any,
    data: Path,
    tmp_path: Path,
    tokenizer_dir: Path,
    backend: Any,
    rows: list[RowData],
) -> None:
    file = tmp_path / "page.html"
    argv = ["--tokenizer_dir", tokenizer_dir, "--row_tokens", 0, "--rows", 99, "--html", file]
    inspect(data, *argv)
    text = file.read_bytes().decode("utf-8")
    page = Page(text)
    assert page.open == []
    assert page.references == []
    assert "http://" not in text
    assert "https://" not in text
    assert "prefers-color-scheme: dark" in text
    documents = [(row, where) for row in rows for where in documents_of(row)]
    assert page.rows == "".join(decode(backend, row.input_ids[where]) for row, where in documents)
    assert page.loss == "".join("".join(loss_texts(backend, *pair)) for pair in documents)
    for words in ("1,499,000,000", "75.00%", "9,004,000 read", "part-00003", "[red]en"):
        assert words in text
    tokens = [found.category_tokens for found in read_manifest(data).parts.values()]
    expected = [
        100 * counts[name] / max(part[name] for part in tokens)
        for name in CATEGORIES
        for counts in tokens
    ]
    assert page.bars == pytest.approx(expected, abs=0.01)


def test_the_page_does_without_rows_and_of_a_part(inspect: Any, data: Path, tmp_path: Path) -> None:
    for number, argv in enumerate([[data], [data / "part-00002"], [data / "part-00000"]]):
        file = tmp_path / f"{number}.html"
        inspect(*argv, "--html", file)
        page = Page(file.read_text(encoding="utf-8"))
        assert page.open == []
        assert page.rows == ""
        assert bool(page.bars) == (number == 0)
    assert "--tokenizer_dir" in (tmp_path / "0.html").read_text(encoding="utf-8")


def test_nothing_is_overwritten_unless_asked_for(
    inspect: Any, data: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine", encoding="utf-8")
    assert "--overwrite" in inspect(data, "--html", file, error=True)
    assert file.read_text(encoding="utf-8") == "mine"
    # An error on the way leaves what was there, too.
    argv = [data, "--html", file, "--overwrite"]
    inspect(*argv, "--tokenizer_dir", tokenizer_dir, "--first", 99, error=True)
    assert file.read_text(encoding="utf-8") == "mine"
    inspect(*argv)
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "folder.html").mkdir()
    assert "is a directory" in inspect(
        data, "--html", tmp_path / "folder.html", "--overwrite", error=True
    )
    found = inspect(data, "--html", data / MANIFEST_FILE, "--overwrite", error=True)
    assert ".html" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folder.html", "page.html"]
