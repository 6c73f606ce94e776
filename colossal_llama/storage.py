"""Files that are complete or absent, and input whose every mistake is named by file and line."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of ``target``; renames it to ``target`` if the block succeeds.

    On an exception the temporary directory is removed and ``target`` is as it was.

    Raises:
        DataError: ``target`` exists, is not an empty directory, and ``overwrite`` is false.
    """
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool = False) -> None:
    """Raises DataError if writing to ``target`` would overwrite something."""
    if overwrite or not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"{target} is a file; choose another output path or give --overwrite")
    if any(target.iterdir()):
        raise DataError(f"{target} exists and is not empty; choose another or give --overwrite")


def replace_directory(temporary: Path, target: Path) -> None:
    """Makes ``temporary`` durable and moves it to ``target``, replacing what was there."""
    share_files(temporary)
    fsync_tree(temporary)
    if target.is_dir():
        # Two renames, because a directory cannot be renamed onto one that is not empty.
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        target.unlink(missing_ok=True)
        temporary.rename(target)
    fsync_file(target.parent)


def share_files(directory: Path) -> None:
    """Gives files that only their owner can read the permissions of any other new file.

    safetensors writes through a temporary file, which is private by default.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``target`` that replaces it if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, target)
        fsync_file(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_all(path: Path, content: bytes, *, create: bool = True) -> None:
    """Appends ``content`` to a file, or nothing of it.

    Raises:
        OSError: with the file's name, whatever call it comes from.
    """
    flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if create else 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)  # half a line would spoil the next one as well
            raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flushes every file and folder under ``directory`` to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            fsync_file(Path(root, name))
        fsync_file(Path(root))


def fsync_file(path: Path) -> None:
    """Flushes one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any, *, atomically: bool = True) -> None:
    """Writes ``value`` as indented UTF-8 JSON with sorted keys.

    Args:
        atomically: flushed, and complete or absent; not needed inside a directory that is itself
            flushed and renamed when it is complete.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    if not atomically:
        path.write_text(text, encoding="utf-8")
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON, naming it and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def find_files(paths: Iterable[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files with one of ``suffixes`` among and directly in ``paths``.

    The order of ``paths`` stays; the files of a directory are sorted by name.

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    endings = tuple(suffixes)
    kinds = " or ".join([", ".join(endings[:-1]), endings[-1]] if endings[1:] else endings)
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(endings))
            if not found:
                raise DataError(f"{path}: no {kinds} file in it (folders below are not searched)")
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or directory")
        elif not path.name.endswith(endings):
            raise DataError(f"{path}: expected a {kinds} file, or a directory of them")
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file} is given twice; its documents would count double")
        seen.add(file.resolve())
    return files


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its end) of a UTF-8 text; ``.gz`` is unpacked.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8; names file:line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:  # some editors mark a file as UTF-8 with U+FEFF
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8 text") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}:{number + 1}: the gzip stream is broken or cut short") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for every line that is not blank; unpacks ``.gz``.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; names file:line.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, _json_object(line, f"{path}:{number}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        raise DataError(f"{where}: not JSON that can be read") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under ``key`` of a JSON object that was read at ``where`` (file:line).

    Raises:
        DataError: there is none, or it is not text that UTF-8 can write.
    """
    if key not in record:
        raise DataError(f"{where}: missing key {key}")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be a string, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} holds half of a surrogate pair, not text") from None
    return value
