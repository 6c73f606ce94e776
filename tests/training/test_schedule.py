"""The learning rate: up in a straight line, down along half a cosine, never below its floor."""

from __future__ import annotations

import itertools
import math

import pytest

from colossal_llama.training.schedule import CosineSchedule, default_warmup

SIZES = [(0, 1), (1, 1), (1, 2), (0, 10), (3, 10), (10, 10), (25, 1000)]


def rates(warmup: int, total: int, peak: float = 3e-4) -> list[float]:
    schedule = CosineSchedule(peak=peak, warmup_steps=warmup, total_steps=total)
    return [schedule.learning_rate(step) for step in range(1, total + 1)]


@pytest.mark.parametrize(("warmup", "total"), SIZES)
def test_every_rate_is_positive_and_at_most_the_peak(warmup: int, total: int) -> None:
    assert all(0 < rate <= 3e-4 for rate in rates(warmup, total))


@pytest.mark.parametrize(("warmup", "total"), SIZES)
def test_warm_up_is_linear_and_ends_at_the_peak(warmup: int, total: int) -> None:
    found = rates(warmup, total, peak=1.0)[:warmup]
    assert found == pytest.approx([step / warmup for step in range(1, warmup + 1)])


@pytest.mark.parametrize(("warmup", "total"), SIZES)
def test_decay_never_rises_and_ends_at_a_tenth(warmup: int, total: int) -> None:
    found = rates(warmup, total, peak=1.0)[warmup:]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    if found:
        assert found[-1] == pytest.approx(0.1)


def test_decay_is_half_a_cosine() -> None:
    found = rates(0, 100, peak=1.0)
    assert found[49] == pytest.approx(0.55), "half-way"
    assert found[24] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), "a quarter"


def test_a_run_of_one_step_trains_at_the_peak_with_warm_up() -> None:
    assert rates(default_warmup(1), 1, peak=1.0) == [1.0]


def test_steps_after_the_last_stay_at_the_floor() -> None:
    schedule = CosineSchedule(peak=1.0, warmup_steps=2, total_steps=10)
    assert schedule.learning_rate(11) == schedule.learning_rate(1000) == pytest.approx(0.1)


@pytest.mark.parametrize(("total", "warmup"), [(1, 1), (40, 1), (100, 2), (1000, 25), (4000, 100)])
def test_default_warm_up_is_two_and_a_half_percent(total: int, warmup: int) -> None:
    assert default_warmup(total) == warmup
