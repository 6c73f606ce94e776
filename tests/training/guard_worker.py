"""One of two processes of which one has a loss, then the other a gradient, that is not finite."""

from __future__ import annotations

import math
from pathlib import Path

import torch.distributed as dist

from colossal_llama.training import gradients
from colossal_llama.training.callbacks import Outcome
from colossal_llama.training.guards import NonFiniteGuard
from tests.training.stand_ins import Trainer, in_process


def run(directory: Path) -> list[str | None]:
    rank, reasons = dist.get_rank(), []
    guard = NonFiniteGuard(directory, 3)
    for loss, bad_loss, bad_gradient in ((math.nan, 1, None), (2.0, None, 0)):
        gradients.are_finite = lambda optimizer, bad=bad_gradient: rank != bad
        trainer = Trainer(finite_backward=rank != bad_gradient)
        own = [2 * rank, 2 * rank + 1]
        reasons.append(
            guard.update_is_due(trainer, Outcome(1, [0, 1, 2, 3], own, loss, rank != bad_loss))
        )
        dist.barrier()
    return reasons


if __name__ == "__main__":
    in_process(run)
