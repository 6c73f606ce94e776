"""What a run tells while it runs: a progress bar, lines of JSON, and whoever else is to hear it.

    log = RunLog(save_dir, save_dir / "tensorboard", ["tensorboard"], first_step=1, ...)
    log.log_step({"step": 1, "loss": 2.3, "tokens": 4096, "tokens_per_second": 512.0})
    log.log_evaluation({"step": 1, "loss": 2.4})
    log.close()

``metrics.jsonl`` and ``evaluation.jsonl`` in the run's directory are always written: resume and
plots read them. The other reporters are in ``reporters.py``. None of them can stop a run: one
that fails says so once and is silent from then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training.reporters import Reporter, open_reporter

REPORTERS = ("tensorboard", "wandb", "trackio", "jsonl")
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
BAD_BATCHES_FILE = "bad_batches.jsonl"  # written by the guards

_MOST_WAITING = 100_000  # lines kept for a disk that is full: some 30 MB of memory
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def check_reporters(names: Sequence[str]) -> list[str]:
    """What is wrong with ``--report_to``: a name nobody has, a package that is not installed."""
    problems = []
    for name in dict.fromkeys(names):
        if name not in REPORTERS:
            problems.append(f"--report_to {name}: unknown; there are {', '.join(REPORTERS)}")
        elif name != "jsonl" and not _is_installed(name):
            problems.append(f"--report_to {name}: {name} is not installed; pip install {name}")
    return problems


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # wandb leaves a folder "wandb" where it ran; Python takes that for a package without files.
    return spec is not None and spec.origin is not None


class RunLog:
    """Tells of a run on its first process; does nothing on the others.

    Args:
        save_dir: the run's directory; made if it is missing.
        tensorboard_dir: where TensorBoard's events go.
        reporters: some of REPORTERS.
        first_step: the first optimizer step that will be logged, from 1; a later one resumes.
        total_steps: the last one.
        active: whether this is the first process.
        run_name: how wandb and trackio call the run.
        config: the run's settings, shown by wandb and trackio.

    Raises:
        OSError: the run's directory cannot be written.
    """

    def __init__(
        self,
        save_dir: Path,
        tensorboard_dir: Path,
        reporters: Sequence[str],
        *,
        first_step: int,
        total_steps: int,
        active: bool,
        run_name: str,
        config: dict[str, Any],
    ) -> None:
        self._active = active
        if not active:
            return
        save_dir.mkdir(parents=True, exist_ok=True)
        self._warned: set[str] = set()
        self._steps = _Lines(save_dir / METRICS_FILE)
        self._evaluations = _Lines(save_dir / EVALUATION_FILE)
        for name in (METRICS_FILE, EVALUATION_FILE, BAD_BATCHES_FILE):
            _drop_steps_from(save_dir / name, first_step)
        storage.append_all(self._steps.path, b"")  # it exists from now on, and can be written
        self._reporters: dict[str, Reporter] = {}
        for name in dict.fromkeys(reporters):
            if name == "jsonl":
                continue
            try:
                self._reporters[name] = open_reporter(
                    name, save_dir, tensorboard_dir, first_step, run_name, config
                )
            except Exception as error:  # of any kind: a run is worth more than its picture
                self._warn(name, error, "off")
        self._bar = tqdm(
            total=total_steps,
            initial=first_step - 1,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            # In a file every update is a line of its own.
            mininterval=0.2 if sys.stderr.isatty() else 30,
        )

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Tells of one optimizer step.

        Args:
            values: "step" and numbers, mappings of numbers, None or text; the bar shows "loss",
                "tokens_per_second" and "skipped" (why the step made no update).
        """
        if not self._active:
            return
        self._write(self._steps, values)
        self._report("train", values)
        self._bar.set_postfix_str(_postfix(values), refresh=False)
        self._bar.update()

    def log_evaluation(self, values: Mapping[str, Any]) -> None:
        """Tells of one evaluation: "step" and what was measured after it."""
        if self._active:
            self._write(self._evaluations, values)
            self._report("eval", values)

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        if self._active:
            _print(text, sys.stdout)

    def close(self, *, failed: bool = False) -> None:
        """Hands over what is still waiting and closes everything; a second call does nothing.

        Args:
            failed: whether the run ends by an error, which wandb shows.
        """
        if not self._active:
            return
        self._active = False
        self._bar.close()
        for lines in (self._steps, self._evaluations):
            try:
                lines.write_waiting()
            except OSError as error:
                self._warn(lines.path.name, error, f"{len(lines.waiting)} lines are lost")
        for name, reporter in self._reporters.items():
            try:
                reporter.close(failed)
            except Exception as error:
                self._warn(name, error, "its last values may be missing")

    def _write(self, lines: _Lines, values: Mapping[str, Any]) -> None:
        lines.add(values)
        try:
            lines.write_waiting()
        except OSError as error:
            name = lines.path.name
            if name not in self._warned:
                self._warn(name, error, "training goes on, and writing is tried at every step")
            self._warned.add(name)

    def _report(self, kind: str, values: Mapping[str, Any]) -> None:
        numbers = _numbers(values, kind)
        for name, reporter in list(self._reporters.items()):
            try:
                reporter.log(values["step"], numbers)
            except Exception as error:
                del self._reporters[name]
                self._warn(name, error, "off from now on; training goes on")

    def _warn(self, name: str, error: Exception, consequence: str) -> None:
        _print(f"warning: {name}: {_reason(error)} ({consequence})", sys.stderr)


