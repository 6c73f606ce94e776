"""Periodic evaluation: loss and bits per byte on rows that are not trained on.

Every row counts once, whole, however rows are spread over processes and micro-batches: losses
are summed token by token in float64, and divided by counts that are known beforehand. What is
left to differ is the rounding of the model's own arithmetic. Nothing of the training changes:
no weight, no gradient, no random number is drawn, and the plugins are left as they were found.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colossal_llama.dataset.writer import IGNORE_INDEX
from colossal_llama.training.batches import Batch, BatchMaker
from colossal_llama.training.callbacks import Callback
from colossal_llama.training.forward_backward import Passes, sum_over_ranks
from colossal_llama.training.loss import next_tokens
from colossal_llama.training.validation import Validation

if TYPE_CHECKING:
    from colossal_llama.training.trainer import StepMetrics, Trainer


class Evaluator(Callback):
    """Evaluates every ``interval`` steps and after the last one.

    Has to come after the stopper, and before the checkpointer: what was measured is then known
    when a checkpoint says that the step is done. A run that has to stop saves first; then it
    measures what it has finished, or else leaves that to the run that goes on.

    Args:
        validation: the rows.
        interval: steps from one evaluation to the next.
        stages: of the pipeline; 1 for none.
    """

    # So that filling and draining a pipeline is a ninth of the time at most.
    MICRO_BATCHES_PER_STAGE = 8

    def __init__(self, validation: Validation, interval: int, stages: int = 1) -> None:
        self._validation, self._interval = validation, interval
        self._micro_batches = 1 if stages == 1 else self.MICRO_BATCHES_PER_STAGE * stages
        self._is_overdue = self._is_left_for_the_end = False

    def run_begins(self, trainer: Trainer) -> None:
        found = self._validation
        trainer.say(
            f"evaluating on {len(found.rows):,} rows with {found.tokens.sum():,} tokens "
            f"({found.bytes.sum():,} bytes) every {self._interval:,} steps"
        )
        if self._is_overdue:
            self._report(trainer)
            self._is_overdue = False

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        due = trainer.state.step % self._interval == 0 or trainer.state.finished
        if due and trainer.stop_reason is None:
            self._report(trainer)
        else:
            self._is_overdue = due and not trainer.state.finished
            self._is_left_for_the_end = due and trainer.state.finished

    def run_ends(self, trainer: Trainer) -> None:
        if self._is_left_for_the_end and sys.exc_info()[1] is None:
            self._report(trainer)

    def state(self) -> dict[str, Any]:
        return {"is_overdue": True} if self._is_overdue else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._is_overdue = state["is_overdue"]

    def _report(self, trainer: Trainer) -> None:
        result = self.evaluate(trainer)
        trainer.log.log_evaluation(result)
        trainer.say(describe(result))

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """Measures the model as it is; the same result on all processes."""
        started = time.perf_counter()
        step, found = trainer.state.step, self._validation
        sums = torch.zeros(2 * len(found.tokens), dtype=torch.float64, device=trainer.device)
        maker = dataclasses.replace(trainer.batches, rows=found.rows)
        trainer.model.eval()
        try:
            for batches in micro_batches(found, maker, self._micro_batches):
                trainer.watchdog.beat(step, "evaluation")
                add_losses(sums, trainer.passes, batches)
        finally:
            trainer.model.train()
        total = sum_over_ranks(sums, trainer.layout.reports_loss).view(-1, 2).numpy()
        return {
            "step": step,
            **figures(found, total),
            "seconds": time.perf_counter() - started,
            "rows": len(found.rows),
        }


def micro_batches(validation: Validation, maker: BatchMaker, at_once: int) -> Iterator[list[Batch]]:
    """This process's share of all rows, ``at_once`` micro-batches of one width at a time.

    All processes get the same number of micro-batches of the same number of rows: the last are
    filled up with rows without loss. Beside a batch's own there is ``sum``, int64 [batch,
    sequence]: which sum the loss at a place is added to, two for each category, the second for
    tokens that are text.
    """
    together = maker.layout.data_size * maker.micro_batch_size
    numbers: list[int | None] = [*validation.order.tolist()]
    numbers += [None] * (-len(numbers) % together)
    nothing = {
        "input_ids": np.array([maker.pad_id], dtype=np.int32),
        "labels": np.array([IGNORE_INDEX], dtype=np.int32),
        "document_lengths": np.array([1], dtype=np.int32),
        "category": validation.rows.categories[0],
    }
    is_text = torch.from_numpy(validation.pieces.is_text)
    for start in range(0, len(numbers), together * at_once):
        own = _own_share(maker, numbers[start : start + together * at_once])
        rows = [nothing if n is None else validation.rows.take([n])[0] for n in own]
        whole = maker.collate(rows)
        wanted = next_tokens(whole["labels"]).clamp(min=0)
        whole["sum"] = 2 * whole["category"][:, None] + is_text[wanted].long()
        yield [
            {name: tensor[first : first + maker.micro_batch_size] for name, tensor in whole.items()}
            for first in range(0, len(rows), maker.micro_batch_size)
        ]


def _own_share(maker: BatchMaker, numbers: Sequence[int | None]) -> Sequence[int | None]:
    share = len(numbers) // maker.layout.data_size
    return numbers[maker.layout.data_rank * share : (maker.layout.data_rank + 1) * share]


def add_losses(sums: torch.Tensor, passes: Passes, batches: Sequence[Batch]) -> None:
    """Adds the losses of this process's tokens to ``sums``, float64 [sums]."""

    def add(losses: torch.Tensor, batch: Batch) -> None:
        where = passes.token_loss.own_part(batch["sum"].to(sums.device), losses.shape[1])
        sums.index_add_(0, where.flatten(), losses.flatten().double())

    passes.forward(batches, add)


def figures(validation: Validation, sums: np.ndarray) -> dict[str, Any]:
    """What ``evaluation.jsonl`` says of the sums of losses, float64 [categories, 2].

    The loss is the mean over all tokens that carry one, bos and eos included. Bits per byte
    leave out the tokens that are no text, as ``colossal-llama evaluate`` does.
    """
    names = validation.rows.categories
    counted = list(zip(names, sums, validation.tokens, validation.bytes, strict=True))
    tokens, size = int(validation.tokens.sum()), int(validation.bytes.sum())
    bits = sums[:, 1] / math.log(2)
    return {
        "tokens": tokens,
        "loss": float(sums.sum()) / tokens,
        "bits_per_byte": float(bits.sum()) / size if size else None,
        "loss_by_category": {
            name: float(own.sum()) / int(count) for name, own, count, _ in counted if count
        },
        "bits_per_byte_by_category": {
            name: float(own[1]) / math.log(2) / int(count)
            for name, own, _, count in counted
            if count
        },
    }


def describe(result: dict[str, Any]) -> str:
    """An evaluation in a line."""
    bits = result["bits_per_byte"]
    told = f"step {result['step']}: evaluation loss {result['loss']:.4f}"
    told += _by_category(result["loss_by_category"])
    if bits is not None:
        told += f", {bits:.4f} bits per byte" + _by_category(result["bits_per_byte_by_category"])
    return f"{told}, {result['seconds']:.1f} s"


def _by_category(values: dict[str, float]) -> str:
    if len(values) < 2:
        return ""
    return f" ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})"
