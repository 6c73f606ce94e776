"""The learning rate as a function of the step: no state to save, nothing to forget to step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to ``peak``, then half a cosine down to ``floor_ratio * peak``.

    The schedule of Llama (Touvron et al. 2023, section 2.3): the floor is 10 % of the peak.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    floor_ratio: float = 0.1

    def learning_rate(self, step: int) -> float:
        """The rate of update number ``step``, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        floor = self.peak * self.floor_ratio
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        return floor + (self.peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def default_warmup(total_steps: int) -> int:
    """2.5 % of the steps, at least one."""
    return max(1, round(0.025 * total_steps))
