"""A run's log: one line a step, none twice after a resume, and no reporter that stops a run."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training.reporters import IDS_FILE
from colossal_llama.training.reporting import REPORTERS, RunLog, check_reporters, read_log


def values(step: int, loss: float | None = 1.5, **more: Any) -> dict[str, Any]:
    common = {"learning_rate": 1e-4, "grad_norm": None, "tokens_per_second": 10.0}
    return {"step": step, "loss": loss, "tokens": 100 * step, **common, **more}


def open_log(
    directory: Path,
    first: int = 1,
    last: int = 3,
    reporters: tuple[str, ...] = ("tensorboard", "jsonl"),
    *,
    active: bool = True,
) -> RunLog:
    return RunLog(
        directory, directory / "tensorboard", reporters, first_step=first, total_steps=last,
        active=active, run_name="first", config={"lr": 1e-4, "dataset": ["a"]},
    )  # fmt: skip


def log(directory: Path, first: int, last: int, loss: float = 1.5, **settings: Any) -> None:
    """A run of these steps, with an evaluation before the first and after every step."""
    writer = open_log(directory, first, last, **settings)
    try:
        if first == 1:
            writer.log_evaluation({"step": 0, "loss": loss})
        for step in range(first, last + 1):
            writer.log_step(values(step, loss))
            writer.log_evaluation({"step": step, "loss": loss})
        writer.say("a line of text")
    finally:
        writer.close()


def read(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    text = (directory / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def steps_and_losses(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read(directory, name)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_step_is_a_line(tmp_path: Path) -> None:
    log(tmp_path, 1, 3)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    assert read(tmp_path)[1] == values(2)
    assert [record["step"] for record in read(tmp_path, "evaluation.jsonl")] == [0, 1, 2, 3]


def test_steps_are_on_the_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = open_log(tmp_path)
    assert read(tmp_path) == []
    writer.log_step(values(1))
    assert len(read(tmp_path)) == 1
    assert scalars(tmp_path)["train/loss"] == [(1, 1.5)]
    writer.close()


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 5, "loss"', b'{"st', b"\x00\x00\x00", b"\xff\n", b"[1]\n", b"{}\n"]
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl"])
def test_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path, torn: bytes, name: str) -> None:
    """Whatever a crash left of the last line."""
    log(tmp_path, 1, 4, loss=1.0)
    with (tmp_path / name).open("ab") as stream:
        stream.write(torn)
    log(tmp_path, 3, 6, loss=2.0)
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    if name == "evaluation.jsonl":
        expected = [(0, 1.0), *expected]
    assert steps_and_losses(tmp_path, name) == expected


def test_a_whole_last_line_without_its_end_is_a_torn_one(tmp_path: Path) -> None:
    """Its number may lack digits."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    open_log(tmp_path, first=3).close()
    assert read(tmp_path) == [{"step": 1}]


def test_new_run_drops_all_of_an_old_one(tmp_path: Path) -> None:
    log(tmp_path, 1, 5, loss=1.0)
    log(tmp_path, 1, 2, loss=2.0)
    assert steps_and_losses(tmp_path, "metrics.jsonl") == [(1, 2.0), (2, 2.0)]
    assert steps_and_losses(tmp_path, "evaluation.jsonl") == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert scalars(tmp_path)["train/loss"] == [(1, 2.0), (2, 2.0)]
    assert scalars(tmp_path)["eval/loss"] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    writer = open_log(tmp_path)
    writer.log_step(values(1, loss_by_category={"zh": 2.0, "en": None}, skipped="loss is nan"))
    writer.log_step(values(2, loss=math.nan))
    writer.log_evaluation({"step": 2, "loss": 3.0, "categories": {"zh": {"bits_per_byte": 4}}})
    writer.close()
    found = scalars(tmp_path)
    assert found["train/tokens"] == [(1, 100), (2, 200)]
    assert found["train/loss_by_category/zh"] == [(1, 2.0)]
    assert math.isnan(found["train/loss"][1][1])
    assert found["eval/categories/zh/bits_per_byte"] == [(2, 4.0)]
    assert set(found) == {
        *("train/loss", "train/tokens", "train/learning_rate", "train/tokens_per_second"),
        *("train/loss_by_category/zh", "eval/loss", "eval/categories/zh/bits_per_byte"),
    }, "None and text are no numbers, and the step is the axis"


def test_tensorboard_hides_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    log(tmp_path, 1, 4, loss=1.0)
    log(tmp_path, 3, 5, loss=2.0)
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert scalars(tmp_path)["train/loss"] == expected
    assert scalars(tmp_path)["eval/loss"] == [(0, 1.0), *expected]


