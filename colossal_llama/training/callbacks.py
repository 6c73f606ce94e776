"""The moments of a run at which something happens that is not training itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from colossal_llama.training.trainer import StepMetrics, Trainer


@dataclass(frozen=True)
class Outcome:
    """A forward and backward pass over a global batch, before the update.

    Args:
        step: number of the step, from 1.
        rows: the batch, as row numbers.
        own_rows: this process's share of them.
        loss: mean over the batch's loss-carrying tokens, in nats; the same on all processes.
        own_losses_are_finite: whether this process's part of that is.
    """

    step: int
    rows: list[int] = field(repr=False)
    own_rows: list[int] = field(repr=False)
    loss: float
    own_losses_are_finite: bool


class Callback:
    """Does nothing at every moment; subclasses override the ones they are for.

    All processes call all callbacks, in the same order, so that a callback may communicate.
    """

    def run_begins(self, trainer: Trainer) -> None:
        """Before the first step."""

    def update_is_due(self, trainer: Trainer, outcome: Outcome) -> str | None:
        """Gradients are there. A text is a reason to leave the update out, on all processes."""
        return None

    def step_ended(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """After the update, or after it was left out."""

    def run_ends(self, trainer: Trainer) -> None:
        """After the last step, or after an error (which is on its way through)."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped; plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` gave."""


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any process; the same answer on all of them."""
    import torch.distributed as dist

    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
