"""The loop: one for every plugin, with or without a pipeline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.loader import TrainingRows
from colossal_llama.dataset.sampler import GlobalSampler
from colossal_llama.dataset.writer import IGNORE_INDEX
from colossal_llama.errors import ColossalLlamaError
from colossal_llama.training.checkpoint import RunningState
from colossal_llama.training.metrics import MetricsWriter, StepMetrics
from colossal_llama.training.neftune import NoisyEmbeddings
from colossal_llama.training.optimizer_state import loss_scaler
from colossal_llama.training.plugins import Layout
from colossal_llama.training.schedule import CosineSchedule

Batch = dict[str, torch.Tensor]


@dataclass
class Trainer:
    """Everything one training run needs between two checkpoints."""

    booster: Any
    model: Any
    optimizer: Any
    rows: TrainingRows
    sampler: GlobalSampler
    schedule: CosineSchedule
    layout: Layout
    state: RunningState
    metrics: MetricsWriter
    noise: NoisyEmbeddings | None
    save: Callable[[RunningState], Path]  # writes a checkpoint and returns its directory
    micro_batch_size: int
    num_epochs: int
    save_interval: int
    pad_id: int
    device: torch.device

    def run(self) -> None:
        """Trains from the state's step to the schedule's last."""
        self.model.train()
        while self.state.step < self.schedule.total_steps:
            epoch = self.state.epoch
            metrics = self.train_step(self.state.step + 1)
            self.metrics.log(metrics)
            if metrics.step == 1:
                self.metrics.say(f"loss of the loaded weights (step 0): {metrics.loss:.4f}")
            if self._is_time_to_save(passed_epoch=self.state.epoch > epoch):
                self.metrics.say(f"saved {self.save(self.state)}")

    def train_step(self, step: int) -> StepMetrics:
        """One optimizer update over the global batch of ``step``."""
        started = time.perf_counter()
        rows = self.sampler.batch(self.state.samples)
        micro_batches = self._micro_batches(rows)
        loss_tokens, tokens = self._sum_over_ranks(
            [
                sum(int(_loss_tokens(batch)) for batch in micro_batches),
                sum(map(_tokens, micro_batches)),
            ],
            self.layout.counts_tokens,
        )
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.noise is not None:
            share = len(rows) // self.layout.data_size
            self.noise.start_step(self.state.samples + self.layout.data_rank * share)
        loss = self._forward_backward(micro_batches, loss_tokens)
        if not math.isfinite(loss):
            raise ColossalLlamaError(
                f"the loss is {loss} at step {step} (rows {rows[0]} to {rows[-1]} of the data "
                "order); no update was made with it. Resume from the last checkpoint with a "
                "lower --lr, or with --mixed_precision bf16"
            )
        scale = self._loss_scale()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._advance(len(rows), tokens)
        seconds = time.perf_counter() - started
        return StepMetrics(
            step=step,
            loss=loss,
            learning_rate=rate,
            grad_norm=self._grad_norm(scale),
            loss_scale=scale,
            tokens=self.state.tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
        )

    def _micro_batches(self, rows: Sequence[int]) -> list[Batch]:
        """This data rank's share of the global batch; all micro-batches have one shape."""
        share = len(rows) // self.layout.data_size
        own = rows[self.layout.data_rank * share : (self.layout.data_rank + 1) * share]
        whole = collate(
            self.rows.take(own),
            self.pad_id,
            pad_to_multiple_of=self.layout.sequence_multiple,
        )
        batches = [
            {name: tensor[start : start + self.micro_batch_size] for name, tensor in whole.items()}
            for start in range(0, share, self.micro_batch_size)
        ]
        if not self.layout.pipeline:
            batches = [_trim(batch, self.layout.sequence_multiple) for batch in batches]
        return batches

    def _forward_backward(self, micro_batches: list[Batch], loss_tokens: float) -> float:
        """Accumulates gradients of the mean loss per token; returns that loss.

        The mean is over all loss-carrying tokens of the global batch, however they fall on
        micro-batches and ranks: each micro-batch's own mean is weighted by its token count.
        Gradients are averaged over data ranks, hence the factor ``data_size``.
        """
        per_token = self.layout.data_size / max(1.0, loss_tokens)
        # Counted on the device: reading a number there would wait for it at every micro-batch.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.layout.pipeline:
            # The schedule divides by the number of micro-batches, so multiply by it first.
            factor = per_token * len(micro_batches)

            def criterion(output: Any, batch: Batch) -> torch.Tensor:
                count = _loss_tokens(batch)
                total.add_(output.loss.detach() * count)
                return output.loss * (count * factor)

            whole = {name: torch.cat([b[name] for b in micro_batches]) for name in micro_batches[0]}
            self.booster.execute_pipeline(
                iter([whole]), self.model, criterion, self.optimizer, return_loss=False
            )
        else:
            for batch in micro_batches:
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                count = _loss_tokens(batch)
                loss = self.model(**batch, use_cache=False).loss
                # Not in place: Gemini's losses are ColoTensors, which leave the other operand of
                # an in-place operation as it was.
                total = total + loss.detach() * count
                self.booster.backward(loss * (count * per_token), self.optimizer)
        (summed,) = self._sum_over_ranks([float(total)], self.layout.reports_loss)
        return summed / max(1.0, loss_tokens)

    def _sum_over_ranks(self, values: Sequence[float], contributes: bool) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if not contributes:
            tensor.zero_()
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def _loss_scale(self) -> float | None:
        scaler = loss_scaler(self.optimizer)
        return None if scaler is None else float(scaler.scale)

    def _grad_norm(self, scale: float | None) -> float | None:
        norm = self.optimizer.get_grad_norm()
        # The optimizers measure gradients of the scaled loss.
        return None if norm is None else float(norm) / (scale or 1.0)

    def _advance(self, rows: int, tokens: float) -> None:
        self.state.step += 1
        self.state.samples += rows
        self.state.tokens += int(tokens)
        # The last batch may reach into an epoch that was not asked for.
        self.state.epoch = min(self.state.samples // len(self.rows), self.num_epochs)

    def _is_time_to_save(self, *, passed_epoch: bool) -> bool:
        due = self.save_interval > 0 and self.state.step % self.save_interval == 0
        return due or passed_epoch or self.state.step == self.schedule.total_steps


def _tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())


def _loss_tokens(batch: Batch) -> torch.Tensor:
    """Number of tokens that are predicted: a row's first label has nothing before it."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def _trim(batch: Batch, multiple: int) -> Batch:
    """Cuts padding that no row of this micro-batch needs."""
    longest = int(batch["attention_mask"].sum(dim=1).max())
    width = -(-longest // multiple) * multiple
    return {name: tensor[:, :width] for name, tensor in batch.items()}
