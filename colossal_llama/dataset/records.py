"""What a record of the input may be: a document for pretraining, or a conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from colossal_llama.dataset.sources import Chunk, ChunkReader
from colossal_llama.errors import DataError, RecordError

Record = TypeVar("Record")

DEFAULT_CATEGORY = "text"


class PretrainRecord(NamedTuple):
    """A document: ``source`` is context without loss and may be empty, ``target`` is learned."""

    source: str
    target: str
    category: str


class SftRecord(NamedTuple):
    """A conversation; each message is ``{"role": "system" | "user" | "assistant", "content"}``."""

    messages: list[dict[str, str]]
    category: str


def pretrain_record(
    fields: Mapping[str, Any], default_category: str = DEFAULT_CATEGORY
) -> PretrainRecord:
    """A document from ``{"source", "target", "category"}``, or from ``{"text"}``.

    Args:
        fields: the record as read. Beside ``text``, a ``category`` is optional.
        default_category: of a ``text`` that names none.

    Raises:
        RecordError: a field is missing, is not text, or there is nothing to learn.
    """
    if "target" not in fields and fields.get("text") is not None:
        target = text_field(fields, "text")
        source = ""
        category = fields.get("category")
        category = default_category if category is None else text_field(fields, "category")
    else:
        target = text_field(fields, "target")
        source = text_field(fields, "source")
        category = text_field(fields, "category")
    if not target.strip():
        raise RecordError("target is empty")
    if not category or not category.isprintable():
        raise RecordError("category is empty, or no name that can be printed on a line")
    return PretrainRecord(source, target, category)


def text_field(fields: Mapping[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises:
        RecordError: there is none, or it is not text that a file can hold.
    """
    value = fields.get(key)
    if value is None:
        raise RecordError(f"missing key {key}")
    if not isinstance(value, str):
        raise RecordError(f"{key} must be a string, found {type(value).__name__}")
    if "\0" in value:
        raise RecordError(f"{key} holds NUL characters: not text, or a damaged file")
    # json reads a lone surrogate; UTF-8 cannot write one, and no tokenizer takes one.
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError(f"{key} holds half of a surrogate pair, not text") from None
    return value


def pretrain_records(files: Iterable[Path]) -> Iterator[PretrainRecord]:
    """Yields the documents of ``files``, strictly.

    Raises:
        DataError: a record is malformed; names file:line and the reason.
    """
    return read_strictly(files, pretrain_record)


def read_strictly(
    files: Iterable[Path], make: Callable[[Mapping[str, Any]], Record]
) -> Iterator[Record]:
    """Yields ``make(fields)`` for every record; the first malformed one is an error.

    Raises:
        DataError: naming file:line and the reason.
    """
    for file in files:
        for line, fields in ChunkReader(Chunk(0, file)):
            try:
                if isinstance(fields, RecordError):
                    raise fields
                yield make(fields)
            except RecordError as error:
                raise DataError(f"{file}:{line}: {error}") from None


def text_hash(text: str) -> int:
    """64 bits (of BLAKE2b) by which equal texts are known; the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
