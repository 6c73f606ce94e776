"""Raw text for learning and measuring a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from colossal_llama.storage import find_files, read_jsonl, read_lines, text_of

_JSON_LINES = (".jsonl", ".jsonl.gz")
_LINES = (".txt", ".txt.gz")


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files of text among and directly in ``paths``, sorted per directory.

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    return find_files(paths, (*_JSON_LINES, *_LINES))


def documents(path: Path) -> Iterator[str]:
    """The documents of one file: source + target of each JSON line, or each line of a text file.

    Raises:
        DataError: naming file:line, for a line that is not what the file's name promises.
    """
    if path.name.endswith(_JSON_LINES):
        for number, record in read_jsonl(path):
            where = f"{path}:{number}"
            yield text_of(record, "source", where) + text_of(record, "target", where)
        return
    for _, line in read_lines(path):
        if text := line.rstrip("\r\n"):
            yield text
