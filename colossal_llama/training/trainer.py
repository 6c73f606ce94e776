"""The loop: one for every plugin, with or without a pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.dataset.sampler import GlobalSampler
from colossal_llama.errors import DataError, agreed
from colossal_llama.runtime.watchdog import Watchdog
from colossal_llama.training import batches, gradients
from colossal_llama.training.batches import Batch, BatchMaker
from colossal_llama.training.callbacks import Callback, Outcome
from colossal_llama.training.forward_backward import Passes, sum_over_ranks
from colossal_llama.training.optimizer_state import loss_scaler
from colossal_llama.training.plugins import Layout
from colossal_llama.training.reporting import RunLog
from colossal_llama.training.schedule import Schedule
from colossal_llama.training.state import RunningState
from colossal_llama.training.throughput import Throughput


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. The loss is that of the weights before the step's update."""

    step: int
    loss: float  # mean over the loss-carrying tokens of the global batch, in nats
    loss_by_category: dict[str, float]  # the same, of each category that the batch has
    learning_rate: float
    grad_norm: float | None  # before clipping; None where nothing is clipped
    loss_scale: float | None  # fp16 only
    skipped: str | None  # why no update was made
    tokens: int  # tokens seen since the run began, padding excluded
    tokens_per_second: float  # over all processes
    tokens_per_second_per_device: float
    mfu: float | None  # model FLOPs utilisation; None where the device's peak is not known
    seconds: float  # duration of the step, of which:
    seconds_data: float
    seconds_forward_backward: float
    seconds_optimizer: float
    seconds_between: float  # since the step before: checkpoints, evaluation, logs
    memory: int  # bytes, peak of this process's device (on a CPU: of the process)


