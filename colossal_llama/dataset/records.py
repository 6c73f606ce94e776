"""Reads and checks the JSON lines that datasets are made from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
SFT_CATEGORY = "sft"
SPEAKERS = ("human", "assistant")


class PretrainRecord(NamedTuple):
    """A document: ``source`` is context without loss and may be empty, ``target`` is learned."""

    source: str
    target: str
    category: str


class SftRecord(NamedTuple):
    """A conversation; each message is ``{"from": "human" | "assistant", "content": text}``."""

    messages: list[dict[str, str]]
    category: str


def input_files(paths: Iterable[Path]) -> list[Path]:
    """The ``.jsonl`` and ``.jsonl.gz`` files among and directly in ``paths``.

    Directories keep the order in which they are given; the files in one are sorted by name.

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
            if not found:
                raise DataError(
                    f"{path}: no .jsonl or .jsonl.gz file in it (folders below are not searched)"
                )
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or directory")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: expected a .jsonl or .jsonl.gz file")
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file} is given twice; its documents would count double")
        seen.add(file.resolve())
    return files


def pretrain_records(files: Iterable[Path]) -> Iterator[PretrainRecord]:
    """Yields the documents of ``{"source", "target", "category"}`` lines.

    Raises:
        DataError: a line is malformed; names file:line and the reason.
    """
    for file in files:
        for where, record in _objects(file):
            target = _text(record, "target", where)
            if not target.strip():
                raise DataError(f"{where}: target is empty; remove the line")
            yield PretrainRecord(_text(record, "source", where), target, _category(record, where))


def sft_records(files: Iterable[Path]) -> Iterator[SftRecord]:
    """Yields the conversations of ``{"messages": [{"from", "content"}, ...]}`` lines.

    Two turns of one speaker in a row and a conversation opened by the assistant are accepted.
    A line may have a ``category``; without one it is "sft".

    Raises:
        DataError: a line is malformed or nobody answers in it; names file:line and the reason.
    """
    for file in files:
        for where, record in _objects(file):
            category = _category(record, where) if "category" in record else SFT_CATEGORY
            yield SftRecord(_messages(record, where), category)


def _messages(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    if "messages" not in record:
        raise DataError(f"{where}: missing key messages")
    turns = record["messages"]
    if not isinstance(turns, list):
        raise DataError(f"{where}: messages must be a list, found {type(turns).__name__}")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}: message {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{place}: expected an object, found {type(turn).__name__}")
        speaker, content = _text(turn, "from", place), _text(turn, "content", place)
        if speaker not in SPEAKERS:
            raise DataError(f"{place}: from must be human or assistant, found {speaker!r}")
        if not content.strip():
            raise DataError(f"{place}: content is empty; remove the message")
        messages.append({"from": speaker, "content": content})
    if not any(message["from"] == "assistant" for message in messages):
        raise DataError(f"{where}: no assistant message, nothing to learn; remove the line")
    return messages


def _category(record: dict[str, Any], where: str) -> str:
    category = _text(record, "category", where)
    if not category:
        raise DataError(f"{where}: category is empty; give it a name")
    return category


def _text(record: dict[str, Any], key: str, where: str) -> str:
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


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for every line that is not blank."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}:{number + 1}: the gzip stream is broken or cut short") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        raise DataError(f"{where}: not JSON that can be read") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
