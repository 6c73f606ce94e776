"""A dataset of four parts and a validation part, and the command that looks at it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from colossal_llama import cli
from colossal_llama.dataset.writer import IGNORE_INDEX
from tests.dataset.inspection.prepared import (
    BOS,
    CATEGORIES,
    DOCUMENTS,
    EOS,
    manifest,
    part,
    row,
)
from tests.dataset.made_parts import RowData


@pytest.fixture(scope="module")
def backend(tokenizer_dir: Path) -> Any:
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    found.encode_special_tokens = True
    return found


@pytest.fixture(scope="module")
def rows(backend: Any) -> list[RowData]:
    """A row of each category, one that starts inside a document, and one without any loss."""
    by_category: dict[str, list[tuple[list[int], list[int]]]] = {name: [] for name in CATEGORIES}
    for source, target, category in DOCUMENTS:
        context = backend.encode(source, add_special_tokens=False).ids if source else []
        learned = [*backend.encode(target, add_special_tokens=False).ids, EOS]
        ids = [BOS, *context, *learned]
        labels = [IGNORE_INDEX] * (1 + len(context)) + learned if context else ids
        by_category[category].append((ids, labels))
    found = []
    for category, documents in by_category.items():
        ids, labels = ([*itertools.chain(*side)] for side in zip(*documents, strict=True))
        found.append(row(ids, labels, [len(pair[0]) for pair in documents], category))
    inside = found[1].input_ids[3:]
    found.append(row(inside, found[1].labels[3:], [len(inside)], "zh"))
    found.append(row([BOS, 300, EOS], [IGNORE_INDEX] * 3, [3], "zh"))
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory: Any, tokenizer_dir: Path, rows: list[RowData]) -> Path:
    """Four parts, the first without rows, and a validation part."""
    directory = tmp_path_factory.mktemp("prepared") / "data"
    directory.mkdir()
    parts = {
        name: part(directory / name, chosen)
        for name, chosen in [
            ("part-00000", []),
            ("part-00001", rows),
            ("part-00002", rows[:1] * 3),
            ("part-00003", rows[1:2] * 700),
        ]
    }
    validation = part(directory / "validation", rows[2:3])
    manifest(tokenizer_dir, parts, validation=validation).write(directory)
    return directory


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "data")


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns what it printed, or the one line of its error."""

    def run(*argv: Any, error: bool = False) -> str:
        code = cli.main(["data", "inspect", *map(str, argv)])
        printed = capsys.readouterr()
        assert code == (2 if error else 0), printed.err
        if not error:
            return printed.out
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run
