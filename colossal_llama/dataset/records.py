"""Reads and checks the JSON lines that datasets are made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama.errors import DataError
from colossal_llama.storage import find_files, read_jsonl, text_of

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

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    return find_files(paths, (".jsonl", ".jsonl.gz"))


def pretrain_records(files: Iterable[Path]) -> Iterator[PretrainRecord]:
    """Yields the documents of ``{"source", "target", "category"}`` lines.

    Raises:
        DataError: a line is malformed; names file:line and the reason.
    """
    for where, record in _objects(files):
        target = text_of(record, "target", where)
        if not target.strip():
            raise DataError(f"{where}: target is empty; remove the line")
        yield PretrainRecord(text_of(record, "source", where), target, _category(record, where))


def sft_records(files: Iterable[Path]) -> Iterator[SftRecord]:
    """Yields the conversations of ``{"messages": [{"from", "content"}, ...]}`` lines.

    Two turns of one speaker in a row and a conversation opened by the assistant are accepted.
    A line may have a ``category``; without one it is "sft".

    Raises:
        DataError: a line is malformed or nobody answers in it; names file:line and the reason.
    """
    for where, record in _objects(files):
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
        speaker, content = text_of(turn, "from", place), text_of(turn, "content", place)
        if speaker not in SPEAKERS:
            raise DataError(f"{place}: from must be human or assistant, found {speaker!r}")
        if not content.strip():
            raise DataError(f"{place}: content is empty; remove the message")
        messages.append({"from": speaker, "content": content})
    if not any(message["from"] == "assistant" for message in messages):
        raise DataError(f"{where}: no assistant message, nothing to learn; remove the line")
    return messages


def _category(record: dict[str, Any], where: str) -> str:
    category = text_of(record, "category", where)
    if not category:
        raise DataError(f"{where}: category is empty; give it a name")
    return category


def _objects(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for every line that is not blank."""
    for file in files:
        for number, record in read_jsonl(file):
            yield f"{file}:{number}", record
