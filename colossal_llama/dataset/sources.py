"""Reads the records of input files, in chunks that any process can read by itself.

JSON lines and text are cut at byte positions, Parquet between its row groups; a compressed file
is one chunk, for it can only be read from its start. Where the cuts lie depends on the files
alone, so that the work can be shared among any number of processes and machines.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from colossal_llama.errors import DataError, RecordError
from colossal_llama.storage import find_files

_PLAIN = (".jsonl", ".txt")
_COMPRESSED = tuple(f"{plain}{packed}" for plain in _PLAIN for packed in (".gz", ".zst"))
SUFFIXES = (*_PLAIN, *_COMPRESSED, ".parquet")

# What any kind of record is made from; other columns of a table are not read.
FIELDS = ("source", "target", "text", "category", "messages", "conversations", "system")

# A longer one is hardly a document, and would set the memory that a worker needs.
MAX_RECORD_BYTES = 16 << 20
_TOO_LONG = "longer than 16 MiB"

_SMALLEST_CHUNK, _LARGEST_CHUNK, _CHUNKS_AIMED_AT = 1 << 20, 64 << 20, 1024
_PARQUET_ROWS = 1024
_QUOTED_BYTES = 400


@dataclass(frozen=True)
class Chunk:
    """A stretch of an input file.

    Args:
        file: number of the file in the input.
        path: the file.
        start: first byte, or first row group of a Parquet file.
        stop: end of the bytes or row groups; None is the end of the file.
        size: bytes on disk, for the progress bar.
    """

    file: int
    path: Path
    start: int = 0
    stop: int | None = None
    size: int = 0


def input_files(paths: Iterable[Path]) -> list[Path]:
    """The files that can be read among and directly in ``paths``.

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    return find_files(paths, SUFFIXES)


def divide(files: Sequence[Path], *, whole_texts: bool = False) -> list[Chunk]:
    """Cuts the input into chunks, in the order of ``files``.

    Args:
        files: the input.
        whole_texts: a ``.txt`` file is one document, and never cut.
    """
    total = sum(file.stat().st_size for file in files)
    aim = min(max(total // _CHUNKS_AIMED_AT, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    chunks: list[Chunk] = []
    for number, file in enumerate(files):
        size = file.stat().st_size
        if file.suffix == ".parquet":
            chunks += _parquet_chunks(number, file, size, aim)
        elif file.suffix not in _PLAIN or (whole_texts and file.suffix == ".txt"):
            chunks.append(Chunk(number, file, size=size))
        else:
            starts = range(0, size, aim)
            chunks += [Chunk(number, file, start, min(start + aim, size), aim) for start in starts]
    return chunks


def _parquet_chunks(number: int, file: Path, size: int, aim: int) -> list[Chunk]:
    with _parquet_errors(file):
        import pyarrow.parquet

        groups = pyarrow.parquet.ParquetFile(file).num_row_groups
    each = max(1, groups * aim // max(size, 1))
    starts = range(0, groups, each)
    share = size // max(1, len(starts))
    return [Chunk(number, file, start, min(start + each, groups), share) for start in starts]


class ChunkReader:
    """Yields (line, fields) for the records of a chunk; ``fields`` is a RecordError if it is bad.

    Lines count from 1 at the start of the chunk; rows count as lines in Parquet, and a whole
    text file is line 1. ``lines`` is how many there were, once all are read. Blank lines count,
    but are no records.

    Raises:
        DataError: the file cannot be read, or is cut short; names it and the line.
    """

    def __init__(self, chunk: Chunk, *, whole_texts: bool = False) -> None:
        self.chunk = chunk
        self.lines = 0
        self._is_text = chunk.path.name.endswith((".txt", ".txt.gz", ".txt.zst"))
        self._whole = whole_texts and self._is_text

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
        if self.chunk.path.suffix == ".parquet":
            yield from self._rows()
            return
        parse = _text if self._is_text else _json_object
        for line in self._raw_lines():
            self.lines += 1
            if isinstance(line, RecordError):
                yield self.lines, line
            elif not line.isspace():
                try:
                    yield self.lines, parse(line)
                except RecordError as error:
                    error.text = line[:_QUOTED_BYTES].decode("utf-8", "replace").strip()
                    yield self.lines, error

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
        with _parquet_errors(self.chunk.path):
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(self.chunk.path)
            groups = range(self.chunk.start, self.chunk.stop or file.num_row_groups)
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    self.lines += 1
                    fields = {name: value for name, value in row.items() if value is not None}
                    long = any(len(v) > MAX_RECORD_BYTES for v in fields.values() if type(v) is str)
                    yield self.lines, RecordError(_TOO_LONG) if long else fields

    def _raw_lines(self) -> Iterator[bytes | RecordError]:
        """Lines with their ends; one that is too long is read over and comes as an error."""
        chunk = self.chunk
        limit = MAX_RECORD_BYTES
        with self._errors(), _open(chunk.path) as stream:
            position = _to_line_start(stream, chunk.start)
            while chunk.stop is None or position < chunk.stop:
                line = stream.read(limit + 1) if self._whole else stream.readline(limit + 1)
                if not line:
                    return
                position += len(line)
                if len(line) > limit:
                    position += _skip_line(stream, line, whole=self._whole)
                    yield RecordError(_TOO_LONG)
                    continue
                if chunk.start == 0 and self.lines == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield line

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, _Truncated):
            where = f"{self.chunk.path}:{self.lines + 1}"
            raise DataError(
                f"{where}: the compressed stream is broken or cut short; "
                "fetch the file again or leave it out"
            ) from None
        except OSError as error:
            raise DataError(f"{self.chunk.path}: {error.strerror or error}") from None


class _Truncated(Exception):
    """A zstd stream that ends within a frame, or is none."""


class _ZstdStream(io.RawIOBase):
    """The unpacked bytes of a .zst file; of any number of frames."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._file = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            raise _Truncated from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb", buffering=1 << 18)


def _to_line_start(stream: BinaryIO, start: int) -> int:
    """Moves to the first line that begins at ``start`` or after it; returns where that is."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    position = start - 1
    while True:
        rest = stream.readline(MAX_RECORD_BYTES)
        position += len(rest)
        if not rest or rest.endswith(b"\n"):
            return position


def _skip_line(stream: BinaryIO, line: bytes, *, whole: bool) -> int:
    """Reads to the end of a line of which ``line`` is the beginning; returns the bytes read."""
    skipped = 0
    while line and (whole or not line.endswith(b"\n")):
        line = stream.read(MAX_RECORD_BYTES) if whole else stream.readline(MAX_RECORD_BYTES)
        skipped += len(line)
    return skipped


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise RecordError("not UTF-8 text") from None


def _text(line: bytes) -> dict[str, Any]:
    return {"text": _decode(line).rstrip("\r\n")}


def _json_object(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise RecordError("holds NUL bytes: not text, or a damaged file")
    try:
        value = json.loads(_decode(line).rstrip())
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        raise RecordError("not JSON that can be read") from None
    if not isinstance(value, dict):
        raise RecordError(f"expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a Parquet file that can be read: {reason}") from None
