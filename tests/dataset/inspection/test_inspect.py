"""Inspection: figures as in the manifest; what is not a whole dataset is one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from colossal_llama import cli
from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    read_manifest,
)
from colossal_llama.dataset.writer import ARROW_FILE
from tests.dataset.inspection.prepared import (
    CATEGORIES,
    cells,
    manifest,
    part,
    row,
)
from tests.dataset.made_parts import RowData


def test_figures_are_those_of_the_manifest(inspect: Any, data: Path) -> None:
    text = inspect(data)
    fingerprint = read_manifest(data).tokenizer.fingerprint
    for words in (
        f"{fingerprint[:12]}…, 700 ids, run by hf",
        "9,004,000 read = 9,000,000 accepted + 1,000 rejected + 3,000 filtered",
        "empty_target 1,000",
        "quality 2,100",
        "exact_duplicate 900",
        "shortened 77,000",
        "4,096 tokens",
        "3.21%",
    ):
        assert words in text
    assert "pretrain" in cells(text, "kind")[0]
    assert cells(text, "seed") == [["seed", "17"]]
    assert cells(text, CATEGORIES[0])[0][1:] == [
        *("8,000,000", "3,000,000,000", "500", "0.50", "1,500,000,000", "75.00%"),
        *("1,499,000,000", "42", "1,234"),
    ]
    assert cells(text, "zh")[0][1:] == [
        *("1,000,000", "260,000,000", "250", "2.00", "500,000,000", "25.00%"),
        *("499,000,000", "4,343", "0"),
    ]
    assert cells(text, "total")[0][1:] == [
        *("9,000,000", "3,260,000,000", "750", "0.62", "2,000,000,000", "100.00%"),
        *("1,998,000,000", "4,385", "1,234"),
    ]


def test_parts_and_bins_are_measured(inspect: Any, data: Path, rows: list[RowData]) -> None:
    text = inspect(data)
    en, zh = len(rows[0].input_ids), len(rows[1].input_ids)
    assert cells(text, "part-00000")[0][1:5] == ["0", "0", "0", "0.00%"]
    size = (data / "part-00003" / ARROW_FILE).stat().st_size
    assert cells(text, "part-00003") == [
        [
            *("part-00003", "700", f"{700 * zh:,}", str(zh), f"{1 - zh / 4096:.2%}"),
            *(f"{size / 1e6:.1f} MB", f"{size / (700 * zh):.2f}", "0", f"{700 * zh:,}"),
        ]
    ]
    assert cells(text, "validation")[0][1:3] == ["1", f"{len(rows[2].input_ids):,}"]
    bins = cells(text, CATEGORIES[0])[1]
    assert bins[1:] == ["0", f"{en:,.0f}", f"{3 * en:,}", "0.00%"]


def test_balance_is_the_smallest_bin_as_a_share_of_the_largest(
    inspect: Any, tmp_path: Path, tokenizer_dir: Path
) -> None:
    parts = {
        f"part-{number:05d}": part(
            tmp_path / f"part-{number:05d}", [row([5] * n, [5] * n, [n], "zh")]
        )
        for number, n in enumerate([80, 100, 90])
    }
    manifest(tokenizer_dir, parts).write(tmp_path)
    text = inspect(tmp_path)
    assert cells(text, "zh")[1][1:] == ["80", "90", "100", "80.00%"]
    assert cells(text, CATEGORIES[0])[1][1:] == ["0", "0", "0", "–"]


def test_a_part_is_looked_at_alone(
    inspect: Any, data: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(data / "part-00001")  # the others need not be there
    argv = ["--tokenizer_dir", tokenizer_dir, "--rows", 1, "--verify"]
    for name in ("part-00002", "validation"):
        text = inspect(data / name, *argv)
        assert f"Rows of {name} as text" in text
        assert len(cells(text, name)) == 1
        for absent in ("Categories", "Bins", "part-00003", "accepted"):
            assert absent not in text
        monkeypatch.chdir(data / name)
        assert f"Rows of {name} as text" in inspect(".", *argv)
    assert "part-00001" in inspect(data, error=True)


def test_another_tokenizer_is_refused_before_anything_is_shown(
    data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "inspect", str(data), "--tokenizer_dir", str(tiny_model)]
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "700 ids" in printed.err
    assert "has 400" in printed.err


def test_verify_reads_every_byte_and_names_the_first_bad_file(inspect: Any, data: Path) -> None:
    assert "5 files" in inspect(data, "--verify")
    for name in ("validation", "part-00003", "part-00002"):
        path = data / name / ARROW_FILE
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        inspect(data, "--rows", 0)  # the size is right
        found = inspect(data, "--verify", error=True)
        assert str(path) in found
        assert "SHA-256" in found


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 1}', "schema version 1"),
        ('{"schema_version": 2}', "not a dataset manifest"),
    ],
)
def test_a_damaged_manifest_is_one_line(
    inspect: Any, data: Path, content: str, reason: str
) -> None:
    (data / MANIFEST_FILE).write_text(content, encoding="utf-8")
    for path in (data, data / "part-00001"):
        found = inspect(path, error=True)
        assert reason in found
        assert MANIFEST_FILE in found


def test_what_is_no_dataset_is_one_line(
    inspect: Any, data: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    assert "no such directory" in inspect(data / "nothing", error=True)
    assert "is a file" in inspect(data / MANIFEST_FILE, error=True)
    assert MANIFEST_FILE in inspect(tmp_path, error=True)
    (data / "other").mkdir()
    assert "is not a part" in inspect(data / "other", error=True)
    manifest(tokenizer_dir, {}).write(tmp_path)
    assert "lists no part" in inspect(tmp_path, error=True)


def test_a_part_that_is_not_whole_is_one_line(
    inspect: Any, data: Path, tokenizer_dir: Path
) -> None:
    path = data / "part-00001" / ARROW_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert f"{len(content) - 8} bytes, the manifest says {len(content)}" in inspect(
        data, error=True
    )
    argv = [data, "--tokenizer_dir", tokenizer_dir]
    path.write_bytes(b"\0" * len(content))
    assert str(path) in inspect(*argv, error=True)
    path.unlink()
    assert "missing" in inspect(*argv, error=True)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--rows", "-1"], "--rows must not be negative"),
        (["--first", "-1"], "--first must not be negative"),
        (["--row_tokens", "-1"], "--row_tokens must not be negative"),
        (["--first", "1", "--seed", "1"], "give one of both"),
        (["--color", "blue"], "--color"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    inspect: Any, data: Path, argv: list[str], reason: str
) -> None:
    assert reason in inspect(data, *argv, error=True)
