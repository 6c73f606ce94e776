"""The learning rate: up in a straight line, down in one of several ways, never below its floor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass

import pytest

from colossal_llama.training.schedule import (
    SCHEDULES,
    Schedule,
    build_schedule,
    default_warmup,
    schedule_problems,
)

# (warm-up, all steps): one step, no warm-up, a warm-up of the whole run and a longer one.
SIZES = [
    *((None, 1), (0, 1), (1, 1), (5, 1), (1, 2), (0, 10), (3, 10), (10, 10), (12, 10)),
    *((0, 100), (25, 1000), (None, 1000), (None, 4321), (950, 1000)),
]
every_size = pytest.mark.parametrize(("warmup", "total"), SIZES)
every_kind = pytest.mark.parametrize("kind", SCHEDULES)


@dataclass
class Options:
    """The flags, with the defaults of train.py and a peak of 1."""

    lr: float = 1.0
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    decay_ratio: float = 0.1
    cooldown_ratio: float = 0.25
    constant_lr_ratio: float = 0.5


def made(kind: str, warmup: int | None, total: int, **flags: float) -> Schedule:
    return build_schedule(Options(lr_schedule=kind, warmup_steps=warmup, **flags), total)


def rates(kind: str, warmup: int | None, total: int, **flags: float) -> list[float]:
    """The rates of steps 1 to ``total``; rate number ``step`` is at index ``step - 1``."""
    schedule = made(kind, warmup, total, **flags)
    return [schedule.learning_rate(step) for step in range(1, total + 1)]


def warmup_of(warmup: int | None, total: int) -> int:
    return default_warmup(total) if warmup is None else warmup


@every_kind
@every_size
def test_every_rate_is_positive_and_at_most_the_peak(
    kind: str, warmup: int | None, total: int
) -> None:
    assert all(0 < rate <= 3e-4 for rate in rates(kind, warmup, total, lr=3e-4))


@every_kind
@every_size
def test_warm_up_is_linear_and_ends_at_the_peak(kind: str, warmup: int | None, total: int) -> None:
    steps = warmup_of(warmup, total)
    found = rates(kind, warmup, total)[:steps]
    assert found == pytest.approx([step / steps for step in range(1, steps + 1)][:total])


@every_kind
@every_size
def test_the_peak_comes_when_the_warm_up_ends(kind: str, warmup: int | None, total: int) -> None:
    steps = warmup_of(warmup, total)
    if 0 < steps <= total:
        found = rates(kind, warmup, total)
        assert found.index(max(found)) + 1 == steps
        assert found[steps - 1] == 1.0


@every_kind
@every_size
def test_after_the_warm_up_no_rate_is_higher_than_the_one_before(
    kind: str, warmup: int | None, total: int
) -> None:
    found = rates(kind, warmup, total)[max(0, warmup_of(warmup, total) - 1) :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    if kind in ("cosine", "linear"):
        assert all(later < earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25])
@every_size
def test_the_last_step_is_at_the_floor(
    kind: str, ratio: float, warmup: int | None, total: int
) -> None:
    decays = kind in ("cosine", "linear") or round(0.1 * total) > 0
    if decays and warmup_of(warmup, total) < total:
        assert rates(kind, warmup, total, min_lr_ratio=ratio)[-1] == pytest.approx(ratio)
        after = made(kind, warmup, total, min_lr_ratio=ratio)
        assert after.learning_rate(total + 1) == after.learning_rate(99 * total) == ratio


@every_kind
@pytest.mark.parametrize(("warmup", "total"), [(100, 1000), (None, 1000), (None, 4321)])
def test_no_jump_is_bigger_than_the_steepest_slope(
    kind: str, warmup: int | None, total: int
) -> None:
    schedule = made(kind, warmup, total)
    steps, decay = schedule.warmup_steps, schedule.decay_steps
    slopes = {
        # Half a cosine is steepest in its middle, 1-sqrt at its first step.
        "cosine": math.pi / 2 * 0.9 / (total - steps),
        "linear": 0.9 / (total - steps),
        "constant": 0.0,
        "wsd": 0.9 / math.sqrt(decay or 1),
        "infinite": 0.4 / math.sqrt(decay or 1),
    }
    found = [0.0, *rates(kind, warmup, total)]
    jumps = [abs(later - earlier) for earlier, later in itertools.pairwise(found)]
    assert max(jumps[:steps]) <= 1 / steps + 1e-12
    assert max(jumps[steps:]) <= slopes[kind] + 1e-12


def test_cosine_is_half_a_cosine() -> None:
    found = rates("cosine", 0, 100)
    assert found[49] == pytest.approx(0.55), "half-way"
    assert found[24] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), "a quarter"


def test_linear_is_a_straight_line() -> None:
    assert rates("linear", 0, 9) == pytest.approx([0.1 * (10 - step) for step in range(1, 10)])


def test_constant_stays() -> None:
    assert set(rates("constant", 4, 100)[3:]) == {1.0}


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    found = rates("wsd", 10, 1000, decay_ratio=0.2)
    assert set(found[9:800]) == {1.0}
    assert found[800] < 1.0
    assert found[849] == pytest.approx(0.1 + 0.9 * 0.5), "1-sqrt is half down after a quarter"


def test_infinite_has_four_phases() -> None:
    found = rates("infinite", 10, 1000)
    assert found[9] == 1.0
    assert found[134] == pytest.approx(0.75), "half-way through the cooldown"
    assert set(found[259:900]) == {0.5}
    assert found[924] == pytest.approx(0.1 + 0.4 * 0.5), "1-sqrt is half down after a quarter"


def test_infinite_can_be_gone_on_from_in_its_constant_phase() -> None:
    first = rates("infinite", 10, 1000, decay_ratio=0.0)
    going_on = rates("infinite", 0, 1000, decay_ratio=0.1, cooldown_ratio=0.0)
    assert first[-1] == 0.5, "no decay: ends in the constant phase"
    assert set(going_on[:900]) == {0.5}, "neither a warm-up nor a cooldown"
    assert going_on[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("kind", "stays"), [("wsd", 1.0), ("infinite", 0.5)])
def test_without_a_decay_the_rate_stays_after_the_last_step(kind: str, stays: float) -> None:
    assert made(kind, 10, 1000, decay_ratio=0.0).learning_rate(1001) == stays


@every_kind
def test_a_run_of_one_step_trains_at_the_peak_with_warm_up(kind: str) -> None:
    assert rates(kind, None, 1) == [1.0]


@pytest.mark.parametrize(("total", "warmup"), [(1, 1), (40, 1), (100, 2), (1000, 25), (4000, 100)])
def test_default_warm_up_is_two_and_a_half_percent(total: int, warmup: int) -> None:
    assert default_warmup(total) == warmup
    assert build_schedule(Options(), total).warmup_steps == warmup


@every_kind
def test_a_schedule_survives_json(kind: str) -> None:
    schedule = made(kind, None, 1000, lr=3e-4)
    assert Schedule(**json.loads(json.dumps(dataclasses.asdict(schedule)))) == schedule


@every_kind
def test_defaults_are_no_problem(kind: str) -> None:
    for total in (None, 1, 2, 1000):
        assert schedule_problems(Options(lr_schedule=kind), total) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr": -1.0}, ["--lr"]),
        ({"warmup_steps": -1}, ["--warmup_steps"]),
        ({"min_lr_ratio": 1.5, "decay_ratio": -0.1}, ["--min_lr_ratio", "--decay_ratio"]),
        ({"min_lr_ratio": math.nan}, ["--min_lr_ratio"]),
        ({"lr_schedule": "infinite", "min_lr_ratio": 0.6}, ["--constant_lr_ratio 0.5 is below"]),
        ({"lr_schedule": "infinite", "cooldown_ratio": 0.0}, ["give --warmup_steps 0"]),
        (
            {"lr_schedule": "infinite", "cooldown_ratio": 0.7, "decay_ratio": 0.4},
            ["--cooldown_ratio 0.7 + --decay_ratio 0.4 is more than the whole run"],
        ),
    ],
)
def test_problems_are_named(flags: dict[str, float], said: list[str]) -> None:
    found = schedule_problems(Options(**flags))
    assert len(found) == len(said)
    for text, problem in zip(said, found, strict=True):
        assert text in problem


def test_what_belongs_to_another_schedule_is_no_problem() -> None:
    flags = {"cooldown_ratio": 0.9, "decay_ratio": 0.9, "constant_lr_ratio": 0.0}
    assert schedule_problems(Options(lr_schedule="wsd", **flags)) == []


@pytest.mark.parametrize(
    ("kind", "warmup", "fits"),
    [("cosine", 100, True), ("cosine", 101, False), ("wsd", 90, True), ("wsd", 91, False)],
)
def test_phases_have_to_fit_in_the_run_where_its_length_is_known(
    kind: str, warmup: int, fits: bool
) -> None:
    options = Options(lr_schedule=kind, warmup_steps=warmup)
    assert schedule_problems(options) == []
    found = schedule_problems(options, 100)
    assert found == [] if fits else "more than the run's 100 steps" in found[0]
