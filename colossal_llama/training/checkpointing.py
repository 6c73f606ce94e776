"""When checkpoints are written, how many are kept, and when a run has to stop."""

from __future__ import annotations

import copy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from colossal_llama.errors import ColossalLlamaError
from colossal_llama.training.callbacks import Callback, any_rank
from colossal_llama.training.checkpoint import CheckpointFiles, SaveError
from colossal_llama.training.file_writer import FileWriter, HostCopies
from colossal_llama.training.state import RunningState

if TYPE_CHECKING:
    from colossal_llama.training.trainer import StepMetrics, Trainer


class Checkpointer(Callback):
    """Saves at intervals, at the end of an epoch, and when the run is over or has to stop.

    Args:
        interval: steps between checkpoints; 0 for none.
        keep_last: checkpoints to keep; 0 keeps all.
        in_background: training goes on while files are written.
        go_on: a checkpoint that cannot be written is a warning, not the end of the run.
        resumes_own: the run goes on from a checkpoint in its own directory; otherwise all that
            are there are of other runs.
    """

    PATIENCE = 4  # times --hang_timeout that a save may take

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        interval: int,
        keep_last: int,
        in_background: bool,
        go_on: bool,
        resumes_own: bool,
    ) -> None:
        self._resumes_own = resumes_own
        self._files, self._interval, self._keep_last = files, interval, keep_last
        self._in_background, self._go_on = in_background, go_on
        self._copies = HostCopies()
        self._epoch = 0
        self._in_flight: tuple[RunningState, FileWriter, float] | None = None
        self.longest_save = 0.0  # seconds

    def run_begins(self, trainer: Trainer) -> None:
        self._epoch = trainer.state.epoch
        if dist.get_rank() == 0:
            self._files.remove_leftovers()
            begin = trainer.state.step if self._resumes_own else 0
            for name in self._files.set_aside(begin):
                trainer.say(f"warning: a checkpoint that is not this run's is now called {name}")

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        passed_epoch, self._epoch = trainer.state.epoch > self._epoch, trainer.state.epoch
        at_interval = self._interval > 0 and trainer.state.step % self._interval == 0
        due = at_interval or passed_epoch or trainer.is_over
        if self._in_flight is not None:
            _, writer, _ = self._in_flight
            if due or not any_rank(not writer.is_done, trainer.device):
                self._attempt(trainer, self._publish, go_on=self._go_on)
        if due:
            self._attempt(trainer, self._save, go_on=self._go_on and not trainer.is_over)

    def run_ends(self, trainer: Trainer) -> None:
        if self._in_flight is None:
            return
        error = sys.exc_info()[1]  # there is one: otherwise the last step would have published it
        if isinstance(error, ColossalLlamaError) and error.on_all_processes:
            self._attempt(trainer, self._publish, go_on=True)
        else:
            # It cannot be published without the others. But a thread that is still writing when
            # Python exits would abort the process.
            self._tell_watchdog(trainer)
            self._in_flight[1].finish()

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        state = copy.deepcopy(trainer.state)
        state.callbacks = {type(c).__name__: s for c in trainer.callbacks if (s := c.state())}
        writer = FileWriter(late=self._in_background, copies=self._copies)
        self._files.collect(state, writer)
        self._in_flight = state, writer, started
        if writer.late:
            writer.start()
        if not writer.late or trainer.is_over:
            self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        assert self._in_flight is not None
        (state, writer, started), self._in_flight = self._in_flight, None
        newest = self._files.publish(state, writer)
        trainer.say(f"saved {newest}")
        if self._keep_last and dist.get_rank() == 0:
            try:
                self._files.keep_last(self._keep_last, newest)
            except OSError as error:  # nothing is lost but room
                trainer.say(f"warning: --keep_last: {error.filename}: {error.strerror}")
        # Of a save in the background, too: the last of a run is waited for.
        self.longest_save = max(self.longest_save, time.perf_counter() - started)

    def _attempt(self, trainer: Trainer, action: Callable[[Trainer], None], *, go_on: bool) -> None:
        self._tell_watchdog(trainer)
        try:
            action(trainer)
        except SaveError as error:
            self._in_flight = None
            if not go_on:
                raise
            trainer.say(f"warning: {error}{self._free_space()}; training goes on without it")

    def _tell_watchdog(self, trainer: Trainer) -> None:
        allowance = self.PATIENCE * trainer.watchdog.timeout
        trainer.watchdog.beat(trainer.state.step, "checkpoint", allowance)

    def _free_space(self) -> str:
        try:
            free = shutil.disk_usage(self._files.save_dir).free / 2**30
        except OSError:  # the disk is gone altogether
            return ""
        return f" ({free:.1f} GiB are free)"


class Stopper(Callback):
    """Ends a run at the next step boundary, on SIGTERM, on Ctrl-C, or before a time limit.

    Has to come before the checkpointer, which then saves.

    Args:
        max_seconds: from ``started`` (as ``time.monotonic`` counts) to the end of the last save;
            None for no limit.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    MARGIN = 1.5  # times the longest step and save so far

    def __init__(
        self, checkpointer: Checkpointer, started: float, max_seconds: float | None
    ) -> None:
        self._checkpointer, self._started, self._max_seconds = checkpointer, started, max_seconds
        self._caught: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._longest_step = 0.0

    def run_begins(self, trainer: Trainer) -> None:
        self._before = {number: signal.signal(number, self._catch) for number in self.SIGNALS}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C: at once, without a checkpoint
        self._caught = signal.Signals(number)

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._longest_step = max(self._longest_step, metrics.seconds + metrics.seconds_between)
        trainer.stop_reason = self._reason(trainer)

    def _reason(self, trainer: Trainer) -> str | None:
        if any_rank(self._caught is not None, trainer.device):
            name = self._caught.name if self._caught else "a signal to another process"
            return f"stopped by {name}"
        if any_rank(self._is_late(), trainer.device):
            return "stopped before --max_time"
        return None

    def _is_late(self) -> bool:
        if self._max_seconds is None:
            return False
        needed = self.MARGIN * (self._longest_step + self._checkpointer.longest_save)
        return time.monotonic() - self._started + needed > self._max_seconds

    def run_ends(self, trainer: Trainer) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if sys.exc_info()[1] is None and trainer.stop_reason is None:
            # While the last step was evaluated, or saved; another stage may be about to begin.
            trainer.stop_reason = self._reason(trainer)
