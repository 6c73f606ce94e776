"""Tokenised documents on disk, so that memory does not limit the size of a dataset."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from colossal_llama.dataset.packing import Row, Segment


class Document(NamedTuple):
    """A tokenised document: ``input_ids`` int32 [length], ``loss`` bool [length]."""

    category: str
    input_ids: np.ndarray
    loss: np.ndarray


class Spool:
    """Appends documents to two flat files (5 bytes per token) and reads pieces of them back.

    Add every document, call ``finish`` once, then read. Only a length and a category per
    document stay in memory.
    """

    def __init__(self, directory: Path) -> None:
        self._ids_path, self._loss_path = directory / "input_ids.bin", directory / "loss.bin"
        self._ids_file, self._loss_file = self._ids_path.open("wb"), self._loss_path.open("wb")
        self._lengths = array("q")
        self._categories = array("q")
        self._seen: dict[str, int] = {}

    def add(self, document: Document) -> None:
        """Appends a document, which has at least one token."""
        assert len(document.input_ids) == len(document.loss) > 0
        assert document.input_ids.dtype == "int32"
        assert document.loss.dtype == "bool"
        self._ids_file.write(document.input_ids.data)
        self._loss_file.write(document.loss.data)
        self._lengths.append(len(document.input_ids))
        self._categories.append(self._seen.setdefault(document.category, len(self._seen)))

    def __len__(self) -> int:
        return len(self._lengths)

    def finish(self) -> None:
        """Ends the writing. Sets ``names`` (categories, sorted), ``categories`` and ``lengths``."""
        import numpy as np

        self._ids_file.close()
        self._loss_file.close()
        self.names = sorted(self._seen)
        ranks = np.array([self.names.index(name) for name in self._seen], dtype=np.int64)
        self.categories = ranks[np.array(self._categories, dtype=np.int64)]
        self.lengths = np.array(self._lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._ids = np.memmap(self._ids_path, dtype=np.int32, mode="r")
        self._loss = np.memmap(self._loss_path, dtype=np.bool_, mode="r")

    def row_ids(self, row: Row) -> np.ndarray:
        """The tokens of a row, int32 [length]."""
        import numpy as np

        return np.concatenate([self._ids[self._slice(segment)] for segment in row])

    def row_loss(self, row: Row) -> np.ndarray:
        """Which tokens of a row carry loss, bool [length]."""
        import numpy as np

        return np.concatenate([self._loss[self._slice(segment)] for segment in row])

    def _slice(self, segment: Segment) -> slice:
        start = int(self._starts[segment.document])
        return slice(start + segment.start, start + segment.stop)
