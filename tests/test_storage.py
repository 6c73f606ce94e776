"""Directories and files are complete or absent; unreadable input is named by file and line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from colossal_llama import storage
from colossal_llama.errors import DataError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(target: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with storage.atomic_directory(target, overwrite=overwrite) as temporary:
        (temporary / "folder").mkdir()
        (temporary / "folder" / "file.txt").write_text(text, encoding="utf-8")


def write_then_fail(temporary: Path) -> None:
    (temporary / "file").touch()
    raise ZeroDivisionError


def content(target: Path) -> str:
    return (target / "folder" / "file.txt").read_text(encoding="utf-8")


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet" / "there"
    with storage.atomic_directory(target) as temporary:
        (temporary / "file").touch()
        assert not target.exists(), "a half-written directory has the final name"
    assert names(target) == ["file"]
    assert names(target.parent) == ["there"], "something temporary is left"


def test_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.atomic_directory(tmp_path / "out") as temporary:
        write_then_fail(temporary)
    assert names(tmp_path) == []


def test_failed_overwrite_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    fill(target, "old")
    with (
        pytest.raises(ZeroDivisionError),
        storage.atomic_directory(target, overwrite=True) as temporary,
    ):
        write_then_fail(temporary)
    assert content(target) == "old"
    assert names(tmp_path) == ["out"]


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    directory, file = tmp_path / "directory", tmp_path / "file"
    fill(directory, "old")
    file.write_text("old", encoding="utf-8")
    for target in (directory, file):
        with (
            pytest.raises(DataError, match=f"{target}.*--overwrite"),
            storage.atomic_directory(target),
        ):
            pytest.fail("the block ran")
    assert content(directory) == "old"
    assert file.read_text(encoding="utf-8") == "old"


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "leftover").touch()
    fill(target, overwrite=True)
    assert names(target) == ["folder"]
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    fill(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == "new"


def test_private_files_become_like_any_other(tmp_path: Path) -> None:
    with storage.atomic_directory(tmp_path / "out") as target:
        (target / "plain").write_text("")
        (target / "private").write_text("")
        (target / "private").chmod(0o600)
        (target / "program").write_text("")
        (target / "program").chmod(0o700)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["private"] == modes["plain"]
    assert modes["program"] == 0o700


def test_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert content(tmp_path / "out") == "new"


def test_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    with storage.atomic_file(target) as temporary:
        temporary.write_text("old", encoding="utf-8")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ne", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), storage.atomic_file(target) as temporary:
        write_half(temporary)
    assert target.read_text(encoding="utf-8") == "old"
    assert names(target.parent) == ["file"]


def test_json_round_trip_is_readable_and_repeatable(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "größe 語言", "c": {"z": 1e-300}}
    first, second = tmp_path / "first", tmp_path / "second"
    storage.write_json(first, value)
    storage.write_json(second, dict(reversed(value.items())))
    assert storage.read_json(first) == value
    assert first.read_bytes() == second.read_bytes()
    assert "語言" in first.read_text(encoding="utf-8")


def test_a_mark_at_the_start_of_a_file_is_no_text(tmp_path: Path) -> None:
    """Windows editors write U+FEFF there; elsewhere it is a character like others."""
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\ufefftwo\n", encoding="utf-8")
    assert list(storage.read_lines(path)) == [(1, "one\n"), (2, "\ufefftwo\n")]


def test_json_lines_come_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    # A line separator inside a text is no end of line.
    objects = [{"text": "a\u2028b\u0085c"}, {}, {"text": "語"}]
    lines = [json.dumps(value, ensure_ascii=False) for value in objects]
    path.write_text(f"{lines[0]}\n\n{lines[1]}\r\n  \n{lines[2]}", encoding="utf-8")
    assert list(storage.read_jsonl(path)) == list(zip([1, 3, 5], objects, strict=True))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'"only a string"', "expected a JSON object, found str"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_bad_line_is_named_after_the_good_ones(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"good": 1}\n\n' + bad + b"\n" + b'{"good": 2}\n')
    lines = storage.read_jsonl(path)
    assert next(lines) == (1, {"good": 1})
    with pytest.raises(DataError) as caught:
        next(lines)
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing, broken, binary = (tmp_path / name for name in ("missing", "broken", "binary"))
    broken.write_text('{\n"a": 1,\n"b" 2}', encoding="utf-8")
    binary.write_bytes(b"\xff\x00")
    for path, where in ((missing, missing), (broken, f"{broken}:3"), (binary, binary)):
        with pytest.raises(DataError) as caught:
            storage.read_json(path)
        assert str(caught.value).startswith(f"{where}: ")
    for path in (missing, tmp_path):
        with pytest.raises(DataError, match=str(path)):
            list(storage.read_jsonl(path))


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert storage.sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_what_cannot_be_appended_whole_is_not_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with pytest.raises(FileNotFoundError, match="log"):
        storage.append_all(path, b"text", create=False)
    storage.append_all(path, b"one\n")
    write = os.write

    def half(descriptor: int, content: memoryview) -> int:
        if len(content) > 2:
            return write(descriptor, content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left") as caught:
            storage.append_all(path, b"two\n")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"one\n"
    storage.append_all(path, b"three\n", create=False)
    assert path.read_bytes() == b"one\nthree\n"
