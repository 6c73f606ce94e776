"""The logs of runs, read and put on one axis.

A run is a directory with ``metrics.jsonl``. A directory of such directories, as a recipe leaves
it, is one run too: its stages follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError, UsageError
from colossal_llama.training.reporting import EVALUATION_FILE, METRICS_FILE, read_log

AXES = ("tokens", "steps", "hours")
_MOST_MARKS = 200  # for each run


@dataclass(frozen=True)
class Stage:
    """What one directory's log holds.

    Args:
        name: the directory's.
        steps: the lines of ``metrics.jsonl``, one for each step, in order.
        evaluations: the lines of ``evaluation.jsonl``, in order.
        x: the place of each step on the axis, after what the stages before it took.
        start: the place where the stage begins.
    """

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    x: list[float]
    start: float


@dataclass(frozen=True)
class Run:
    """One run; it has one stage unless it is of a recipe."""

    name: str
    path: Path
    stages: list[Stage]


@dataclass(frozen=True)
class Mark:
    """A step that changed nothing, or whose loss is no number."""

    x: float
    step: int
    reason: str


def read_runs(paths: Sequence[Path], axis: str) -> list[Run]:
    """The runs in ``paths``, by the shortest names that tell them apart.

    Raises:
        DataError: a directory holds no run, its log is empty or broken, or lacks the axis.
        UsageError: a directory is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if twice := [path for path in paths if resolved.count(path.resolve()) > 1]:
        raise UsageError([f"{twice[0]} is given twice"])
    names = [path.name or str(path) for path in resolved]
    runs = []
    for path, name in zip(paths, names, strict=True):
        shown = name if names.count(name) == 1 else str(path)
        runs.append(Run(shown, path, _read_stages(path, axis)))
    return runs


def _read_stages(path: Path, axis: str) -> list[Stage]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such directory"
        raise DataError(f"{path}: {what}; expected the --save_dir of a run")
    own = (path / METRICS_FILE).is_file()
    directories = [path] if own else sorted(file.parent for file in path.glob(f"*/{METRICS_FILE}"))
    if not directories:
        raise DataError(
            f"{path}: no {METRICS_FILE} in it, nor in a directory of it; expected the --save_dir "
            "of a run"
        )
    stages: list[Stage] = []
    start = 0.0
    for directory in directories:
        stage = _read_stage(directory, axis, start)
        if stage.steps:  # a stage may have just begun
            stages.append(stage)
            start = stage.x[-1]
    if not stages:
        names = ", ".join(str(directory / METRICS_FILE) for directory in directories)
        raise DataError(f"{names}: empty: no step was taken yet")
    return stages


def _read_stage(directory: Path, axis: str, start: float) -> Stage:
    path = directory / METRICS_FILE
    # Of a step that is there twice the later line counts: it was taken again.
    steps = {_step(record, path): record for record in read_log(path)}
    records = [steps[step] for step in sorted(steps)]
    evaluation = directory / EVALUATION_FILE
    evaluations = read_log(evaluation) if evaluation.is_file() else []
    evaluations.sort(key=lambda record: _step(record, evaluation))
    x = [start + place for place in _places(records, axis, path)]
    return Stage(directory.resolve().name, records, evaluations, x, start)


def _step(record: Mapping[str, Any], path: Path) -> int:
    step = record.get("step")
    if not isinstance(step, int):
        raise DataError(f"{path}: a line without a step: it is not the log of a run")
    return step


def _places(records: list[dict[str, Any]], axis: str, path: Path) -> Iterator[float]:
    """Where each step ends, counted from the beginning of its stage."""
    needed = {"steps": "step", "tokens": "tokens", "hours": "seconds"}[axis]
    total = 0.0
    for record in records:
        value = number(record.get(needed))
        if value is None:
            raise DataError(f"{path}: step {record['step']} has no {needed}; try --x steps")
        total += seconds(record)
        yield total / 3600 if axis == "hours" else value


def seconds(record: Mapping[str, Any]) -> float:
    """What a step took, and what was done since the one before it: a checkpoint, an evaluation."""
    return (number(record.get("seconds")) or 0.0) + (number(record.get("seconds_between")) or 0.0)


def marks(run: Run) -> list[Mark]:
    """The steps of a run that changed nothing; of very many, some spread over all of them."""
    found = []
    for stage in run.stages:
        for x, record in zip(stage.x, stage.steps, strict=True):
            loss = record.get("loss")
            if record.get("skipped"):
                found.append(Mark(x, record["step"], f"skipped: {record['skipped']}"))
            elif isinstance(loss, float) and not math.isfinite(loss):
                found.append(Mark(x, record["step"], f"the loss is {loss}"))
    return found[:: max(1, math.ceil(len(found) / _MOST_MARKS))]


def number(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn."""
    usable = isinstance(value, int | float) and math.isfinite(value)
    return value if usable else None
