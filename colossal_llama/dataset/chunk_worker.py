"""What a worker process does: tokenise a chunk of the input, write a part of the output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from colossal_llama.dataset.documents import DocumentKind, TokenBatch
from colossal_llama.dataset.layout import PartPlan
from colossal_llama.dataset.manifest import ArrowFile, Part
from colossal_llama.dataset.records import text_hash
from colossal_llama.dataset.sources import Chunk, ChunkReader
from colossal_llama.dataset.spool import (
    DOCUMENT_FIELDS,
    ChunkFiles,
    ChunkSummary,
    TokenFiles,
    ids_and_labels,
)
from colossal_llama.dataset.writer import ARROW_FILE, RowBatch, write_json_lines, write_part
from colossal_llama.errors import RecordError
from colossal_llama.storage import fsync_tree, sha256_file

# Characters that are tokenised at a time: the tokenizer's own memory is some 50 bytes each.
_BATCH_CHARACTERS = 1 << 19

# A batch of Arrow rows is read, and made, as a whole.
_BATCH_ROWS, _BATCH_TOKENS = 256, 1 << 20


class ChunkWorker:
    """Built once in every worker process.

    Args:
        make_kind: builds the kind of documents, which may load a tokenizer.
        spool: directory of the chunks' files.
        whole_texts: a ``.txt`` file is one document.
        hash_texts: compute the hash of every text, by which equal texts are found.
        near_duplicates: also compute the hashes by which near duplicates are found.
        threads: threads of the tokenizer.
    """

    def __init__(
        self,
        make_kind: Callable[[], DocumentKind[Any]],
        spool: Path,
        *,
        whole_texts: bool,
        hash_texts: bool,
        near_duplicates: bool,
        threads: int,
    ) -> None:
        # Read by the thread pool that Rust libraries share, when it is first used.
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        self._make_kind = make_kind
        self._kind: DocumentKind[Any] | None = None
        self._spool = spool
        self._tokens = TokenFiles(spool)
        self._whole_texts = whole_texts
        self._hash_texts = hash_texts
        self._near_duplicates = near_duplicates

    def tokenize(self, number: int, chunk: Chunk) -> tuple[Chunk, ChunkSummary]:
        """Writes the files of a chunk.

        Raises:
            DataError: the file cannot be read.
        """
        kind = self._kind = self._kind or self._make_kind()
        kind.notes.clear()
        files = ChunkFiles(self._spool, number)
        files.remove()
        with _ChunkWriter(
            files, kind, hash_texts=self._hash_texts, near_duplicates=self._near_duplicates
        ) as writer:
            reader = ChunkReader(chunk, whole_texts=self._whole_texts)
            for line, fields in reader:
                writer.add(line, fields)
            writer.flush()
        writer.summary.lines = reader.lines
        files.finish(writer.summary)
        return chunk, writer.summary

    def write_duplicates(self, number: int, chunk: Chunk, lines: list[int]) -> int:
        """Reads a chunk again and writes the records at ``lines`` to its excluded documents."""
        wanted = set(lines)
        with _open_text(ChunkFiles(self._spool, number).excluded("duplicate")) as stream:
            for line, fields in ChunkReader(chunk, whole_texts=self._whole_texts):
                if line in wanted:
                    assert not isinstance(fields, RecordError)
                    entry = {"line": line, "stage": "duplicate", "reason": "like one before it"}
                    _write_line(stream, {**entry, "record": fields})
        return number

    def write_part(self, plan: PartPlan, arrow: Path, jsonl: Path | None) -> tuple[str, Part]:
        """Writes a part under its name; it is there when it is complete."""
        temporary = arrow / f".{plan.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        batches = self._batches(plan)
        if jsonl:
            batches = write_json_lines(jsonl / f"{plan.name}.jsonl", batches, plan.names)
        write_part(temporary, batches, plan.names)
        part = _describe(plan, temporary / ARROW_FILE)
        # Here, so that the disk works while other processes compute.
        fsync_tree(temporary)
        # A run that was killed may have written it without noting that it had.
        shutil.rmtree(arrow / plan.name, ignore_errors=True)
        os.replace(temporary, arrow / plan.name)
        return plan.name, part

    def _batches(self, plan: PartPlan) -> Iterator[RowBatch]:
        """The rows of a part; a batch has at most ``_BATCH_ROWS`` and about ``_BATCH_TOKENS``."""
        import numpy as np

        ends = np.concatenate([[0], np.cumsum(plan.lengths)])
        row_ends = ends[plan.offsets]
        longest = int(np.diff(row_ends).max(initial=1))
        rows = max(1, min(_BATCH_ROWS, _BATCH_TOKENS // longest))
        for first in range(0, max(1, len(plan.categories)), rows):
            last = min(first + rows, len(plan.categories))
            own = slice(plan.offsets[first], plan.offsets[last])
            tokens = self._tokens.stretches(plan.chunks[own], plan.starts[own], plan.lengths[own])
            yield RowBatch(
                *ids_and_labels(tokens),
                row_offsets=(row_ends[first : last + 1] - row_ends[first]).astype(np.int32),
                document_lengths=plan.lengths[own].astype(np.int32),
                document_offsets=(plan.offsets[first : last + 1] - own.start).astype(np.int32),
                categories=plan.categories[first:last].astype(np.int32),
            )


def _describe(plan: PartPlan, path: Path) -> Part:
    import numpy as np

    ends = np.concatenate([[0], np.cumsum(plan.lengths)])
    sizes = ends[plan.offsets[1:]] - ends[plan.offsets[:-1]]
    tokens = np.bincount(plan.categories, weights=sizes, minlength=len(plan.names))
    return Part(
        rows=len(sizes),
        tokens=int(sizes.sum()),
        longest_row=int(sizes.max(initial=0)),
        category_tokens=dict(zip(plan.names, map(int, tokens), strict=True)),
        files={path.name: ArrowFile(path.stat().st_size, sha256_file(path))},
    )


class _ChunkWriter:
    """Takes the records of a chunk, tokenises them in batches, and writes its files."""

    def __init__(
        self,
        files: ChunkFiles,
        kind: DocumentKind[Any],
        *,
        hash_texts: bool,
        near_duplicates: bool,
    ) -> None:
        self.summary = ChunkSummary()
        self._files = files
        self._kind = kind
        self._hash_texts = hash_texts
        self._near_duplicates = near_duplicates
        self._streams = contextlib.ExitStack()
        self._side_files: dict[Path, TextIO] = {}
        self._categories: dict[str, int] = {}
        self._rejected: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        self._batch: list[tuple[int, Any, str]] = []
        self._characters = 0
        self._tables: list[Any] = []
        self._bands: list[Any] = []

    def __enter__(self) -> _ChunkWriter:
        self._token_file = self._streams.enter_context(self._files.tokens.open("wb"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._streams.close()
        if kind is None:
            self._write_tables()

    def add(self, line: int, fields: dict[str, Any] | RecordError) -> None:
        """Takes a record: it is rejected, filtered, or goes into the batch."""
        self.summary.records += 1
        try:
            if isinstance(fields, RecordError):
                raise fields
            verdict = self._kind.admit(self._kind.record(fields))
        except RecordError as error:
            self._rejected[str(error)] += 1
            quoted = error.text or _quote(fields)
            entry = {"line": line, "reason": str(error), "record": quoted}
            _write_line(self._side_file(self._files.rejected), entry)
            return
        if verdict.record is None:
            self._filtered[verdict.stage] += 1
            entry = {"line": line, "stage": verdict.stage, "reason": verdict.reason}
            entry["record"] = fields
            _write_line(self._side_file(self._files.excluded(verdict.stage)), entry)
            return
        text = self._kind.text(verdict.record)
        self._batch.append((line, verdict.record, text))
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Tokenises and writes what has gathered."""
        if not self._batch:
            return
        lines, records, texts = zip(*self._batch, strict=True)
        self._batch, self._characters = [], 0
        batch = self._kind.encode(records)
        self._token_file.write(batch.tokens.data)
        self.summary.crc = zlib.crc32(batch.tokens.data, self.summary.crc)
        self.summary.tokens += len(batch.tokens)
        self.summary.documents += len(records)
        self._tables.append(self._table(lines, records, texts, batch))
        if self._near_duplicates:
            from colossal_llama.dataset.cleaning.near_duplicates import band_hashes

            self._bands += map(band_hashes, texts)

    def _table(self, lines: Any, records: Any, texts: Any, batch: TokenBatch) -> Any:
        import numpy as np

        known = self._categories
        table = np.empty(len(lines), dtype=DOCUMENT_FIELDS)
        table["length"], table["line"] = batch.lengths, lines
        table["loss_start"], table["loss_tokens"] = batch.loss_start, batch.loss_tokens
        table["hash"] = [text_hash(text) for text in texts] if self._hash_texts else 0
        for index, record in enumerate(records):
            category = self._kind.category(record)
            table["category"][index] = known.setdefault(category, len(known))
        return table

    def _write_tables(self) -> None:
        import numpy as np

        empty = np.empty(0, dtype=DOCUMENT_FIELDS)
        _save(self._files.documents, np.concatenate([empty, *self._tables]))
        if self._bands:
            _save(self._files.bands, np.stack(self._bands))
        self.summary.categories = list(self._categories)
        self.summary.rejected = dict(self._rejected)
        self.summary.filtered = dict(self._filtered)
        self.summary.notes = dict(self._kind.notes)

    def _side_file(self, path: Path) -> TextIO:
        if path not in self._side_files:
            self._side_files[path] = self._streams.enter_context(_open_text(path))
        return self._side_files[path]


def _save(path: Path, array: Any) -> None:
    """Writes an .npy file. (NumPy's own writing loses the error number of a full disk.)"""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def _open_text(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", errors="replace")


def _write_line(stream: TextIO, value: dict[str, Any]) -> None:
    stream.write(_json(value) + "\n")


def _quote(fields: Any) -> str:
    return _json(fields)[:400]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # what could just be read may be nested too deep to be written
        return json.dumps({**value, "record": "nested too deep"} if "line" in value else "")
