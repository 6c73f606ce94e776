"""Raw text for learning and measuring a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.storage import read_jsonl

_SUFFIXES = (".jsonl", ".txt")


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The ``.jsonl`` and ``.txt`` files among and directly in ``paths``, sorted per directory.

    Raises:
        DataError: a path does not exist, is of another type, or holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix in _SUFFIXES)
            if not found:
                raise DataError(
                    f"{path}: no .jsonl or .txt file in it (folders below are not searched)"
                )
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or directory")
        elif path.suffix not in _SUFFIXES:
            raise DataError(f"{path}: expected a .jsonl or .txt file, or a directory of them")
        else:
            files.append(path)
    return files


def documents(path: Path) -> Iterator[str]:
    """The documents of one file: source + target of each JSON line, or each line of a text file.

    Raises:
        DataError: naming file:line, for a line that is not what the file's name promises.
    """
    if path.suffix == ".jsonl":
        for number, record in read_jsonl(path):
            for key in ("source", "target"):
                if not isinstance(record.get(key), str):
                    raise DataError(f'{path}:{number}: "{key}" is missing or not text')
            yield record["source"] + record["target"]
        return
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8 text") from None
                if text:
                    yield text
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
