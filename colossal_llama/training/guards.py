"""Guards: what must not change the weights is found before the update, on all processes at once."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from colossal_llama import storage
from colossal_llama.errors import ColossalLlamaError, agreed
from colossal_llama.training import gradients
from colossal_llama.training.callbacks import Callback, Outcome, any_rank
from colossal_llama.training.reporting import BAD_BATCHES_FILE

if TYPE_CHECKING:
    from colossal_llama.training.trainer import StepMetrics, Trainer


class NonFiniteGuard(Callback):
    """Leaves out an update whose loss or gradient is not finite on any process.

    Every such batch is noted in ``SAVE_DIR/bad_batches.jsonl``.
    """

    def __init__(self, save_dir: Path, max_bad_steps: int) -> None:
        self._file = save_dir / BAD_BATCHES_FILE
        self._max_bad_steps = max_bad_steps
        self._in_a_row = 0

    def update_is_due(self, trainer: Trainer, outcome: Outcome) -> str | None:
        finite = outcome.own_losses_are_finite and gradients.are_finite(trainer.optimizer)
        if not any_rank(not finite, trainer.device):
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = "gradient" if math.isfinite(outcome.loss) else "loss"
        reason = f"the {what} is not finite"
        note_bad_batch(self._file, trainer, outcome, reason)
        if self._in_a_row > self._max_bad_steps:
            raise agreed(
                ColossalLlamaError(
                    f"{reason} at step {outcome.step}, and --max_bad_steps is "
                    f"{self._max_bad_steps}; no update was made with it. {self._file} names the "
                    "batch. Resume from the last checkpoint with a lower --lr, or with "
                    "--mixed_precision bf16"
                )
            )
        return reason

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]


class SpikeGuard(Callback):
    """Notices a loss far above those of the last steps, and leaves out its update if asked to."""

    WINDOW = 100  # steps that a loss is compared with
    LEAST = 20  # below this many, nothing can be said

    def __init__(self, save_dir: Path, sigma: float, *, skip: bool) -> None:
        self._file = save_dir / BAD_BATCHES_FILE
        self._sigma = sigma
        self._skip = skip
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def update_is_due(self, trainer: Trainer, outcome: Outcome) -> str | None:
        if not math.isfinite(outcome.loss) or not self._is_spike(outcome.loss):
            return None
        mean = statistics.fmean(self._losses)
        reason = (
            f"the loss {outcome.loss:.4f} is more than {self._sigma:g} standard deviations above "
            f"the last {len(self._losses)} steps' mean of {mean:.4f}"
        )
        note_bad_batch(self._file, trainer, outcome, reason)
        if self._skip:
            return reason
        trainer.say(f"warning: step {outcome.step}: {reason}")
        return None

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        # What was left out must not become what is normal; what was learned from, does.
        if metrics.skipped is None and math.isfinite(metrics.loss):
            self._losses.append(metrics.loss)

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < self.LEAST:
            return False
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        return loss > mean + self._sigma * max(deviation, 1e-3)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self.WINDOW)


def note_bad_batch(path: Path, trainer: Trainer, outcome: Outcome, reason: str) -> None:
    """Adds a line to ``bad_batches.jsonl``: which rows every process had, and where it was bad.

    ``ranks`` are the processes whose own loss, or whose gradient flowing back to its embeddings,
    was not finite. It is empty where the reason shows in the reduced gradients alone: these are
    sums over processes, and no longer tell whose part it was.
    """
    finite = outcome.own_losses_are_finite and trainer.backward_was_finite()
    mine = {
        "rank": dist.get_rank(),
        "finite": finite,
        "rows": [trainer.where(row) for row in outcome.own_rows],
    }
    every: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if dist.get_rank():
        return
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": outcome.step,
        "reason": reason,
        "loss": repr(outcome.loss) if not math.isfinite(outcome.loss) else outcome.loss,
        "ranks": [rank["rank"] for rank in every if not rank["finite"]],
        "samples": {rank["rank"]: rank["rows"] for rank in every},
    }
    text = json.dumps(line, ensure_ascii=False)
    try:
        storage.append_all(path, f"{text}\n".encode())
    except OSError as error:
        trainer.say(f"warning: {path}: {error.strerror}; the batch was {text}")
