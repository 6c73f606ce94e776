"""Writes a part: Arrow that ``datasets.load_from_disk`` opens, byte for byte reproducible."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama.storage import write_json

if TYPE_CHECKING:
    import numpy as np

ARROW_FILE = "data-00000-of-00001.arrow"
IGNORE_INDEX = -100


class RowBatch(NamedTuple):
    """Finished rows, one after the other.

    Row ``r`` has the tokens ``row_offsets[r]`` to ``row_offsets[r + 1]`` and the documents
    ``document_offsets[r]`` to ``document_offsets[r + 1]``. int32 all: ``input_ids`` and
    ``labels`` [tokens], ``document_lengths`` [documents], the offsets [rows + 1], and
    ``categories`` [rows], indices into the part's.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    row_offsets: np.ndarray
    document_lengths: np.ndarray
    document_offsets: np.ndarray
    categories: np.ndarray


def write_part(directory: Path, batches: Iterable[RowBatch], categories: list[str]) -> None:
    """Writes rows to the new directory ``directory``.

    ``datasets`` itself would put a random fingerprint beside the rows; here it is a constant,
    for the same rows have to give the same bytes.

    Args:
        directory: of the part.
        batches: at least one, for a stream without any cannot be opened as a dataset; a part
            without rows has an empty one.
        categories: the names of all categories.
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
    names = pa.array(categories, pa.string())
    with (
        pa.OSFile(str(directory / ARROW_FILE), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for batch in batches:
            columns = [
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
                for offsets, values in (
                    (batch.row_offsets, batch.input_ids),
                    (batch.row_offsets, batch.labels),
                    (batch.document_offsets, batch.document_lengths),
                )
            ]
            columns.append(pa.DictionaryArray.from_arrays(pa.array(batch.categories), names))
            stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
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


def write_json_lines(
    path: Path, batches: Iterable[RowBatch], categories: list[str]
) -> Iterator[RowBatch]:
    """Passes ``batches`` on and writes each row as a JSON line with the Arrow file's columns."""
    with path.open("w", encoding="utf-8") as stream:
        for batch in batches:
            for row, category in enumerate(batch.categories):
                tokens = slice(*batch.row_offsets[row : row + 2])
                documents = slice(*batch.document_offsets[row : row + 2])
                columns = {
                    "input_ids": batch.input_ids[tokens].tolist(),
                    "labels": batch.labels[tokens].tolist(),
                    "document_lengths": batch.document_lengths[documents].tolist(),
                    "category": categories[category],
                }
                stream.write(json.dumps(columns, ensure_ascii=False) + "\n")
            yield batch
