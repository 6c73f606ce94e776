"""The learning rate as a function of the step: no state to save, nothing to forget to step.

All schedules rise linearly over the warm-up; then, with the peak ``--lr`` as 1:

    cosine    half a cosine down to the floor
    linear    a straight line down to the floor
    constant  1
    wsd       1, and down to the floor over the last steps
    infinite  half a cosine down to a lower rate, that rate, and down to the floor over the last
              steps; what was trained before those can be gone on from without a new warm-up
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

SCHEDULES = ("cosine", "linear", "constant", "wsd", "infinite")


class ScheduleOptions(Protocol):
    """The flags that a schedule is made from."""

    lr: float
    lr_schedule: str
    min_lr_ratio: float
    warmup_steps: int | None
    decay_ratio: float
    cooldown_ratio: float
    constant_lr_ratio: float


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of one run.

    cosine is Llama's (Touvron et al. 2023, section 2.3), with its floor of 10 % of the peak. wsd
    is warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4); its decay is the "1-sqrt" of
    Hägele et al. 2024 (section 3), who found it better than a straight line. infinite has the
    four phases of Ibrahim et al. 2024 ("Infinite learning rate schedules"), with the same 1-sqrt
    for the last: unlike the exponential there it can end at 0.
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int
    floor_ratio: float = 0.1  # of the peak; constant has no floor
    decay_steps: int = 0  # the last steps, of wsd and infinite
    cooldown_steps: int = 0  # after the warm-up, of infinite
    constant_ratio: float = 0.5  # of the peak, of infinite

    def __post_init__(self) -> None:
        assert self.kind in SCHEDULES, self.kind

    def learning_rate(self, step: int) -> float:
        """The rate of update number ``step``, counted from 1. After the last it stays."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        floor = self.peak * self.floor_ratio
        past_warmup = step - self.warmup_steps
        if self.kind == "constant":
            return self.peak
        if self.kind in ("cosine", "linear"):
            shape = _half_cosine if self.kind == "cosine" else _straight_line
            fall_steps = self.total_steps - self.warmup_steps
            return _descend(self.peak, floor, past_warmup / max(1, fall_steps), shape)
        plateau = self.peak * (self.constant_ratio if self.kind == "infinite" else 1.0)
        in_decay = step - (self.total_steps - self.decay_steps)
        if self.decay_steps and in_decay > 0:
            return _descend(plateau, floor, in_decay / self.decay_steps, _one_minus_root)
        return _descend(self.peak, plateau, past_warmup / max(1, self.cooldown_steps), _half_cosine)


def build_schedule(options: ScheduleOptions, total_steps: int) -> Schedule:
    """The schedule of a run of ``total_steps``.

    A run too short for all its phases keeps the warm-up first and the decay second.
    """
    warmup = options.warmup_steps
    if warmup is None:
        warmup = default_warmup(total_steps)
    left = max(0, total_steps - warmup)
    decay = cooldown = 0
    if options.lr_schedule in ("wsd", "infinite"):
        decay = min(left, round(options.decay_ratio * total_steps))
    if options.lr_schedule == "infinite":
        cooldown = min(left - decay, round(options.cooldown_ratio * total_steps))
    return Schedule(
        kind=options.lr_schedule,
        peak=options.lr,
        total_steps=total_steps,
        warmup_steps=warmup,
        floor_ratio=options.min_lr_ratio,
        decay_steps=decay,
        cooldown_steps=cooldown,
        constant_ratio=options.constant_lr_ratio,
    )


def default_warmup(total_steps: int) -> int:
    """2.5 % of the steps, at least one."""
    return max(1, round(0.025 * total_steps))


def schedule_problems(options: ScheduleOptions, total_steps: int | None = None) -> list[str]:
    """What is wrong with the flags; more of it can be said where ``total_steps`` are known."""
    found = []
    if options.lr < 0:
        found.append("--lr must not be negative")
    if options.warmup_steps is not None and options.warmup_steps < 0:
        found.append("--warmup_steps must not be negative")
    for name in ("min_lr_ratio", "decay_ratio", "cooldown_ratio", "constant_lr_ratio"):
        if not 0 <= getattr(options, name) <= 1:
            found.append(f"--{name} must be between 0 and 1")
    if options.lr_schedule == "infinite":
        found += _infinite_problems(options)
    return found or _length_problems(options, total_steps)


def _infinite_problems(options: ScheduleOptions) -> list[str]:
    found = []
    if options.constant_lr_ratio < options.min_lr_ratio:
        found.append(
            f"--constant_lr_ratio {options.constant_lr_ratio:g} is below --min_lr_ratio "
            f"{options.min_lr_ratio:g}: the rate would rise in the last steps"
        )
    if options.cooldown_ratio == 0 and options.warmup_steps != 0:
        found.append(
            "--cooldown_ratio 0 goes on in the constant phase of an earlier run: give "
            "--warmup_steps 0 with it, or --lr_schedule wsd for a run with a warm-up"
        )
    return found


def _length_problems(options: ScheduleOptions, total_steps: int | None) -> list[str]:
    """Whether the phases fit in a run; the default warm-up is not the user's mistake."""
    ratios = {"wsd": ["decay_ratio"], "infinite": ["cooldown_ratio", "decay_ratio"]}
    names = ratios.get(options.lr_schedule, [])
    share = sum(getattr(options, name) for name in names)
    named = " + ".join(f"--{name} {getattr(options, name):g}" for name in names)
    if share > 1:
        return [f"{named} is more than the whole run"]
    if total_steps is None or not options.warmup_steps:
        return []
    if options.warmup_steps + round(share * total_steps) <= total_steps:
        return []
    phases = " + ".join(filter(None, [f"--warmup_steps {options.warmup_steps:,}", named]))
    return [f"{phases} is more than the run's {total_steps:,} steps"]


def _descend(start: float, end: float, progress: float, shape: Callable[[float], float]) -> float:
    """From ``start`` to ``end`` while ``progress`` goes from 0 to 1 and ``shape`` from 1 to 0."""
    return end + (start - end) * shape(min(1.0, progress))


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _straight_line(progress: float) -> float:
    return 1 - progress


def _one_minus_root(progress: float) -> float:
    return 1 - math.sqrt(progress)
