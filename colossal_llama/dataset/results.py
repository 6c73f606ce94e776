"""What the chunks of a run came to: sums, documents, and the lists of what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.layout import Documents
from colossal_llama.dataset.sources import Chunk
from colossal_llama.dataset.spool import DOCUMENT_FIELDS, ChunkFiles, ChunkSummary
from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Results:
    """All chunks of the input, tokenised.

    ``first_lines`` are the lines of its file that come before each chunk.
    """

    spool: Path
    chunks: list[Chunk]
    summaries: list[ChunkSummary]
    first_lines: list[int]

    @classmethod
    def of(cls, spool: Path, chunks: Sequence[Chunk]) -> Results:
        """Reads what every chunk says of itself; all have to be done."""
        summaries = []
        for number in range(len(chunks)):
            summary = ChunkFiles(spool, number).summary()
            assert summary is not None
            summaries.append(summary)
        first_lines, file, lines = [], None, 0
        for chunk, summary in zip(chunks, summaries, strict=True):
            lines = lines if chunk.file == file else 0
            file = chunk.file
            first_lines.append(lines)
            lines += summary.lines
        return cls(spool, list(chunks), summaries, first_lines)

    @property
    def records(self) -> int:
        """Records in the input."""
        return sum(summary.records for summary in self.summaries)

    def total(self, name: str) -> Counter[str]:
        """The sum of a counter: "rejected", "filtered" or "notes"."""
        counter: Counter[str] = Counter()
        for summary in self.summaries:
            counter.update(getattr(summary, name))
        return Counter(dict(sorted(counter.items())))

    def check_rejected(self, most: float, listing: Path) -> None:
        """Raises DataError if more than the share ``most`` of the records is malformed.

        They are then written to ``listing``.
        """
        rejected = self.total("rejected")
        allowed = int(most * self.records + 1e-9)  # 0.29 x 100 is 28.999...
        if rejected.total() <= allowed:
            return
        with listing.open("w", encoding="utf-8") as stream:
            for entry in self.entries(".rejected.jsonl"):
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        first: dict[str, str] = {}
        for entry in self.entries(".rejected.jsonl"):
            first.setdefault(entry["reason"], f"{entry['file']}:{entry['line']}")
        reasons = [
            f"{count} x {reason} ({first[reason]})" for reason, count in rejected.most_common(5)
        ]
        more = f"; {len(rejected) - 5} reasons more" if len(rejected) > 5 else ""
        raise DataError(
            f"{rejected.total()} of {self.records} records are malformed, --max_rejected "
            f"{most:g} allows {allowed}: {'; '.join(reasons)}{more}. All are "
            f"listed in {listing}; mend them, or give a larger --max_rejected and --resume"
        )

    def entries(self, suffix: str) -> Iterator[dict[str, Any]]:
        """The JSON lines of the chunks' files with ``suffix``, with file and its line."""
        for number, chunk in enumerate(self.chunks):
            path = ChunkFiles(self.spool, number).path(suffix)
            if path.is_file():
                with path.open(encoding="utf-8") as stream:
                    for line in stream:
                        entry = json.loads(line)
                        entry["line"] += self.first_lines[number]
                        yield {"file": str(chunk.path), **entry}

    def write_lists(self, directory: Path, stages: Sequence[str]) -> None:
        """Writes ``rejected.jsonl`` and ``excluded/STAGE.jsonl``, those that have any line."""
        names = {".rejected.jsonl": "rejected.jsonl"}
        names |= {f".excluded-{stage}.jsonl": f"excluded/{stage}.jsonl" for stage in stages}
        for suffix, name in names.items():
            entries = self.entries(suffix)
            first = next(entries, None)
            if first is not None:
                (directory / name).parent.mkdir(exist_ok=True)
                with (directory / name).open("w", encoding="utf-8") as stream:
                    for entry in (first, *entries):
                        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def table(self) -> np.ndarray:
        """The documents' table, ``DOCUMENT_FIELDS`` [documents]; categories count over all."""
        import numpy as np

        code_of = {name: code for code, name in enumerate(self.category_names())}
        tables = [np.empty(0, dtype=DOCUMENT_FIELDS)]
        for number, summary in enumerate(self.summaries):
            table = np.load(ChunkFiles(self.spool, number).documents)
            codes = np.array([code_of[name] for name in summary.categories], dtype=np.int32)
            if len(table):
                table["category"] = codes[table["category"]]
            tables.append(table)
        return np.concatenate(tables)

    def category_names(self) -> list[str]:
        """All categories, sorted."""
        return sorted({name for summary in self.summaries for name in summary.categories})

    def bands(self) -> Iterator[np.ndarray]:
        """The columns of the near-duplicate hashes, uint64 [documents] each."""
        import numpy as np

        paths = [
            ChunkFiles(self.spool, number).bands
            for number, summary in enumerate(self.summaries)
            if summary.documents
        ]
        columns = np.load(paths[0], mmap_mode="r").shape[1] if paths else 0
        for column in range(columns):
            yield np.concatenate([np.load(path, mmap_mode="r")[:, column] for path in paths])

    def documents(self, table: np.ndarray, kept: np.ndarray) -> Documents:
        """The documents of ``table`` for which ``kept`` is true."""
        import numpy as np

        counts = [summary.documents for summary in self.summaries]
        chunks = np.repeat(np.arange(len(counts)), counts)
        lengths = table["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first = np.concatenate([[0], np.cumsum([summary.tokens for summary in self.summaries])])
        return Documents(
            names=self.category_names(),
            lengths=lengths[kept],
            loss_start=table["loss_start"].astype(np.int64)[kept],
            loss_tokens=table["loss_tokens"].astype(np.int64)[kept],
            categories=table["category"].astype(np.int64)[kept],
            hashes=table["hash"][kept],
            chunks=chunks[kept],
            offsets=(starts - first[chunks])[kept],
        )

    def lines_of(
        self, table: np.ndarray, dropped: np.ndarray
    ) -> list[tuple[int, Chunk, list[int]]]:
        """The lines in their chunks of the documents for which ``dropped`` is true."""
        import numpy as np

        first = np.concatenate([[0], np.cumsum([summary.documents for summary in self.summaries])])
        found = []
        for number, chunk in enumerate(self.chunks):
            own = slice(first[number], first[number + 1])
            lines = table["line"][own][dropped[own]].tolist()
            if lines:
                found.append((number, chunk, lines))
        return found
