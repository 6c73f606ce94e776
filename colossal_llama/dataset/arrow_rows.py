"""Reads the rows of a part where they lie in the file: nothing but the rows asked for is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_COLUMNS = {
    "input_ids": "list<item: int32>",
    "labels": "list<item: int32>",
    "document_lengths": "list<item: int32>",
    "category": "dictionary<values=string, indices=int32, ordered=0>",
}


class ArrowRows:
    """The rows of an Arrow stream file, mapped into memory.

    Opening reads the header of each record batch. A batch is checked when the first of its rows
    is taken, before anything in it is followed: a damaged file is an error, not a crash.
    """

    def __init__(self, path: Path) -> None:
        """Opens ``path``.

        Raises:
            DataError: it is not an Arrow file of rows, or is cut short.
        """
        import numpy as np

        self.path = path
        self._batches = list(_record_batches(path))
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._checked = bytearray(len(self._batches))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> dict[str, Any]:
        """The row ``index``: ``category``, text, and three arrays that cannot be written to.

        ``input_ids`` and ``labels``, int32 [length], and ``document_lengths``, int32 [documents].

        Raises:
            DataError: the record batch with this row is damaged.
        """
        import numpy as np

        number = int(self._ends.searchsorted(index, side="right"))
        batch = self._batches[number]
        place = index - (int(self._ends[number]) - batch.num_rows)
        if not self._checked[number]:
            self._check(batch)
            self._checked[number] = True
        found = {name: batch[name][place] for name in _COLUMNS}
        # Array.to_numpy would import pandas, which takes longer than a first batch should.
        row = {
            name: value.as_py() if name == "category" else np.from_dlpack(value.values)
            for name, value in found.items()
        }
        lengths = len(row["input_ids"]), len(row["labels"]), int(row["document_lengths"].sum())
        if len(set(lengths)) > 1:
            raise DataError(
                f"{self.path}: row {index} has {lengths[0]} ids, {lengths[1]} labels and documents "
                f"of {lengths[2]} tokens; the file was changed: prepare the dataset again"
            )
        return row

    def _check(self, batch: pyarrow.RecordBatch) -> None:
        """Raises DataError if the batch leads out of its own memory."""
        import pyarrow as pa

        try:
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise _damaged(self.path, error) from None


def _record_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as pa

    try:
        # Batches keep the mapping alive; open files are limited, and there may be many parts.
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            found = {field.name: str(field.type) for field in stream.schema}
            if not _COLUMNS.items() <= found.items():
                raise DataError(
                    f"{path}: has the columns {found}, expected {_COLUMNS}; "
                    "prepare the dataset with this program"
                )
            yield from stream
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{path}: cannot be read as Arrow: {reason}; the file is incomplete or was changed: "
        "prepare the dataset again"
    )
