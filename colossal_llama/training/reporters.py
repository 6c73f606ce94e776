"""Where a run's numbers go beside its own files: TensorBoard, wandb, trackio.

Each is opened by ``open_reporter`` and has two methods, ``log(step, numbers)`` and
``close(failed)``. What they raise is caught by ``reporting.RunLog``. wandb and trackio follow the
user's own settings: account, project, online or offline. Nothing here opens a connection itself.
"""

from __future__ import annotations

import io
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from colossal_llama import storage

IDS_FILE = "reporters.json"  # reporter: the id under which it knows the run


class Reporter(Protocol):
    """Takes the numbers of a step, named like "train/loss"."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tells of one step or of one evaluation after it."""

    def close(self, failed: bool) -> None:
        """Hands over everything; ``failed`` if the run ends by an error."""


def open_reporter(
    name: str,
    save_dir: Path,
    tensorboard_dir: Path,
    first_step: int,
    run_name: str,
    config: dict[str, Any],
) -> Reporter:
    """Opens the reporter ``name`` of a run that begins, or goes on, at ``first_step``."""
    if name == "tensorboard":
        return TensorBoard(tensorboard_dir, first_step)
    identity, known = _identity(save_dir, name, resumed=first_step > 1)
    if name == "wandb":
        return Wandb(save_dir, identity, run_name, config, resumed=known)
    assert name == "trackio"
    return Trackio(identity, run_name, config, resumed=known)


def _identity(save_dir: Path, name: str, *, resumed: bool) -> tuple[str, bool]:
    """The run's id, and whether the reporter has met it before."""
    path = save_dir / IDS_FILE
    identities = storage.read_json(path) if path.exists() else {}
    if resumed and name in identities:
        return str(identities[name]), True
    identities[name] = uuid.uuid4().hex[:8]
    storage.write_json(path, identities)
    return identities[name], False


class TensorBoard:
    """An event file of its own for each start of a run.

    torch's SummaryWriter leaves writing to a thread. Where the directory has vanished or the disk
    is full, that thread dies and prints a traceback, and the caller hears of it some steps later.
    Here a step is one record, written by the caller: on the disk at once, and an error is raised
    where it belongs.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        started = f"{time.time():017.6f}"
        name = f"events.out.tfevents.{started}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        self._path.touch()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Hides what an interrupted run wrote for the steps that are taken again; step 0 is an
        # evaluation before the first one.
        first = first_step if first_step > 1 else 0
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first, session_log=start))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes one record with all numbers."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self, failed: bool) -> None:
        """Nothing is left to do."""

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        storage.append_all(self._path, record.getvalue(), create=False)


class Wandb:
    """A run of Weights & Biases; its files go to the run's directory unless WANDB_DIR is set."""

    def __init__(
        self,
        save_dir: Path,
        identity: str,
        run_name: str,
        config: dict[str, Any],
        *,
        resumed: bool,
    ) -> None:
        import wandb

        self._run = wandb.init(
            id=identity,
            name=run_name,
            config=config,
            dir=None if "WANDB_DIR" in os.environ else str(save_dir),
            resume="allow" if resumed else None,
        )
        # wandb takes no step twice and would say so each time. An exact resume repeats the same
        # numbers, so nothing is lost.
        self._first = self._run.step

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs one step; an evaluation of the same step is merged with it."""
        if step >= self._first:
            self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is handed over."""
        self._run.finish(exit_code=1 if failed else 0)


class Trackio:
    """A run of trackio, in the project TRACKIO_PROJECT or "colossal-llama"."""

    def __init__(
        self, identity: str, run_name: str, config: dict[str, Any], *, resumed: bool
    ) -> None:
        import trackio

        # It finds a run again by its name, which therefore has to be one of its own.
        self._finish = trackio.finish  # the run's own method would be called again at the exit
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "colossal-llama"),
            name=f"{run_name}-{identity}",
            config=config,
            resume="allow" if resumed else "never",
            embed=False,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs one step."""
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is handed over."""
        self._finish()
