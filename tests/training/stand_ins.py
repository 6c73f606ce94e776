"""What the pieces of a trainer are given in place of the real ones, and processes to run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.training.callbacks import Callback, Outcome
from colossal_llama.training.checkpoint import CheckpointFiles
from colossal_llama.training.file_writer import FileWriter
from colossal_llama.training.optimizer_shares import Share
from colossal_llama.training.plugins import Layout
from colossal_llama.training.schedule import Schedule
from colossal_llama.training.state import RunningState
from colossal_llama.training.trainer import StepMetrics

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = Layout(
    1, 0, True, True, 0, pipeline=False, sequence_multiple=1, gradient_ranks=1
)  # fmt: skip
STATE = RunningState(
    epoch=1, step=7, samples=28, tokens=3500, world_size=1, plugin="3d", layout={"tp": 1, "pp": 1},
    mixed_precision="bf16", trained="all weights", order={"seed": 1, "data_order": "buckets"},
    config_fingerprint="a1", dataset_fingerprints=["b2", "c3"],
    callbacks={"NonFiniteGuard": {"in_a_row": 2}},
)  # fmt: skip
SCHEDULE = Schedule("cosine", peak=1.0, total_steps=10, warmup_steps=2)


class Optimizer:
    """What a plugin's optimizer wrapper looks like from outside: an inner optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.optim = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(self, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 3)).square().sum().backward()
            self.optim.step()
            self.optim.zero_grad()


def export(checkpoint: Path, writer: FileWriter) -> None:
    """Writes what passes for a model directory, as ``Exporter`` does."""
    if dist.get_rank() == 0:
        writer.write({"weight": torch.ones(2)}, checkpoint / "modeling" / "model.safetensors")
        (checkpoint / "modeling" / "config.json").write_text("{}", encoding="utf-8")


def checkpoint_files(
    save_dir: Path,
    optimizer: Optimizer | None = None,
    export: Callable[[Path, FileWriter], None] = export,
) -> CheckpointFiles:
    """The files of a run with a model of one layer."""
    rank = dist.get_rank()
    layout = replace(LAYOUT, data_size=dist.get_world_size(), data_rank=rank, optimizer_owner=rank)
    save_dir.mkdir(parents=True, exist_ok=True)
    return CheckpointFiles(
        save_dir=save_dir,
        export=export,
        optimizer=optimizer or Optimizer(nn.Linear(3, 2)),
        shares=[Share("weight", 0), Share("bias", 0)],
        schedule=SCHEDULE,
        layout=layout,
    )


class Watchdog:
    timeout = 0.0

    def beat(self, step: int, phase: str, timeout: float | None = None) -> None:
        """As the real one, which nothing here waits for."""


@dataclass
class Trainer:
    """As much of a trainer as its callbacks see."""

    state: RunningState = field(default_factory=RunningState)
    total_steps: int = 10**9
    callbacks: Sequence[Callback] = ()
    optimizer: Any = None
    stop_reason: str | None = None
    said: list[str] = field(default_factory=list)
    watchdog: Watchdog = field(default_factory=Watchdog)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    finite_backward: bool = True

    @property
    def is_over(self) -> bool:
        return self.stop_reason is not None or self.state.step >= self.total_steps

    def say(self, text: str) -> None:
        self.said.append(text)

    def where(self, row: int) -> str:
        return f"data.arrow:{row}"

    def backward_was_finite(self) -> bool:
        return self.finite_backward


def outcome(step: int = 1, loss: float = 2.0, *, finite: bool = True) -> Outcome:
    """What a step came to, on a process whose share of eight rows is the second half."""
    return Outcome(step, list(range(8)), [4, 5, 6, 7], loss, finite)


def metrics(step: int = 1, **values: Any) -> StepMetrics:
    """The measurements of a step, mostly of no interest."""
    blank: dict[str, Any] = dict.fromkeys(StepMetrics.__dataclass_fields__, 0)
    return StepMetrics(**{**blank, "step": step, "loss": 2.0, "skipped": None, **values})


def run_processes(script: str, world_size: int, directory: Path, *arguments: str) -> list[Any]:
    """What a worker of this folder returns on each of several processes; see ``in_process``."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"tests.training.{script}", str(directory), *arguments]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [
        json.loads((directory / f"result-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(world_size)
    ]


def in_process(function: Callable[[Path], Any]) -> None:
    """Calls ``function`` with the directory of ``run_processes``, in their process group."""
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        result = function(directory)
    except BaseException:
        # The others may wait for this process: nothing but the end lets them go.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (directory / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