def test_other_processes_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log(tmp_path, 1, 3, active=False, reporters=REPORTERS)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    log(tmp_path, 1, 1, reporters=("jsonl",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.jsonl", "metrics.jsonl"]


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    writer = open_log(tmp_path)
    losses = {"zh": math.inf, "en": -math.inf, "ü": 1.0}
    writer.log_step(values(1, loss=math.nan, loss_by_category=losses, skipped="loss is nan"))
    writer.close()
    (line,) = read(tmp_path)  # a parser that knows no NaN reads it too
    assert line["loss"] == "nan"
    assert line["loss_by_category"] == {"zh": "inf", "en": "-inf", "ü": 1.0}
    (record,) = read_log(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert record["loss_by_category"] == losses
    assert record["skipped"] == "loss is nan"
    assert record["grad_norm"] is None


def test_numbers_of_torch_and_paths_are_written(tmp_path: Path) -> None:
    writer = open_log(tmp_path)
    loss = torch.tensor(1.5)
    writer.log_step(values(1, loss=loss, path=Path("x"), list=[math.nan], flag=True))  # type: ignore[arg-type]
    writer.close()
    assert read(tmp_path) == [values(1, path="x", list=["nan"], flag=True)]
    assert scalars(tmp_path)["train/loss"] == [(1, 1.5)]


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', "\x00\x00", "\n \n"])
def test_a_log_is_read_without_its_torn_end(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn, encoding="utf-8")
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_inside_a_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_log(path)
    with pytest.raises(DataError, match=r"absent: No such file"):
        read_log(tmp_path / "absent")
    path.write_text("", encoding="utf-8")
    assert read_log(path) == []


def test_tensorboard_that_vanishes_is_off_and_says_so_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's own writer would print a traceback here and raise from close()."""
    writer = open_log(tmp_path, last=50)
    writer.log_step(values(1))
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 51):
        writer.log_step(values(step))
        writer.log_evaluation({"step": step, "loss": 1.0})
    writer.close()
    printed = capfd.readouterr()
    assert printed.err.count("warning: ") == 1
    assert "warning: tensorboard: " in printed.err
    assert "No such file or directory (off from now on; training goes on)\n" in printed.err
    assert "Traceback" not in printed.err
    assert len(read(tmp_path)) == 50
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_that_cannot_begin_is_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way", encoding="utf-8")
    log(tmp_path, 1, 3)
    printed = capfd.readouterr()
    assert printed.err.count("warning: ") == 1
    assert f"warning: tensorboard: {tmp_path / 'tensorboard'}: File exists (off" in printed.err
    assert len(read(tmp_path)) == 3


class FullDisk:
    """Takes the first half of what is written, until there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.full, self._name, self._write = False, name, os.write
        monkeypatch.setattr(storage.os, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        if not self.full or self._name not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return self._write(descriptor, content)
        if len(content) > 20:
            return self._write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = FullDisk(monkeypatch, "metrics.jsonl")
    writer = open_log(tmp_path, last=9)
    for step in range(1, 10):
        disk.full = step in (2, 3, 4, 7)
        writer.log_step(values(step))
        if disk.full:
            assert len(read(tmp_path)) == (1 if step < 7 else 6), "no half lines"
    writer.close()
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 10))
    printed = capfd.readouterr().err
    assert printed.count("warning: ") == 1
    assert "warning: metrics.jsonl: " in printed
    assert "metrics.jsonl: No space left on device (training goes on" in printed
    assert len(scalars(tmp_path)["train/loss"]) == 9


def test_what_the_disk_never_took_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = FullDisk(monkeypatch, "evaluation.jsonl")
    writer = open_log(tmp_path)
    disk.full = True
    for step in (1, 2):
        writer.log_evaluation({"step": step, "loss": 1.0})
    writer.close()
    writer.close()
    assert "No space left on device (2 lines are lost)\n" in capfd.readouterr().err


def test_a_full_disk_turns_tensorboard_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = FullDisk(monkeypatch, "tfevents")
    writer = open_log(tmp_path)
    for step in (1, 2, 3):
        disk.full = step == 2
        writer.log_step(values(step))
    writer.close()
    assert capfd.readouterr().err.count("warning: tensorboard: ") == 1
    assert scalars(tmp_path)["train/loss"] == [(1, 1.5)], "and its file stays readable"


def test_a_directory_that_comes_back_is_written_again(tmp_path: Path) -> None:
    save_dir, moved = tmp_path / "run", tmp_path / "moved"
    writer = open_log(save_dir, reporters=("jsonl",))
    writer.log_step(values(1))
    save_dir.rename(moved)
    writer.log_step(values(2))
    moved.rename(save_dir)
    writer.log_step(values(3))
    writer.close()
    assert [record["step"] for record in read(save_dir)] == [1, 2, 3]


def test_a_directory_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError):
        open_log(tmp_path / "file" / "run")


def test_text_goes_to_the_output_and_the_bar_tells_how_it_goes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = open_log(tmp_path, first=2, last=2)
    writer.say("saved")
    writer.log_step(values(2, loss=None, skipped="loss is nan"))
    writer.close()
    printed = capfd.readouterr()
    assert "saved\n" in printed.out
    assert "2/2" in printed.err
    assert "10 tokens/s, skipped: loss is nan" in printed.err


def test_nobody_listening_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    writer = open_log(tmp_path)
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    writer.say("nobody reads this")
    shutil.rmtree(tmp_path / "tensorboard")
    writer.log_step(values(1))
    writer.close()
    assert len(read(tmp_path)) == 1


# Stand-ins for packages that are not installed: they show the shape of the calls. What the real
# ones (wandb 0.31, trackio 0.43) make of them was tried by hand.


class StandInRun:
    """Notes what is logged; as wandb does, it knows the next step of a resumed run."""

    def __init__(self, settings: dict[str, Any], step: int = 0) -> None:
        self.settings, self.step = settings, step
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.error:
            raise self.error
        self.logged.append((step, numbers))

    def finish(self, **settings: Any) -> None:
        self.finished.append(settings)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[StandInRun]:
    """Makes ``import wandb`` and ``import trackio`` work; holds the runs they open."""
    opened: list[StandInRun] = []

    def init(**settings: Any) -> StandInRun:
        step = opened[-1].logged[-1][0] + 1 if opened and settings["resume"] == "allow" else 0
        opened.append(StandInRun(settings, step))
        return opened[-1]

    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.init = init  # type: ignore[attr-defined]
        module.finish = lambda: opened[-1].finish()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return opened


def test_wandb_gets_the_numbers_and_a_resume_the_same_run(
    tmp_path: Path, runs: list[StandInRun]
) -> None:
    log(tmp_path, 1, 4, reporters=("wandb",))
    log(tmp_path, 3, 6, reporters=("wandb",))
    first, second = runs
    config = {"lr": 1e-4, "dataset": ["a"]}
    identity = first.settings["id"]
    common = {"id": identity, "name": "first", "config": config, "dir": str(tmp_path)}
    assert first.settings == {**common, "resume": None}
    assert second.settings == {**common, "resume": "allow"}
    assert storage.read_json(tmp_path / IDS_FILE) == {"wandb": identity}
    assert [step for step, _ in first.logged] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [step for step, _ in second.logged] == [5, 5, 6, 6], "it takes no step twice"
    numbers = {"loss": 1.5, "tokens": 100, "learning_rate": 1e-4, "tokens_per_second": 10.0}
    assert first.logged[1] == (1, {f"train/{name}": value for name, value in numbers.items()})
    assert first.logged[2] == (1, {"eval/loss": 1.5})
    assert first.finished == second.finished == [{"exit_code": 0}]


def test_a_new_run_in_an_old_directory_is_another_to_wandb(
    tmp_path: Path, runs: list[StandInRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, 1, 2, reporters=("wandb", "trackio"))
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    writer = open_log(tmp_path, reporters=("wandb",))
    writer.close(failed=True)
    assert runs[0].settings["id"] != runs[2].settings["id"]
    assert runs[2].settings["resume"] is None
    assert runs[2].settings["dir"] is None, "the user's own"
    assert runs[2].finished == [{"exit_code": 1}]
    assert set(storage.read_json(tmp_path / IDS_FILE)) == {"wandb", "trackio"}


def test_trackio_finds_a_resumed_run_by_its_name(
    tmp_path: Path, runs: list[StandInRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, 1, 2, reporters=("trackio",))
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    log(tmp_path, 2, 3, reporters=("trackio",))
    first, second = (run.settings for run in runs)
    assert (first["project"], first["resume"]) == ("colossal-llama", "never")
    assert (second["project"], second["resume"]) == ("mine", "allow")
    assert (
        first["name"]
        == second["name"]
        == f"first-{storage.read_json(tmp_path / IDS_FILE)['trackio']}"
    )
    assert [step for step, _ in runs[0].logged] == [0, 1, 1, 2, 2]
    assert runs[1].finished == [{}]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_reporter_that_fails_in_mid_run_is_off(
    tmp_path: Path, runs: list[StandInRun], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = open_log(tmp_path, reporters=(name, "tensorboard"))
    writer.log_step(values(1))
    runs[0].error = RuntimeError("the server\nis gone")
    for step in (2, 3):
        writer.log_step(values(step))
    writer.close()
    printed = capfd.readouterr().err
    assert f"warning: {name}: the server is gone (off from now on; training goes on)\n" in printed
    assert printed.count("warning: ") == 1
    assert len(scalars(tmp_path)["train/loss"]) == len(read(tmp_path)) == 3


def test_a_reporter_that_fails_at_the_end_or_start_only_says_so(
    tmp_path: Path,
    runs: list[StandInRun],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(**settings: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(StandInRun, "finish", lambda self, **settings: fail())
    log(tmp_path, 1, 1, reporters=("wandb",))
    assert "warning: wandb: TimeoutError (its last values may be missing)" in capfd.readouterr().err
    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    log(tmp_path, 1, 1, reporters=("wandb",))
    assert "warning: wandb: TimeoutError (off)\n" in capfd.readouterr().err


def test_reporters_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_reporters(["tensorboard", "jsonl", "jsonl"]) == []
    assert check_reporters([]) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problems = check_reporters(["wandb", "tensorbord", "trackio"])
    assert problems == [
        "--report_to wandb: wandb is not installed; pip install wandb",
        "--report_to tensorbord: unknown; there are tensorboard, wandb, trackio, jsonl",
        "--report_to trackio: trackio is not installed; pip install trackio",
    ]


def test_a_folder_that_wandb_left_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb")
    (problem,) = check_reporters(["wandb"])
    assert "not installed" in problem
