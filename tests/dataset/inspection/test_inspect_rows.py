"""Rows as text: exactly as they decode, and loss is seen exactly where it is."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.dataset.manifest import (
    read_manifest,
)
from colossal_llama.dataset.writer import ARROW_FILE, IGNORE_INDEX
from tests.dataset.inspection.prepared import (
    BOS,
    CHINESE,
    EOS,
    decode,
    documents_of,
    loss_texts,
    manifest,
    part,
    row,
    shown,
)
from tests.dataset.made_parts import RowData


def test_rows_read_as_the_tokenizer_decodes_them(
    inspect: Any, data: Path, tokenizer_dir: Path, backend: Any, rows: list[RowData]
) -> None:
    found = shown(inspect(data, "--tokenizer_dir", tokenizer_dir, "--row_tokens", 0, "--rows", 99))
    assert list(found) == [0, 1, 2, 3]
    for number, expected in enumerate(rows):
        texts = [re.sub("[⟦⟧]", "", text) for text in found[number]]
        assert texts == [decode(backend, expected.input_ids[d]) for d in documents_of(expected)]
        if expected.input_ids[0] == BOS:
            whole = backend.decode(expected.input_ids.tolist(), skip_special_tokens=False)
            assert re.sub("[␛␇]|<U.009B>", "", "".join(texts)) == re.sub(
                "[\x1b\x07\x9b]", "", whole
            )
    assert CHINESE in "".join(found[1])
    assert found[1][0].startswith("⟦<s>")
    assert found[1][0].endswith("</s>⟧")
    assert "</s> as text" in found[0][0]


def test_marks_are_around_what_carries_loss_and_nothing_else(
    inspect: Any, data: Path, tokenizer_dir: Path, backend: Any, rows: list[RowData]
) -> None:
    text = inspect(data, "--tokenizer_dir", tokenizer_dir, "--row_tokens", 0, "--rows", 99)
    found = shown(text)
    for number, expected in enumerate(rows):
        for document, where in zip(found[number], documents_of(expected), strict=True):
            marked = re.findall("⟦(.*?)⟧", document, flags=re.DOTALL)
            assert marked == loss_texts(backend, expected, where)
        loss = int((expected.labels != IGNORE_INDEX).sum())
        assert f"row {number} · {expected.category} · " in text
        assert f"{len(expected.input_ids):,} tokens, {loss:,} with loss" in text
    assert "⟦" not in "".join(found[3])
    assert found[1][1].startswith("<s>")


def test_colour_is_on_what_carries_loss_and_nothing_else(
    inspect: Any, data: Path, tokenizer_dir: Path, backend: Any, rows: list[RowData]
) -> None:
    argv = [data, "--tokenizer_dir", tokenizer_dir, "--row_tokens", 0, "--rows", 99]
    plain = inspect(*argv, "--color", "never")
    text = inspect(*argv, "--color", "always")
    text = text[text.index("carries loss)") :]
    assert "⟦" not in text
    assert "\x1b" not in plain
    # Every colour ends where its line does, so that a pager shows each line alone as it is.
    painted = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", text)
    assert not re.search(r"\x1b", re.sub(r"\x1b\[[\d;]+m.*?\x1b\[0m", "", text))
    green = "".join(part for codes, part in painted if codes in ("32", "1;32"))
    expected = "".join(
        "".join(loss_texts(backend, row, where)) for row in rows for where in documents_of(row)
    )
    assert green == expected.replace("\n", "")
    assert ("1;35", "<s>") in painted
    assert ("1;32", "</s>") in painted
    assert not any(code in "".join(shown(plain)[0]) for code in "\x1b\x07\x9b")


@pytest.mark.parametrize(
    ("flags", "environment", "coloured"),
    [
        ([], {}, True),
        (["--color", "never"], {}, False),
        ([], {"NO_COLOR": "1"}, False),
        ([], {"TERM": "dumb"}, False),
        (["--color", "always"], {"TERM": "dumb", "NO_COLOR": "1"}, True),
    ],
)
def test_a_terminal_gets_colours_unless_they_are_not_wanted(
    original: Path,
    tokenizer_dir: Path,
    flags: list[str],
    environment: dict[str, str],
    coloured: bool,
) -> None:
    main, terminal = pty.openpty()
    argv = [sys.executable, "-m", "colossal_llama.cli", "data", "inspect", str(original)]
    argv += ["--tokenizer_dir", str(tokenizer_dir), "--rows", "1", *flags]
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    settings |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | environment
    with subprocess.Popen(argv, stdout=terminal, env=settings) as process:
        os.close(terminal)
        text = b""
        # A pty whose other side is closed is an error, not an end.
        try:
            while piece := os.read(main, 65536):
                text += piece
        except OSError:
            pass
    os.close(main)
    assert process.returncode == 0
    assert ("\x1b[1;32m</s>\x1b[0m" in text.decode()) == coloured
    assert ("⟦" in text.decode()) != coloured


@pytest.mark.parametrize("limit", [*range(1, 40), 99])
def test_a_long_row_is_cut_in_the_middle_and_never_inside_a_character(
    inspect: Any, data: Path, tokenizer_dir: Path, rows: list[RowData], limit: int
) -> None:
    argv = [data, "--tokenizer_dir", tokenizer_dir, "--first", 1, "--rows", 1]
    whole = "".join(shown(inspect(*argv, "--row_tokens", 0))[1])
    cut = "".join(shown(inspect(*argv, "--row_tokens", limit))[1])
    assert "\ufffd" not in cut
    head, hidden, tail = re.split(r"⟧?\n?… ([\d,]+) tokens …\n?", re.sub("⟧(?=\n…)", "", cut))
    strip = re.compile("[⟦⟧]")
    assert strip.sub("", whole).startswith(strip.sub("", head))
    assert strip.sub("", whole).endswith(strip.sub("", tail))
    assert head
    tokens = len(rows[1].input_ids)
    assert tokens - limit - 6 <= int(hidden.replace(",", "")) <= tokens - limit
    assert len(rows[1].input_ids) > 99


def test_a_row_that_fits_is_not_cut(
    inspect: Any, data: Path, tokenizer_dir: Path, rows: list[RowData]
) -> None:
    argv = [data, "--tokenizer_dir", tokenizer_dir, "--rows", 1, "--row_tokens"]
    tokens = len(rows[0].input_ids)
    assert inspect(*argv, tokens) == inspect(*argv, 0)
    assert "… 1 token …" in inspect(*argv, tokens - 1)


def test_which_rows_are_shown(inspect: Any, data: Path, tokenizer_dir: Path) -> None:
    argv = [data, "--tokenizer_dir", tokenizer_dir, "--row_tokens", 20]
    text = inspect(*argv)
    assert "Rows of part-00001 as text" in text  # the first that has any
    assert list(shown(text)) == [0, 1, 2]
    argv += ["--part", "part-00003"]
    assert list(shown(inspect(*argv, "--first", 698))) == [698, 699]
    assert list(shown(inspect(*argv, "--first", 5, "--rows", 2))) == [5, 6]
    drawn = [list(shown(inspect(*argv, "--rows", 9, "--seed", seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 9
    assert max(drawn[0]) > 100
    assert list(shown(inspect(*argv[:-1], "part-00002", "--rows", 9, "--seed", 3))) == [0, 1, 2]
    assert "part-00000 has no rows" in inspect(*argv[:-1], "part-00000")
    assert "has rows 0 to 699" in inspect(*argv, "--first", 700, error=True)
    assert "part-00009" in inspect(*argv[:-1], "part-00009", error=True)
    assert "part-00003" in inspect(data / "part-00002", "--part", "part-00003", error=True)


def test_without_a_tokenizer_it_says_how_to_see_rows(inspect: Any, data: Path) -> None:
    fingerprint = read_manifest(data).tokenizer.fingerprint[:12]
    last = inspect(data).splitlines()[-1]
    assert "--tokenizer_dir" in last
    assert fingerprint in last
    assert "--tokenizer_dir" not in inspect(data, "--rows", 0)


def test_rows_that_are_not_the_manifests_are_one_line(
    inspect: Any, tmp_path: Path, tokenizer_dir: Path
) -> None:
    argv = [tmp_path, "--tokenizer_dir", tokenizer_dir]
    wrong = part(tmp_path / "part-00000", [row([BOS, 700, EOS], [BOS, 700, EOS], [3], "zh")])
    manifest(tokenizer_dir, {"part-00000": wrong}).write(tmp_path)
    assert "row 0 has the id 700" in inspect(*argv, error=True)
    wrong.rows = 2
    manifest(tokenizer_dir, {"part-00000": wrong}).write(tmp_path)
    assert "1 rows, the manifest says 2" in inspect(*argv, error=True)


def test_only_what_is_shown_is_read(inspect: Any, data: Path, tokenizer_dir: Path) -> None:
    """A part may be larger than the memory: damage far behind the rows shown goes unnoticed."""
    path = data / "part-00003" / ARROW_FILE
    content = bytearray(path.read_bytes())
    start = len(content) * 3 // 4
    content[start : start + 4000] = b"\x7f" * 4000
    path.write_bytes(content)
    argv = [data / "part-00003", "--tokenizer_dir", tokenizer_dir, "--rows"]
    assert list(shown(inspect(*argv, 2))) == [0, 1]
    assert ARROW_FILE in inspect(*argv, 700, error=True)


def test_an_output_that_cannot_write_every_character_gets_its_code(
    original: Path, tokenizer_dir: Path
) -> None:
    argv = [sys.executable, "-m", "colossal_llama.cli", "data", "inspect", str(original)]
    argv += ["--tokenizer_dir", str(tokenizer_dir), "--rows", "2"]
    done = subprocess.run(
        argv, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"\\u4f60" in done.stdout
