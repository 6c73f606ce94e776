"""The directories of a run that can be interrupted and continued, by one machine or by many.

Beside the output ``data`` lie, until the run is complete,

- ``.data.work`` (or a directory in ``--data_cache_dir``): the tokenised chunks, ``settings.json``
  that says of what, and what was written of the parts;
- ``.data.staging``: the parts, which take the output's name all at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colossal_llama.dataset.manifest import ArrowFile, Part
from colossal_llama.errors import DataError
from colossal_llama.storage import (
    read_json,
    refuse_existing,
    replace_directory,
    sha256_file,
    write_json,
)

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes.

    Args:
        arrow: final directory of the parts.
        jsonl: final directory of the copy in JSON lines, if one is asked for.
        work: tokenised chunks and notes of progress.
    """

    arrow: Path
    jsonl: Path | None
    work: Path

    @classmethod
    def of(cls, arrow: Path, jsonl: Path | None, cache: Path | None) -> Places:
        """The places of a run; those of the same output are always the same."""
        # Resolved: a link would be replaced, not followed, when the output takes its name.
        arrow = Path(os.path.realpath(arrow))
        jsonl = jsonl and Path(os.path.realpath(jsonl))
        name = f".{arrow.name}.work"
        if cache is not None:
            name = f"{arrow.name}-{hashlib.sha256(str(arrow).encode()).hexdigest()[:8]}.work"
        return cls(arrow, jsonl, (cache or arrow.parent).absolute() / name)

    @property
    def spool(self) -> Path:
        """The tokenised chunks."""
        return self.work / "chunks"

    @property
    def staged_arrow(self) -> Path:
        """The parts, before they are complete."""
        return _staging(self.arrow)

    @property
    def staged_jsonl(self) -> Path | None:
        """The JSON lines, before they are complete."""
        return self.jsonl and _staging(self.jsonl)

    @property
    def rejected(self) -> Path:
        """Where malformed records are listed if there are too many of them for an output.

        No name that would be read as input, where input and output lie side by side.
        """
        return self.arrow.with_name(f"{self.arrow.name}-rejected.log")

    def note_part(self, name: str, part: Part) -> None:
        """Remembers that a part is written."""
        write_json(self.work / "parts" / f"{name}.json", asdict(part))

    def written_part(self, name: str) -> Part | None:
        """What was noted of a part; None if it is not written."""
        path = self.work / "parts" / f"{name}.json"
        if not path.is_file() or not (self.staged_arrow / name).is_dir():
            return None
        content = read_json(path)
        files = {file: ArrowFile(**entry) for file, entry in content.pop("files").items()}
        return Part(**content, files=files)

    def has_whole_part(self, name: str) -> bool:
        """Whether a part is written, and its files are as they were noted (after a crash)."""
        part = self.written_part(name)
        if part is None:
            return False
        if self.staged_jsonl and not (self.staged_jsonl / f"{name}.jsonl").is_file():
            return False
        paths = [(self.staged_arrow / name / file, noted) for file, noted in part.files.items()]
        return all(path.is_file() and sha256_file(path) == noted.sha256 for path, noted in paths)

    def complete(self) -> None:
        """Gives the outputs their names, and removes everything else."""
        if self.jsonl and self.staged_jsonl:
            replace_directory(self.staged_jsonl, self.jsonl)
        replace_directory(self.staged_arrow, self.arrow)
        shutil.rmtree(self.work)
        self.rejected.unlink(missing_ok=True)  # of a run that ended with it

    def discard(self) -> None:
        """Removes whatever an earlier run left."""
        for directory in (self.work, self.staged_arrow, self.staged_jsonl):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.staging")


@contextlib.contextmanager
def open_workspace(
    places: Places, settings: dict[str, Any], *, resume: bool, overwrite: bool, share: int | None
) -> Iterator[None]:
    """Prepares the directories for a run and holds them until it ends.

    Args:
        places: the directories.
        settings: all on which the output depends.
        resume: go on with what an interrupted run left.
        overwrite: replace outputs, and discard what was left.
        share: number of this machine's share; the machines go on with each other's work.

    Raises:
        DataError: an output exists; something was left of an interrupted run, or another run is
            at work; names the directory.
    """
    interrupted = resume and (places.work / SETTINGS_FILE).is_file()
    # An interruption may have come between the two outputs' taking their names.
    for target in filter(None, (places.arrow, None if interrupted else places.jsonl)):
        refuse_existing(target, overwrite=overwrite)
        if os.path.ismount(target):
            raise DataError(f"{target} is a mount point, which cannot be replaced; use one in it")
    lock = places.arrow.with_name(f".{places.arrow.name}.lock")
    with _lock(lock, shared=share is not None):
        try:
            if share is None:
                _prepare(places, settings, resume=resume, overwrite=overwrite, shared=False)
                yield
                return
            with _lock(places.work / f"share-{share}.lock"):
                with _lock(places.work / "settings.lock", wait=True):
                    _prepare(places, settings, resume=True, overwrite=False, shared=True)
                yield
        finally:
            if not places.work.exists():
                lock.unlink(missing_ok=True)


def _prepare(
    places: Places, settings: dict[str, Any], *, resume: bool, overwrite: bool, shared: bool
) -> None:
    path = places.work / SETTINGS_FILE
    if path.is_file():
        # Through JSON: what was written must compare equal to what will be.
        changed = _differences(read_json(path), json.loads(json.dumps(settings)))
        if shared and changed:
            raise DataError(
                f"{places.work} is of shares with other settings ({', '.join(changed)}); give "
                f"the same again, or remove it and {places.staged_arrow} to start anew"
            )
        if resume and changed:
            raise DataError(
                f"{places.work} is of a run with other settings ({', '.join(changed)}); give "
                "the same again, or --overwrite instead of --resume to start anew"
            )
        if not resume and not changed and not overwrite:
            raise DataError(
                f"{places.work} holds an interrupted run of this command; --resume goes on "
                "with it, --overwrite starts anew"
            )
        if not resume:
            _clear(places)
    else:  # what is staged without settings is of who knows what
        _clear(places)
    for directory in (places.spool, places.staged_arrow, places.staged_jsonl):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, settings)


def _clear(places: Places) -> None:
    """Removes everything but the lock that this run holds."""
    for directory in (
        places.spool,
        places.work / "parts",
        places.staged_arrow,
        places.staged_jsonl,
    ):
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
    (places.work / SETTINGS_FILE).unlink(missing_ok=True)


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    """The names under which two settings differ."""
    if not isinstance(old, dict):
        return ["all"]
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Holds the lock ``path``; it is let go even if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(
                f"{path.parent}: another process is at work there ({path.name}); wait for it"
            ) from None
        yield


def hold_completion(places: Places) -> contextlib.AbstractContextManager[None]:
    """The lock under which the last machine completes the output; waits for it."""
    return _lock(places.work / "completion.lock", wait=True)
