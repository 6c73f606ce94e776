"""Tokenised documents on disk, a few files for each chunk of the input.

A token that carries loss is written as its id, one that does not as the id's complement (``~id``,
a negative number), int32 each: 4 bytes a token say both. Beside the tokens lies a table with a
line per document. A chunk's ``.json`` is written last and renamed into place: where it is, the
chunk is done, and a run that was interrupted need not do it again.
"""

from __future__ import annotations

import functools
import io
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.dataset.writer import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np

# Per document: tokens; position of the first with loss; tokens with loss; index into the chunk's
# categories; line in the chunk; hash of the text.
DOCUMENT_FIELDS = [
    *(("length", "<i4"), ("loss_start", "<i4"), ("loss_tokens", "<i4")),
    *(("category", "<i4"), ("line", "<i4"), ("hash", "<u8")),
]


_OPEN_FILES = 256


@dataclass
class ChunkSummary:
    """What became of a chunk: ``records`` = documents + rejected + filtered.

    ``rejected`` and ``filtered`` count by reason and by stage, ``notes`` whatever else was done
    to documents that were kept. ``crc`` is of the tokens.
    """

    lines: int = 0
    records: int = 0
    documents: int = 0
    tokens: int = 0
    crc: int = 0
    categories: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


class ChunkFiles:
    """The files of one chunk in the spool directory."""

    def __init__(self, directory: Path, number: int) -> None:
        self._stem = directory / f"{number:08d}"

    def path(self, suffix: str) -> Path:
        """The file that ends in ``suffix``."""
        return self._stem.with_suffix(suffix)

    @property
    def tokens(self) -> Path:
        """Raw int32, one document after the other."""
        return self.path(".tokens")

    @property
    def documents(self) -> Path:
        """The table of documents, .npy of ``DOCUMENT_FIELDS``."""
        return self.path(".npy")

    @property
    def bands(self) -> Path:
        """Near-duplicate hashes, .npy uint64 [documents, bands]."""
        return self.path(".bands.npy")

    @property
    def rejected(self) -> Path:
        """Malformed records as JSON lines, if there are any."""
        return self.path(".rejected.jsonl")

    def excluded(self, stage: str) -> Path:
        """What a cleaning stage excluded, as JSON lines, if it did."""
        return self.path(f".excluded-{stage}.jsonl")

    def finish(self, summary: ChunkSummary) -> None:
        """Marks the chunk as done."""
        temporary = self.path(".json.tmp")
        temporary.write_text(json.dumps(asdict(summary), ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, self.path(".json"))

    def summary(self) -> ChunkSummary | None:
        """What the chunk says of itself; None if it is not done."""
        try:
            return ChunkSummary(**json.loads(self.path(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_whole(self) -> bool:
        """Whether the chunk is done and its files are as they were written (after a crash)."""
        import numpy as np

        summary = self.summary()
        if summary is None:
            return False
        try:
            return (
                _crc(self.tokens) == summary.crc
                and len(np.load(self.documents)) == summary.documents
            )
        except (OSError, ValueError, EOFError):
            return False

    def remove(self) -> None:
        """Deletes what a run that did not finish the chunk has left."""
        if not self.tokens.exists():  # written first; there may be a hundred thousand chunks
            return
        for path in self._stem.parent.glob(f"{self._stem.name}.*"):
            path.unlink()


def _crc(path: Path) -> int:
    """CRC-32 of a file, which may be larger than memory."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def with_loss_mask(ids: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Ids and mask (bool) as the spool's tokens, int32 [length]."""
    import numpy as np

    return np.where(loss, ids, ~ids).astype(np.int32)


def ids_and_labels(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The spool's tokens as ids and labels (-100 where there is no loss), int32 [length]."""
    import numpy as np

    # The sign, shifted over all bits, complements exactly the negative numbers.
    ids = tokens ^ (tokens >> 31)
    return ids, np.where(tokens < 0, np.int32(IGNORE_INDEX), tokens)


class TokenFiles:
    """Reads stretches of the chunks' tokens.

    Not by mapping files into memory: that would be fast as well, but what was read would count
    as memory of the process, which then seems to grow with the corpus.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # There may be more chunks than a process may have open files.
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._open_chunk)

    def stretches(self, chunks: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Stretches of the chunks' tokens, one after the other, int32 [sum of lengths].

        Args:
            chunks: numbers of the chunks, int [stretches].
            starts: first token of each stretch in its chunk, int [stretches].
            lengths: its tokens, int [stretches].
        """
        import numpy as np

        tokens = np.empty(int(lengths.sum()), dtype=np.int32)
        view = memoryview(tokens.data).cast("B") if len(tokens) else memoryview(b"")
        begin = 0
        places = zip(chunks.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for chunk, start, length in places:
            end = begin + 4 * length
            read = os.preadv(self._open(chunk).fileno(), [view[begin:end]], 4 * start)
            assert read == end - begin, (chunk, start, length)
            begin = end
        return tokens

    def _open_chunk(self, chunk: int) -> io.FileIO:
        return io.FileIO(ChunkFiles(self._directory, chunk).tokens)