class _Lines:
    """A file with one JSON object a line; lines wait where the disk cannot take them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)

    def add(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(_to_json(values), allow_nan=False)
        self.waiting.append(text.encode("ascii") + b"\n")

    def write_waiting(self) -> None:
        """Appends the lines that wait.

        Opened each time: a directory that comes back, say after a failed mount, is written again.

        Raises:
            OSError: they could not be written and still wait.
        """
        if self.waiting:
            storage.append_all(self.path, b"".join(self.waiting))
            self.waiting.clear()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` or ``evaluation.jsonl``, with "nan" and "inf" as numbers.

    A last line that is cut short, by a crash or because it is being written, is left out.

    Raises:
        DataError: the file cannot be read, or another line is broken; names file:line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            record = None
        if isinstance(record, dict):
            records.append(_from_json(record))
        elif number < len(lines):
            raise DataError(f"{path}:{number}: not a line of a run's log")
    return records


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Drops the lines of steps that a resumed run takes again; a new run drops all of them."""
    if not path.exists():
        return
    # Step 0 is an evaluation before the first step; where that comes again, so does this.
    first = first_step if first_step > 1 else 0
    with (
        storage.atomic_file(path) as temporary,
        path.open("rb") as old,
        temporary.open("wb") as new,
    ):
        new.writelines(line for line in old if _step_of(line) < first)
    if not path.stat().st_size:
        path.unlink()  # bad_batches.jsonl is there only if there were any


def _step_of(line: bytes) -> float:
    """The step of a line; a line cut short by a crash counts as a later one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _to_json(value: Any) -> Any:
    """``value`` in what JSON has; numbers that it lacks become "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if hasattr(value, "item"):  # a number of torch or numpy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | str | None) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers in ``values`` but the step, as ``prefix/name`` or ``prefix/name/name``."""
    found: dict[str, float] = {}
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, Mapping):
            found.update(_numbers(value, f"{prefix}/{name}"))
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}/{name}"] = value
    return found


def _postfix(values: Mapping[str, Any]) -> str:
    parts = []
    if values.get("loss") is not None:
        parts.append(f"loss {values['loss']:.4f}")
    if values.get("tokens_per_second") is not None:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if values.get("skipped"):
        parts.append(f"skipped: {values['skipped']}")
    return ", ".join(parts)


def _reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _print(text: str, stream: Any) -> None:
    # Where nobody listens any more (a closed pipe, a lost terminal) a run still goes on.
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=stream)
        stream.flush()
