"""Opens prepared parts for training, after checking them at the door."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.dataset.arrow_rows import ArrowRows
from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    VALIDATION_PART,
    ArrowFile,
    Manifest,
    Part,
    check_files,
    check_tokenizer,
    read_manifest,
    tokenizer_identity,
)
from colossal_llama.dataset.writer import ARROW_FILE
from colossal_llama.errors import DataError

VERIFY_SIZE = "size"
VERIFY_FULL = "full"
VERIFY_OFF = "off"
VERIFICATIONS = (VERIFY_SIZE, VERIFY_FULL, VERIFY_OFF)
_HASHED_AT_ONCE = 1 << 20  # bytes


@dataclass
class TrainingRows:
    """The rows of one or several parts, numbered through part after part.

    ``files`` and ``fingerprints`` (SHA-256 of its rows) have an entry for each part that has
    rows. ``datasets`` has these parts' rows for each path they were opened by. Kind, tokenizer and
    chat template of ``manifest`` are those of all parts. ``categories`` are those of any part, in
    alphabetical order.
    """

    files: list[ArrowRows]
    manifest: Manifest
    datasets: list[list[int]]
    fingerprints: list[str]
    categories: list[str]
    longest_row: int

    def __post_init__(self) -> None:
        import numpy as np

        self._ends = np.cumsum(self.rows_per_part)

    def __len__(self) -> int:
        return sum(self.rows_per_part)

    @property
    def rows_per_part(self) -> list[int]:
        """The rows of every part, whichever path it was opened by."""
        return [rows for parts in self.datasets for rows in parts]

    def where(self, index: int) -> str:
        """The row ``index`` as its file and, after a colon, its place there, from 0."""
        part = int(self._ends.searchsorted(index, side="right"))
        place = index - int(self._ends[part]) + len(self.files[part])
        return f"{self.files[part].path}:{place}"

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows ``indices``: ``category``, text, and arrays that cannot be written to.

        ``input_ids`` and ``labels``, int32 [length], and ``document_lengths``, int32 [documents].

        Raises:
            DataError: a file of the part is damaged where the rows are.
        """
        parts = self._ends.searchsorted(indices, side="right").tolist()
        return [
            self.files[part].row(index - int(self._ends[part]) + len(self.files[part]))
            for part, index in zip(parts, indices, strict=True)
        ]


def check_apart(held_out: TrainingRows, training: TrainingRows) -> None:
    """Refuses parts to evaluate on that are trained on.

    Raises:
        DataError: naming one.
    """
    trained = set(training.fingerprints)
    for file, fingerprint in zip(held_out.files, held_out.fingerprints, strict=True):
        if fingerprint in trained:
            raise DataError(
                f"--eval_dataset {file.path.parent} would be trained on: --dataset has the same "
                f"rows; give the {VALIDATION_PART} part of a dataset prepared with "
                "--validation_fraction"
            )


def open_parts(
    paths: Sequence[Path], tokenizer_dir: Path, max_length: int, verify: str = VERIFY_SIZE
) -> TrainingRows:
    """Opens parts for training. Rows are read from the files when they are taken.

    The manifests are always checked: parts have to be listed, made with this tokenizer, alike.

    Args:
        paths: ``part-*`` or ``validation`` directories, or output directories, which stand for
            all their training parts.
        tokenizer_dir: the tokenizer of the model that is trained.
        max_length: longest row in tokens that the run takes.
        verify: how files are compared with the manifest: "size", "full" (SHA-256 too, which
            reads every byte), or "off".

    Raises:
        DataError: a part is missing or incomplete, was made with another tokenizer, has longer
            rows, or the parts do not belong together; names both sides.
    """
    assert verify in VERIFICATIONS
    by_path = part_directories(paths)
    parts = list(itertools.chain(*by_path))
    manifests = {part.parent: read_manifest(part.parent) for part in parts}
    tokenizer = tokenizer_identity(tokenizer_dir)
    for directory, manifest in manifests.items():
        check_tokenizer(manifest, directory, tokenizer, tokenizer_dir)
    _check_alike(manifests)
    entries = {
        part: _check_part(part, manifests[part.parent], max_length, sizes=verify != VERIFY_OFF)
        for part in parts
    }
    if verify == VERIFY_FULL:
        _check_contents(entries)
    files = {part: _open(part, entry) for part, entry in entries.items() if entry.rows}
    if not files:
        raise DataError(f"{', '.join(map(str, paths))}: no part has any row")
    return TrainingRows(
        list(files.values()),
        manifests[parts[0].parent],
        [[len(files[part]) for part in own if part in files] for own in by_path],
        [entries[part].files[ARROW_FILE].sha256 for part in files],
        sorted({name for part in files for name in entries[part].category_tokens}),
        max(entries[part].longest_row for part in files),
    )


