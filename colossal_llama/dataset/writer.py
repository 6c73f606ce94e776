"""Writes a part: Arrow that ``datasets.load_from_disk`` opens, byte for byte reproducible."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama.storage import write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

ARROW_FILE = "data-00000-of-00001.arrow"
IGNORE_INDEX = -100
_ROWS_PER_BATCH = 256


class RowData(NamedTuple):
    """A finished row: int32 [length] twice, the lengths of its documents, its category."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_lengths: list[int]
    category: str


def write_part(directory: Path, rows: Iterable[RowData], categories: list[str]) -> None:
    """Writes ``rows`` to the new directory ``directory``; there may be none.

    ``datasets`` itself would put a random fingerprint beside the rows; here it is a constant,
    for the same rows have to give the same bytes.
    """
    import pyarrow as pa

    directory.mkdir()
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("document_lengths", pa.list_(pa.int32())),
            ("category", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    with (
        pa.OSFile(str(directory / ARROW_FILE), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for batch in _record_batches(rows, schema, categories):
            stream.write_batch(batch)
    write_json(directory / "dataset_info.json", {"features": None})  # as the Arrow schema says
    write_json(
        directory / "state.json",
        {
            "_data_files": [{"filename": ARROW_FILE}],
            "_fingerprint": "0" * 16,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def write_json_lines(path: Path, rows: Iterable[RowData]) -> Iterator[RowData]:
    """Passes ``rows`` on and writes each as a JSON line with the columns of the Arrow file."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            columns = row._asdict() | {
                "input_ids": row.input_ids.tolist(),
                "labels": row.labels.tolist(),
            }
            stream.write(json.dumps(columns, ensure_ascii=False) + "\n")
            yield row


def _record_batches(
    rows: Iterable[RowData], schema: pyarrow.Schema, categories: list[str]
) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as pa

    # A stream without any batch cannot be opened as a dataset: a part without rows has an
    # empty one.
    iterator = iter(rows)
    batch = list(itertools.islice(iterator, _ROWS_PER_BATCH))
    while True:
        codes = pa.array([categories.index(row.category) for row in batch], pa.int32())
        columns = [
            _list_array([row.input_ids for row in batch]),
            _list_array([row.labels for row in batch]),
            _list_array([row.document_lengths for row in batch]),
            pa.DictionaryArray.from_arrays(codes, pa.array(categories, pa.string())),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        batch = list(itertools.islice(iterator, _ROWS_PER_BATCH))
        if not batch:
            return


def _list_array(values: list[Any]) -> pyarrow.ListArray:
    """A list<int32> column of one list per row."""
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat: np.ndarray = np.concatenate([np.asarray([], dtype=np.int32), *values]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
