"""Raw text for learning and measuring a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from colossal_llama.storage import find_files, read_jsonl, read_lines, text_of

_JSON_LINES = (".jsonl", ".jsonl.gz")
_LINES = (".txt", ".txt.gz")

_LINE_END = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")

# Every so many documents one is kept aside to measure on.
HELD_OUT_EVERY = 100
# Enough for three digits of bytes per token, and quick to encode ten times.
_HELD_OUT_BYTES = 2_000_000
_HELD_OUT_DOCUMENT = 100_000  # characters of one document that count


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files of text among and directly in ``paths``, sorted per directory.

    Raises:
        DataError: a path does not exist, holds no such file, or a file is named twice.
    """
    return find_files(paths, (*_JSON_LINES, *_LINES))


def documents(path: Path) -> Iterator[str]:
    """The documents of one file: a line of a text file; of a JSON line source + target, or text.

    Raises:
        DataError: naming file:line, for a line that is not what the file's name promises.
    """
    if path.name.endswith(_JSON_LINES):
        for number, record in read_jsonl(path):
            where = f"{path}:{number}"
            if "text" in record and not {"source", "target"} & record.keys():
                yield text_of(record, "text", where)
            else:
                yield text_of(record, "source", where) + text_of(record, "target", where)
        return
    for _, line in read_lines(path):
        if text := line.rstrip("\r\n"):
            yield text


@dataclass
class EvenSample:
    """Texts spread evenly over a stream of unknown length, at most ``limit`` bytes of them.

    Every ``step``-th text is kept; where they become too many every second one goes and the step
    doubles, so the result holds between half the limit and all of it, whatever comes.
    """

    limit: int  # UTF-8 bytes
    texts: list[str] = field(default_factory=list)
    bytes: int = 0  # in texts
    step: int = 1
    seen: int = 0  # texts
    bytes_seen: int = 0

    def add(self, text: str) -> None:
        size = utf8_length(text)
        if self.seen % self.step == 0:
            self.texts.append(text)
            self.bytes += size
        self.seen += 1
        self.bytes_seen += size
        while self.bytes > self.limit and len(self.texts) > 1:
            self.texts = self.texts[::2]
            self.bytes = sum(map(utf8_length, self.texts))
            self.step *= 2


def utf8_length(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


@dataclass(frozen=True)
class Sample:
    """What is learned from, what is kept aside, and what was left out."""

    lines: EvenSample
    held_out: EvenSample  # documents
    documents: int
    short_lines: int  # left out
    long_lines: int  # cut

    def summary(self) -> str:
        """For the terminal: how much of the text is used."""
        taken, seen = self.lines.bytes / 1e6, self.lines.bytes_seen / 1e6
        share = f"{taken:.1f} MB" if self.lines.step == 1 else f"{taken:.1f} of {seen:.1f} MB"
        return (
            f"learned from {share} in {len(self.lines.texts)} lines; {self.short_lines} short "
            f"lines left out, {self.long_lines} long ones cut, {self.held_out.seen} of "
            f"{self.documents} documents kept aside"
        )


def read_sample(
    files: Iterable[Path],
    *,
    min_line_length: int,
    max_line_length: int,
    max_bytes: int,
    hold_out: bool,
) -> Sample:
    """Reads the text to learn from, line by line.

    Args:
        files: see ``text_files``.
        min_line_length: shorter lines are left out, in characters.
        max_line_length: longer lines are cut in several, in characters.
        max_bytes: of longer text an even sample of at most this many bytes is taken.
        hold_out: keep every ``HELD_OUT_EVERY``-th document aside.

    Raises:
        DataError: as ``documents`` does.
    """
    from tqdm import tqdm

    lines, held_out = EvenSample(max_bytes), EvenSample(_HELD_OUT_BYTES)
    count = short = long = 0
    with tqdm(desc="reading text", unit=" documents", delay=1) as progress:
        for path in files:
            for document in documents(path):
                count += 1
                progress.update()
                # The middle one of each hundred: of fewer than fifty documents none is missed.
                if hold_out and count % HELD_OUT_EVERY == HELD_OUT_EVERY // 2:
                    held_out.add(document[:_HELD_OUT_DOCUMENT])
                    continue
                for line in _LINE_END.split(document):
                    short += 0 < len(line) < min_line_length
                    long += len(line) > max_line_length
                    if line and len(line) >= min_line_length:
                        for at in range(0, len(line), max_line_length):
                            lines.add(line[at : at + max_line_length])
    return Sample(lines, held_out, count, short, long)


def read_held_out(paths: Iterable[Path]) -> EvenSample:
    """An even sample of the documents in ``paths``, to measure on.

    Raises:
        DataError: as ``text_files`` and ``documents`` do.
    """
    held_out = EvenSample(_HELD_OUT_BYTES)
    for path in text_files(paths):
        for document in documents(path):
            held_out.add(document[:_HELD_OUT_DOCUMENT])
    return held_out
