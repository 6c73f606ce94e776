"""When checkpoints are written, which are kept, and when a run stops."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.training import checkpointing, file_writer
from colossal_llama.training.callbacks import Callback
from colossal_llama.training.checkpoint import SaveError, verify
from colossal_llama.training.checkpointing import Checkpointer, Stopper
from colossal_llama.training.state import RunningState, checkpoints, read_running_state
from tests.training.stand_ins import Trainer, checkpoint_files, metrics

pytestmark = pytest.mark.usefixtures("process_group")


def checkpointer(save_dir: Path, **settings: Any) -> Checkpointer:
    plain = {"interval": 0, "keep_last": 0, "in_background": False, "go_on": False}
    plain["resumes_own"] = True
    return Checkpointer(checkpoint_files(save_dir), **{**plain, **settings})


def take_step(trainer: Trainer, *callbacks: Callback, rows_in_epoch: int = 10**9) -> None:
    """One more step of one row, with all that happens at its end."""
    trainer.state.step += 1
    trainer.state.samples += 1
    trainer.state.epoch = trainer.state.samples // rows_in_epoch
    for callback in callbacks:
        callback.step_ended(trainer, metrics(trainer.state.step, seconds=1.0))


def run(own: Checkpointer, steps: int, *, rows_in_epoch: int = 10**9, first: int = 0) -> Trainer:
    """A whole run from step ``first``."""
    state = RunningState(step=first, samples=first, epoch=first // rows_in_epoch)
    trainer = Trainer(state, total_steps=steps)
    own.run_begins(trainer)
    while not trainer.is_over:
        take_step(trainer, own, rows_in_epoch=rows_in_epoch)
    return trainer


def saved_steps(save_dir: Path) -> list[int]:
    return [read_running_state(path).step for path in checkpoints(save_dir)]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    ("interval", "rows_in_epoch", "first", "wanted"),
    [
        (0, 100, 0, [10]),
        (3, 100, 0, [3, 6, 9, 10]),
        (5, 100, 0, [5, 10]),
        (1, 100, 7, [8, 9, 10]),
        (0, 4, 0, [4, 8, 10]),
        (4, 4, 0, [4, 8, 10]),
        (3, 4, 5, [6, 8, 9, 10]),
        (0, 4, 8, [10]),
        (100, 10, 0, [10]),
    ],
)
def test_saved_at_intervals_and_ends(
    tmp_path: Path, interval: int, rows_in_epoch: int, first: int, wanted: list[int],
    in_background: bool,
) -> None:  # fmt: skip
    """Once each, though an interval may end with an epoch; a resumed epoch has not just begun."""
    own = checkpointer(tmp_path, interval=interval, in_background=in_background)
    trainer = run(own, 10, rows_in_epoch=rows_in_epoch, first=first)
    assert saved_steps(tmp_path) == wanted
    assert len(trainer.said) == len(wanted)
    assert not list(tmp_path.glob(".*"))
    for path in checkpoints(tmp_path):
        verify(path)


def test_what_callbacks_remember_is_saved(tmp_path: Path) -> None:
    class Counter(Callback):
        count = 0

        def step_ended(self, trainer: Any, metrics: Any) -> None:
            self.count += 1

        def state(self) -> dict[str, Any]:
            return {"count": self.count}

    own, counter, silent = checkpointer(tmp_path, interval=2), Counter(), Callback()
    trainer = Trainer(total_steps=10, callbacks=[counter, silent, own])
    for _ in range(4):
        take_step(trainer, counter, own)
    states = [read_running_state(path).callbacks for path in checkpoints(tmp_path)]
    assert states == [{"Counter": {"count": 2}}, {"Counter": {"count": 4}}]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_the_last_are_kept(tmp_path: Path, keep_last: int, in_background: bool) -> None:
    run(checkpointer(tmp_path, interval=2, keep_last=keep_last, in_background=in_background), 9)
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 9][-keep_last:]
    newest = checkpoints(tmp_path)[-1].name
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == newest


def test_a_beginning_run_removes_what_killed_saves_left(tmp_path: Path) -> None:
    run(checkpointer(tmp_path, interval=2), 4)
    for name in (".epoch-0_step-6.tmp", ".epoch-0_step-2.removed"):
        (tmp_path / name / "modeling").mkdir(parents=True)
    checkpointer(tmp_path).run_begins(Trainer(RunningState(step=4)))
    assert not list(tmp_path.glob(".*"))
    assert saved_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(("step", "own"), [(0, []), (2, [2]), (3, [2]), (4, [2, 4])])
def test_a_beginning_run_sets_aside_what_is_not_its_own(
    tmp_path: Path, step: int, own: list[int]
) -> None:
    """Those have more steps: ``--load_checkpoint auto`` would go on from them."""
    run(checkpointer(tmp_path, interval=2), 4)
    trainer = Trainer(RunningState(step=step))
    checkpointer(tmp_path).run_begins(trainer)
    assert saved_steps(tmp_path) == own
    assert len(trainer.said) == len(list(tmp_path.glob("*.set-aside-1"))) == 2 - len(own)
    latest = tmp_path / "latest"
    assert latest.exists() == bool(own)
    assert not own or latest.read_text(encoding="utf-8") == f"epoch-0_step-{own[-1]}\n"


@pytest.mark.parametrize(("first", "kept"), [(0, []), (2, [2]), (3, [2]), (4, [2, 4])])
def test_a_beginning_run_sets_aside_where_it_does_not_come_from(
    tmp_path: Path, first: int, kept: list[int]
) -> None:
    """Of another run, or of one that is gone back from: they would pass for the newest."""
    for _ in range(2):
        run(checkpointer(tmp_path, interval=2), 5)
        trainer = Trainer(RunningState(step=first))
        checkpointer(tmp_path).run_begins(trainer)
        assert saved_steps(tmp_path) == kept
        assert len(trainer.said) == 3 - len(kept)
        assert all("not this run's" in text for text in trainer.said)
    assert len(list(tmp_path.glob("epoch-0_step-5.set-aside-*"))) == 2, "nothing is overwritten"
    pointer = tmp_path / "latest"
    newest = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None
    assert newest == (f"epoch-0_step-{kept[-1]}" if kept else None)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    go_on = threading.Event()
    original = file_writer.save_file

    def save_file(*arguments: Any) -> str:
        assert go_on.wait(60)
        return original(*arguments)

    monkeypatch.setattr(file_writer, "save_file", save_file)
    yield go_on
    go_on.set()


def test_saved_in_the_background(tmp_path: Path, slow_disk: threading.Event) -> None:
    """Training goes on; the name comes at the first step end after all is written."""
    own, trainer = checkpointer(tmp_path, interval=5, in_background=True), Trainer()
    own.run_begins(trainer)
    for _ in range(8):
        take_step(trainer, own)
    assert trainer.said == []
    assert not checkpoints(tmp_path)
    assert list(tmp_path.glob(".epoch-0_step-5.tmp"))
    slow_disk.set()
    assert own._in_flight is not None
    own._in_flight[1].finish()
    take_step(trainer, own)
    assert saved_steps(tmp_path) == [5], "the state is that of the step it was taken at"
    assert trainer.said == [f"saved {tmp_path / 'epoch-0_step-5'}"]


def test_the_next_save_waits_for_the_one_before(
    tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = checkpointer(tmp_path, interval=2, in_background=True)
    trainer = Trainer(total_steps=5)
    own.run_begins(trainer)
    for _ in range(3):
        take_step(trainer, own)
    threading.Timer(0.2, slow_disk.set).start()
    take_step(trainer, own)
    assert trainer.said == [f"saved {tmp_path / 'epoch-0_step-2'}"]
    take_step(trainer, own)  # the last
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert own._in_flight is None


def test_longest_save_is_that_until_all_is_written(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    """The last one of a run is waited for, so that is what a time limit has to allow for."""
    own, trainer = checkpointer(tmp_path, interval=1, in_background=True), Trainer()
    own.run_begins(trainer)
    take_step(trainer, own)
    threading.Timer(0.3, slow_disk.set).start()
    take_step(trainer, own)
    assert own.longest_save >= 0.3


class Disk:
    """A disk that is full while ``full``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._original = file_writer.save_file
        monkeypatch.setattr(file_writer, "save_file", self.save_file)

    def save_file(self, tensors: Any, path: Path) -> str:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self._original(tensors, path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def finish(own: Checkpointer) -> None:
    if own._in_flight is not None:
        own._in_flight[1].finish()


@pytest.mark.parametrize("in_background", [False, True])
def test_error_ends_the_run(tmp_path: Path, disk: Disk, in_background: bool) -> None:
    own, trainer = checkpointer(tmp_path, interval=2, in_background=in_background), Trainer()
    own.run_begins(trainer)
    for _ in range(2):
        take_step(trainer, own)
    finish(own)
    disk.full = True
    take_step(trainer, own)
    if in_background:  # the error is found at the step after
        take_step(trainer, own)
        finish(own)
    with pytest.raises(SaveError, match="No space left"):
        take_step(trainer, own)
    assert saved_steps(tmp_path) == [2]


@pytest.mark.parametrize("in_background", [False, True])
def test_error_is_a_warning_where_that_is_asked_for(
    tmp_path: Path, disk: Disk, in_background: bool
) -> None:
    own = checkpointer(tmp_path, interval=2, in_background=in_background, go_on=True)
    trainer = Trainer(total_steps=7)
    own.run_begins(trainer)
    for step in range(1, 8):
        disk.full = step == 4
        take_step(trainer, own)
        finish(own)
    assert saved_steps(tmp_path) == [2, 6, 7], "later checkpoints are made"
    for path in checkpoints(tmp_path):
        verify(path)
    (warning,) = [text for text in trainer.said if text.startswith("warning: ")]
    assert "No space left on device" in warning
    assert "GiB are free" in warning
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_gone_is_a_warning_as_well(tmp_path: Path) -> None:
    own = checkpointer(tmp_path / "disk" / "run", interval=1, go_on=True)
    trainer = Trainer()
    own.run_begins(trainer)
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").touch()
    take_step(trainer, own)
    (warning,) = trainer.said
    assert warning.startswith("warning: cannot write the checkpoint: ")


def test_checkpoints_of_another_run_are_out_of_the_way(tmp_path: Path) -> None:
    """Also those of fewer steps: they would be counted, and removed, as this run's."""
    run(checkpointer(tmp_path, interval=1), 3)
    trainer = run(checkpointer(tmp_path, keep_last=1, resumes_own=False), 6, first=4)
    assert saved_steps(tmp_path) == [6]
    assert len(list(tmp_path.glob("*set-aside*"))) == 3
    assert sum("not this run's" in text for text in trainer.said) == 3


def test_a_save_that_failed_does_not_cost_the_next(tmp_path: Path, disk: Disk) -> None:
    """Noticed only when the next is due, as nothing in between asked; so at the end of a run."""
    for steps in (4, 3):
        own = checkpointer(tmp_path / str(steps), interval=2, in_background=True, go_on=True)
        trainer = Trainer(total_steps=steps)
        own.run_begins(trainer)
        take_step(trainer, own)
        disk.full = True
        take_step(trainer, own)
        finish(own)
        disk.full = False
        # As if the disk had been too slow for the steps until then.
        assert own._in_flight is not None
        while not trainer.is_over:
            take_step(trainer, own) if trainer.state.step == steps - 1 else take_step(trainer)
        assert saved_steps(tmp_path / str(steps)) == [steps]
        assert sum(text.startswith("warning: ") for text in trainer.said) == 1


@pytest.mark.parametrize("in_background", [False, True])
def test_the_last_checkpoint_is_never_done_without(
    tmp_path: Path, disk: Disk, in_background: bool
) -> None:
    disk.full = True
    with pytest.raises(SaveError, match="No space left"):
        run(checkpointer(tmp_path, in_background=in_background, go_on=True), 3)


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(checkpointing, "time", made)
    return made


@pytest.fixture
def stopper(tmp_path: Path) -> Iterator[Stopper]:
    """Its handlers are taken back whatever a test leaves."""
    before = {number: signal.getsignal(number) for number in Stopper.SIGNALS}
    yield Stopper(checkpointer(tmp_path), 0.0, None)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", Stopper.SIGNALS)
def test_signal_stops_the_run_at_the_next_step_with_a_checkpoint(
    tmp_path: Path, stopper: Stopper, number: signal.Signals
) -> None:
    own, trainer = checkpointer(tmp_path), Trainer()
    stopper.run_begins(trainer)
    take_step(trainer, stopper, own)
    os.kill(os.getpid(), number)
    assert trainer.stop_reason is None, "in the midst of a step nothing happens"
    take_step(trainer, stopper, own)
    assert trainer.stop_reason == f"stopped by {number.name}"
    assert trainer.is_over
    assert saved_steps(tmp_path) == [2]


def test_handlers_are_those_from_before_when_the_run_ends(stopper: Stopper) -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    before = [signal.getsignal(number) for number in Stopper.SIGNALS]
    trainer = Trainer()
    stopper.run_begins(trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == []
    stopper.run_ends(trainer)
    assert [signal.getsignal(number) for number in Stopper.SIGNALS] == before
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_signal_after_the_last_step_is_heard(stopper: Stopper) -> None:
    """While that is evaluated or saved; of a recipe the next stage is not to begin."""
    trainer = Trainer(total_steps=1)
    stopper.run_begins(trainer)
    take_step(trainer, stopper)
    assert trainer.stop_reason is None
    os.kill(os.getpid(), signal.SIGTERM)
    stopper.run_ends(trainer)
    assert trainer.stop_reason == "stopped by SIGTERM"


def test_time_that_is_up_after_the_last_step_is_noticed(tmp_path: Path, clock: Clock) -> None:
    stopper, trainer = Stopper(checkpointer(tmp_path), clock.now, 100.0), Trainer(total_steps=1)
    stopper.step_ended(trainer, metrics(1, seconds=1.0))
    assert trainer.stop_reason is None
    clock.now += 100.0
    stopper.run_ends(trainer)
    assert trainer.stop_reason == "stopped before --max_time"


def test_second_interrupt_ends_at_once(stopper: Stopper) -> None:
    stopper.run_begins(Trainer())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_further_terminations_wait_for_the_checkpoint(stopper: Stopper) -> None:
    """A launcher may send several; only a person's Ctrl-C is impatience."""
    trainer = Trainer()
    stopper.run_begins(trainer)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    take_step(trainer, stopper)
    assert trainer.stop_reason == "stopped by SIGTERM"


@pytest.mark.parametrize(
    ("limit", "seconds", "save_seconds", "steps"),
    [
        # A step may start while 1.5 steps and saves fit in what is left.
        (100.0, 10.0, 0.0, 9),
        (100.0, 10.0, 20.0, 6),
        (100.0, 30.0, 0.0, 2),
        (10.0, 100.0, 0.0, 1),
        (0.0, 1.0, 0.0, 1),
    ],
)
def test_ends_before_its_time_is_up(
    tmp_path: Path, clock: Clock, limit: float, seconds: float, save_seconds: float, steps: int
) -> None:
    own = checkpointer(tmp_path)
    own.longest_save = save_seconds
    stopper, trainer = Stopper(own, clock.now, limit), Trainer()
    taken = 0
    while not trainer.is_over:
        clock.now += seconds
        taken += 1
        stopper.step_ended(trainer, metrics(taken, seconds=seconds))
    assert taken == steps
    assert trainer.stop_reason == "stopped before --max_time"
    end = clock.now - Clock.now + save_seconds
    assert end <= limit or taken == 1, "the checkpoint would come too late"


def test_time_between_steps_counts(tmp_path: Path, clock: Clock) -> None:
    """An evaluation, say, which may come again before the next step ends."""
    stopper, trainer = Stopper(checkpointer(tmp_path), clock.now, 100.0), Trainer()
    clock.now += 50.0
    stopper.step_ended(trainer, metrics(1, seconds=1.0, seconds_between=32.0))
    assert trainer.stop_reason is None
    stopper.step_ended(trainer, metrics(2, seconds=1.0, seconds_between=33.0))
    assert trainer.stop_reason is not None


def test_without_a_limit_no_time_is_too_long(tmp_path: Path, clock: Clock) -> None:
    stopper, trainer = Stopper(checkpointer(tmp_path), clock.now, None), Trainer()
    clock.now += 1e9
    stopper.step_ended(trainer, metrics(1, seconds=1e6))
    assert trainer.stop_reason is None