def part_directories(paths: Sequence[Path]) -> list[list[Path]]:
    """The parts of each path, in order: those of a directory of parts, or the one it is itself.

    Raises:
        DataError: a path is neither, or a part is named twice.
    """
    found, seen = [], set()
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: no such directory; expected a part-* directory")
        if (path / MANIFEST_FILE).is_file():
            parts = [path / name for name in sorted(read_manifest(path).parts)]
        else:
            parts = [path.resolve()]  # "." too has a parent with a manifest
        for part in parts:
            if part.resolve() in seen:
                raise DataError(f"{part} is given twice; its rows would count double")
            seen.add(part.resolve())
        found.append(parts)
    return found


def _check_part(part: Path, manifest: Manifest, max_length: int, *, sizes: bool) -> Part:
    if sizes or manifest.part(part.name) is None:
        check_files(manifest, part)
    entry = manifest.part(part.name)
    assert entry is not None
    if entry.longest_row > max_length:
        raise DataError(
            f"{part} has rows of {entry.longest_row} tokens, --max_length is {max_length}; "
            f"raise it, or prepare the dataset with --max_length {max_length}"
        )
    return entry


def _open(part: Path, entry: Part) -> ArrowRows:
    rows = ArrowRows(part / ARROW_FILE)
    if len(rows) != entry.rows:
        raise DataError(
            f"{rows.path}: {len(rows)} rows, the manifest says {entry.rows}; "
            "the file is incomplete or was changed: prepare the dataset again"
        )
    return rows


def _check_contents(parts: Mapping[Path, Part]) -> None:
    """Raises DataError if a file is not the one that the manifest describes, byte for byte.

    Files are read side by side, a thread for each processor: hashing lets go of Python's lock.
    """
    from tqdm import tqdm

    files = {
        part / name: file for part, entry in parts.items() for name, file in entry.files.items()
    }
    size = sum(file.bytes for file in files.values())
    bar = tqdm(desc="verifying data", total=size, unit="B", unit_scale=True, disable=None)
    stopped = threading.Event()

    def advance(count: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with tqdm.get_lock():
            bar.update(count)

    def check(item: tuple[Path, ArrowFile]) -> None:
        path, expected = item
        found = _sha256(path, advance)
        if found != expected.sha256:
            raise DataError(
                f"{path}: SHA-256 {found[:12]}, the manifest says {expected.sha256[:12]}; "
                "the file was changed: prepare the dataset again"
            )

    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            for _ in threads.map(check, files.items()):
                pass
        finally:
            stopped.set()  # after an error or Ctrl-C nobody waits for the other files


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def _check_alike(manifests: dict[Path, Manifest]) -> None:
    """Raises DataError if parts of different kinds or chat formats are to be mixed."""
    (first_path, first), *others = manifests.items()
    for path, manifest in others:
        if manifest.kind != first.kind:
            raise DataError(
                f"{path} is a {manifest.kind} dataset, {first_path} a {first.kind} dataset; "
                "train on one kind at a time"
            )
        if manifest.chat_template != first.chat_template:
            raise DataError(
                f"{path} and {first_path} were formatted with different chat templates; "
                "prepare them with the same tokenizer_config.json"
            )