@dataclass
class Trainer:
    """Everything one training run needs between two checkpoints."""

    model: Any
    optimizer: Any
    passes: Passes
    batches: BatchMaker
    sampler: GlobalSampler
    schedule: Schedule
    layout: Layout
    state: RunningState
    callbacks: Sequence[Callback]
    log: RunLog
    throughput: Throughput
    watchdog: Watchdog
    num_epochs: int | None
    device: torch.device
    stop_reason: str | None = field(default=None, init=False)

    def run(self) -> None:
        """Trains from the state's step to the schedule's last, or until a callback stops it."""
        self.model.train()
        for callback in self.callbacks:
            saved = self.state.callbacks.get(type(callback).__name__)
            if saved is not None:
                callback.load_state(saved)
            callback.run_begins(self)
        try:
            while not self.is_over:
                metrics = self.train_step()
                if metrics.step == 1:
                    self.say(f"loss of the loaded weights (step 0): {metrics.loss:.4f}")
                for callback in self.callbacks:
                    callback.step_ended(self, metrics)
        finally:
            for callback in self.callbacks:
                callback.run_ends(self)

    @property
    def is_over(self) -> bool:
        """Whether no further step is to be taken: at the end, or because of ``stop_reason``."""
        return self.stop_reason is not None or self.state.step >= self.schedule.total_steps

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        self.log.say(text)

    def train_step(self) -> StepMetrics:
        """One optimizer update over the next global batch."""
        step = self.state.step + 1
        clock = _Clock(self.watchdog, step)
        with clock.phase("data"):
            rows = self.sampler.batch(self.state.samples)
            micro_batches = self._agreed_batches(rows)
            counts = self._sum_counts(micro_batches)
        by_category, tokens = counts[:-1], int(counts[-1])
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.passes.start_step(self.state.samples, len(rows))
        with clock.phase("forward and backward"):
            loss_tokens = max(1.0, float(by_category.sum()))
            own = self.passes.forward_backward(micro_batches, 1 / loss_tokens, clock.go_on)
            sums = sum_over_ranks(own, self.layout.reports_loss)
            own_finite = bool(torch.isfinite(own).all())
        outcome = Outcome(
            step=step,
            rows=list(rows),
            own_rows=list(self.batches.own_share(rows)),
            loss=float(sums.sum()) / loss_tokens,
            own_losses_are_finite=own_finite,
        )
        with clock.phase("update"):
            scale = self._loss_scale()
            skipped, grad_norm = self._update(outcome, scale)
        self._advance(len(rows), tokens)
        per_second = tokens / clock.total
        return StepMetrics(
            step=step,
            loss=outcome.loss,
            loss_by_category=self._mean_by_category(sums, by_category),
            learning_rate=rate,
            grad_norm=grad_norm,
            loss_scale=scale,
            skipped=skipped,
            tokens=self.state.tokens,
            tokens_per_second=per_second,
            tokens_per_second_per_device=per_second / dist.get_world_size(),
            mfu=self.throughput.utilisation(per_second / dist.get_world_size()),
            seconds=clock.total,
            seconds_data=clock.seconds["data"],
            seconds_forward_backward=clock.seconds["forward and backward"],
            seconds_optimizer=clock.seconds["update"],
            seconds_between=self.throughput.seconds_since_last_step(clock.total),
            memory=self.throughput.peak_memory(),
        )

    def where(self, row: int) -> str:
        """File and place of a row."""
        return self.batches.rows.where(row)

    def _agreed_batches(self, rows: Sequence[int]) -> list[Batch]:
        """This process's micro-batches.

        Raises:
            DataError: on all processes, if one of them met damaged data.
        """
        mistake, micro_batches = None, []
        try:
            micro_batches = self.batches.make(rows)
        except DataError as error:
            mistake = str(error)
        # A phase of its own: who still reads is seen to be behind those that wait for it.
        self.watchdog.beat(self.state.step + 1, "agreement on the data")
        self._raise_together(mistake)
        return micro_batches

    def _raise_together(self, mistake: str | None) -> None:
        failed = torch.tensor(float(mistake is not None), device=self.device)
        dist.all_reduce(failed)
        if not failed:
            return
        mistakes: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(mistakes, mistake)
        raise agreed(DataError(next(filter(None, mistakes))))

    def _sum_counts(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Loss-carrying tokens of each category and, last, all tokens, over all processes."""
        categories = len(self.batches.rows.categories)
        counts = [
            *batches.loss_tokens_by_category(micro_batches, categories).tolist(),
            sum(map(batches.tokens, micro_batches)),
        ]
        values = torch.tensor(counts, dtype=torch.float64, device=self.device)
        return sum_over_ranks(values, self.layout.counts_tokens)

    def _mean_by_category(self, sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
        return {
            name: float(total) / float(count)
            for name, total, count in zip(self.batches.rows.categories, sums, counts, strict=True)
            if count
        }

    def _update(self, outcome: Outcome, scale: float | None) -> tuple[str | None, float | None]:
        """Updates the weights unless there is a reason not to; that and the gradient's norm."""
        reasons = [callback.update_is_due(self, outcome) for callback in self.callbacks]
        reason = next(filter(None, reasons), None)
        if reason is not None:
            gradients.discard(self.optimizer)
            return reason, None
        overflows = gradients.overflows(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if gradients.overflows(self.optimizer) > overflows:
            return f"the gradient overflowed at a loss scale of {scale:,.0f}", None
        norm = self.optimizer.get_grad_norm()
        # The optimizers measure gradients of the scaled loss.
        return None, None if norm is None else float(norm) / (scale or 1.0)

    def _loss_scale(self) -> float | None:
        scaler = loss_scaler(self.optimizer)
        return None if scaler is None else float(scaler.scale)

    def backward_was_finite(self) -> bool:
        """Whether this step's gradients were finite on this process before their reduction."""
        return self.passes.backward_was_finite()

    def _advance(self, rows: int, tokens: int) -> None:
        self.state.step += 1
        self.state.samples += rows
        self.state.tokens += tokens
        self.state.epoch = self.state.samples // len(self.batches.rows)
        if self.num_epochs is not None:
            # The last batch may reach into an epoch that was not asked for.
            self.state.epoch = min(self.state.epoch, self.num_epochs)
        self.state.finished = self.state.step >= self.schedule.total_steps


class LogSteps(Callback):
    """Writes every step to the run's log."""

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        trainer.log.log_step(asdict(metrics))
        if metrics.skipped is not None:
            trainer.say(f"warning: step {metrics.step}: no update, {metrics.skipped}")


class _Clock:
    """Times the phases of a step, and tells the watchdog of each."""

    def __init__(self, watchdog: Watchdog, step: int) -> None:
        self.seconds: dict[str, float] = {}
        self._watchdog, self._step, self._phase = watchdog, step, ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        self.go_on()
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def go_on(self) -> None:
        """The phase takes long, but it has come on."""
        self._watchdog.beat(self._step, self._phase)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())
