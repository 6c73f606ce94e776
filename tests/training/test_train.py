"""The ``train`` command: its exit codes, its clean end, and the directory it will not spoil."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from colossal_llama import command, storage
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training import train as train_module
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.state import RunningState
from colossal_llama.training.train import EXIT_STOPPED, train
from tests.training.stand_ins import STATE

pytestmark = pytest.mark.usefixtures("process_group")


class Log:
    closed: bool | None = None

    def close(self, *, failed: bool) -> None:
        self.closed = failed


class Run:
    """A trainer whose run ends as a test wants."""

    def __init__(self, stop_reason: str | None, finished: bool, error: Exception | None) -> None:
        self._reason, self._error = stop_reason, error
        self.stop_reason: str | None = None
        self.state = RunningState(finished=finished)
        self.log, self.said, self.watchdog = Log(), [], contextlib.nullcontext()
        self.started = 0.0

    def run(self) -> None:
        if self._error is not None:
            raise self._error
        self.stop_reason = self._reason

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def options(paths: dict[str, Path], tmp_path: Path) -> TrainOptions:
    flags = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"])]
    return command.parse(TrainOptions, [*flags, "--save_dir", str(tmp_path / "run")])


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for the module that loads ColossalAI; a test sets its ``run``."""
    module = ModuleType("colossal_llama.training.assembly")

    def build_trainer(options: TrainOptions, started: float) -> Any:
        module.run.started = started
        return module.run

    module.build_trainer = build_trainer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(train_module, "distributed", lambda seed: contextlib.nullcontext())
    return module


@pytest.mark.parametrize(
    ("stop_reason", "finished", "code"),
    [
        (None, True, 0),
        ("stopped by SIGTERM", False, EXIT_STOPPED),
        # The signal came in the last step: there is nothing left to go on with.
        ("stopped by SIGTERM", True, 0),
    ],
)
def test_exit_code(
    options: TrainOptions, assembly: Any, stop_reason: str | None, finished: bool, code: int
) -> None:
    assembly.run = Run(stop_reason, finished, None)
    assert train(options) == code
    assert bool(assembly.run.said) == (code == EXIT_STOPPED)
    assert all("stopped by SIGTERM" in text for text in assembly.run.said)
    assert assembly.run.log.closed is False


@pytest.mark.parametrize(("stop_reason", "code"), [(None, 0), ("stopped by SIGTERM", EXIT_STOPPED)])
def test_a_stop_at_the_end_of_a_stage_keeps_the_next_from_beginning(
    options: TrainOptions, assembly: Any, stop_reason: str | None, code: int
) -> None:
    assembly.run = Run(stop_reason, True, None)
    assert train(options, more_follows=True) == code


def test_exit_code_is_the_one_for_another_try() -> None:
    """EX_TEMPFAIL: schedulers and scripts know it."""
    assert EXIT_STOPPED == 75


@pytest.mark.parametrize("error", [DataError("damaged"), KeyboardInterrupt(), ValueError("ours")])
def test_error_goes_through_a_clean_end(
    options: TrainOptions, assembly: Any, error: Exception
) -> None:
    assembly.run = Run(None, False, error)
    with pytest.raises(type(error)):
        train(options)
    assert assembly.run.log.closed is True


def test_time_counts_from_when_the_caller_says(options: TrainOptions, assembly: Any) -> None:
    assembly.run = Run(None, True, None)
    train(options, started=12.5)
    assert assembly.run.started == 12.5


def checkpoint(save_dir: Path, step: int = 7) -> Path:
    path = save_dir / f"epoch-0_step-{step}"
    path.mkdir(parents=True)
    storage.write_json(path / "running_states.json", asdict(STATE))
    return path


def test_another_run_s_directory_is_refused(options: TrainOptions, assembly: Any) -> None:
    assembly.run = Run(None, True, None)
    own = checkpoint(options.save_dir)
    with pytest.raises(UsageError, match="holds the checkpoints of another run"):
        train(options)
    elsewhere = {"load_checkpoint": str(checkpoint(options.save_dir.parent / "elsewhere"))}
    with pytest.raises(UsageError, match="holds the checkpoints of another run"):
        train(command.build(TrainOptions, {**vars(options), **elsewhere}))
    for change in ({"overwrite": True}, {"load_checkpoint": "auto"}, {"load_checkpoint": str(own)}):
        assert train(command.build(TrainOptions, {**vars(options), **change})) == 0


def test_weights_of_a_run_start_another_one(options: TrainOptions, assembly: Any) -> None:
    """Its modeling/ is a model directory: with it nothing is resumed."""
    modeling = checkpoint(options.save_dir) / "modeling"
    modeling.mkdir()
    (modeling / "config.json").write_text(json.dumps({}), encoding="utf-8")
    options.load_checkpoint = str(modeling)
    with pytest.raises(UsageError, match="another run"):
        train(options)


def test_leftovers_are_no_run(options: TrainOptions, assembly: Any) -> None:
    assembly.run = Run(None, True, None)
    (options.save_dir / ".epoch-0_step-7.tmp").mkdir(parents=True)
    (options.save_dir / "metrics.jsonl").touch()
    assert train(options) == 0
