"""What a run tells while it runs: a progress bar, TensorBoard, and a line of JSON a step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colossal_llama import storage


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. The loss is that of the weights before the step's update."""

    step: int
    loss: float  # mean over the loss-carrying tokens of the global batch, in nats
    learning_rate: float
    grad_norm: float | None  # before clipping; None where nothing is clipped
    loss_scale: float | None  # fp16 only
    tokens: int  # tokens seen since the run began, padding excluded
    tokens_per_second: float  # over all processes
    seconds: float  # duration of the step


class MetricsWriter:
    """Writes on the first process; does nothing on the others."""

    def __init__(
        self, save_dir: Path, tensorboard_dir: Path, first_step: int, total_steps: int, active: bool
    ) -> None:
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = save_dir / "metrics.jsonl"
        _drop_steps_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = SummaryWriter(str(tensorboard_dir), purge_step=first_step)
        self._bar = tqdm(total=total_steps, initial=first_step - 1, unit="step", desc="train")

    def log(self, metrics: StepMetrics) -> None:
        """Records one step."""
        if not self._active:
            return
        values = asdict(metrics)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name != "step" and value is not None:
                self._events.add_scalar(f"train/{name}", value, metrics.step)
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, {metrics.tokens_per_second:,.0f} tokens/s"
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        if self._active:
            self._bar.write(text)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._active:
            self._bar.close()
            self._events.close()
            self._file.close()


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Drops the lines of steps that a resumed run takes again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) < first_step]
    with storage.atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash counts as a later one."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
