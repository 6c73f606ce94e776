"""Prepared datasets with rows of the test's choosing, written without the prepare commands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colossal_llama.dataset.manifest import (
    SCHEMA_VERSION,
    VALIDATION_PART,
    ArrowFile,
    DocumentCount,
    Manifest,
    Part,
    tokenizer_identity,
)
from colossal_llama.dataset.writer import ARROW_FILE, RowBatch, write_part
from colossal_llama.storage import sha256_file

CATEGORIES = ["code", "en", "zh"]


class RowData(NamedTuple):
    """A row: int32 [length] twice, the lengths of its documents, its category."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_lengths: list[int]
    category: str


def write_rows(directory: Path, rows: Sequence[RowData], categories: list[str]) -> None:
    """Writes a part of these rows, in batches of 256."""

    def offsets(values: Sequence[Sized]) -> np.ndarray:
        return np.cumsum([0, *map(len, values)]).astype(np.int32)

    def batch(rows: Sequence[RowData]) -> RowBatch:
        nothing = np.empty(0, np.int32)
        return RowBatch(
            np.concatenate([nothing, *(row.input_ids for row in rows)]).astype(np.int32),
            np.concatenate([nothing, *(row.labels for row in rows)]).astype(np.int32),
            offsets([row.input_ids for row in rows]),
            np.concatenate([nothing, *(row.document_lengths for row in rows)]).astype(np.int32),
            offsets([row.document_lengths for row in rows]),
            np.array([categories.index(row.category) for row in rows], np.int32),
        )

    starts = range(0, max(1, len(rows)), 256)
    write_part(directory, (batch(rows[start : start + 256]) for start in starts), categories)


def some_rows(count: int, seed: int = 0, longest: int = 40) -> list[RowData]:
    """Rows of 1 to ``longest`` tokens that differ from each other in everything."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(1, longest + 1))
        ids = generator.integers(0, 32_000, length, dtype=np.int32)
        labels = np.where(generator.random(length) < 0.3, -100, ids).astype(np.int32)
        cuts = sorted(set(generator.integers(0, length + 1, 3).tolist()) | {0, length})
        rows.append(RowData(ids, labels, np.diff(cuts).tolist(), str(generator.choice(CATEGORIES))))
    return rows


def write_tokenizer(directory: Path, pieces: str = "abc") -> Path:
    """As much of a tokenizer as a fingerprint is made from."""
    directory.mkdir(parents=True)
    model = {"vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    return directory


def write_dataset(
    directory: Path,
    tokenizer_dir: Path,
    parts: Sequence[Sequence[RowData]],
    validation: Sequence[RowData] | None = None,
) -> Path:
    """Writes ``parts`` as part-00000 and so on, a validation part if given, and the manifest."""
    directory.mkdir(parents=True)
    rows_by_name = {f"part-{number:05d}": rows for number, rows in enumerate(parts)}
    Manifest(
        schema_version=SCHEMA_VERSION,
        kind="pretrain",
        tokenizer=tokenizer_identity(tokenizer_dir),
        tokenizer_backend="hf",
        max_length=64,
        seed=42,
        documents=DocumentCount(0, 0, 0, 0),
        rejected={},
        filtered={},
        notes={},
        categories={},
        padding_share=0.0,
        chat_template=None,
        settings={},
        parts={name: _write(directory / name, rows) for name, rows in rows_by_name.items()},
        validation=None if validation is None else _write(directory / VALIDATION_PART, validation),
    ).write(directory)
    return directory


def _write(part: Path, rows: Sequence[RowData]) -> Part:
    write_rows(part, rows, CATEGORIES)
    lengths = [len(row.input_ids) for row in rows]
    path = part / ARROW_FILE
    files = {ARROW_FILE: ArrowFile(path.stat().st_size, sha256_file(path))}
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row.category] += len(row.input_ids)
    return Part(len(rows), sum(lengths), max(lengths, default=0), dict(tokens), files)


def plain(rows: Sequence[RowData | Mapping]) -> list[tuple]:
    """Rows as they were written or taken, comparable."""
    columns = [row._asdict() if isinstance(row, RowData) else row for row in rows]
    return [
        tuple(
            value if isinstance(value, str) else tuple(np.asarray(value).tolist())
            for value in (row[name] for name in RowData._fields)
        )
        for row in columns
    ]
