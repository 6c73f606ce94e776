"""Curves from the logs of runs: smoothed, thinned out, and sorted into panels."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from colossal_llama.training.plotting.run_logs import Run, Stage, number

MOST_POINTS = 2000  # of a curve: about what a screen has columns
MOST_CATEGORIES = 12

LOSS, BITS = "loss", "bits per byte"
_OTHERS = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
_NOISY = {"grad_norm", "tokens_per_second"}
_UNITS = {LOSS: "nats per token", BITS: "held-out text", "gradient norm": "before clipping"}
# How an evaluation may call what it measured; in one mapping the first one counts.
_LOSSES = ("loss_per_token", "loss", "loss_by_category")
_BITS = ("bits_per_byte", "bits_per_byte_by_category")


@dataclass(frozen=True)
class Points:
    """A line: ``y`` is None where it is broken. ``step`` is the number of the step in its stage."""

    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)
    step: list[int] = field(default_factory=list)

    def extend(self, more: Points) -> None:
        """Goes on with ``more`` after a break."""
        if self.x and more.x:
            self.x.append(more.x[0])
            self.y.append(None)
            self.step.append(more.step[0])
        self.x.extend(more.x)
        self.y.extend(more.y)
        self.step.extend(more.step)

    def values(self) -> list[float]:
        """The numbers among ``y``."""
        return [value for value in self.y if value is not None]

    def alone(self) -> list[int]:
        """Places of the values without a neighbour, which make no line: a stage of one step."""
        padded = [None, *self.y, None]
        around = zip(padded, self.y, padded[2:], strict=False)
        return [
            place
            for place, (before, value, after) in enumerate(around)
            if value is not None and before is None and after is None
        ]


@dataclass
class Curve:
    """One run's line in a panel, its raw values behind it, and its evaluations as markers."""

    run: int
    line: Points = field(default_factory=Points)
    raw: Points = field(default_factory=Points)
    markers: Points = field(default_factory=Points)


@dataclass
class Panel:
    """One picture; all its curves share a scale.

    Args:
        title: what is measured.
        unit: a word on how.
        trimmed: whether the few least and greatest values of its lines may leave the frame.
        curves: by the run's number.
    """

    title: str
    unit: str = ""
    trimmed: bool = False
    curves: dict[int, Curve] = field(default_factory=dict)

    def curve(self, run: int) -> Curve:
        """The curve of a run, made if there is none."""
        return self.curves.setdefault(run, Curve(run))


def panels(runs: Sequence[Run], smoothing: float) -> list[Panel]:
    """The pictures of ``runs``, those first that are looked at first; none without a number."""
    found = {LOSS: Panel(LOSS, _UNITS[LOSS])}
    for which, run in enumerate(runs):
        for stage in run.stages:
            _add_losses(found, which, stage, smoothing)
            _add_evaluations(found, which, stage)
    for key, title in _OTHERS.items():
        panel = found[title] = Panel(title, _UNITS.get(title, ""), trimmed=key in _NOISY)
        for which, run in enumerate(runs):
            for stage in run.stages:
                values = [number(record.get(key)) for record in stage.steps]
                _add(panel.curve(which), stage, values, smoothing if key in _NOISY else 0.0)
    return [panel for panel in sorted(found.values(), key=_rank) if _has_numbers(panel)]


def _rank(panel: Panel) -> tuple[int, str]:
    """The whole before its categories, losses before bits per byte, the others last."""
    if panel.title in _OTHERS.values():
        return 4 + list(_OTHERS.values()).index(panel.title), ""
    metric, _, category = panel.title.partition(": ")
    return (metric == BITS) + 2 * bool(category), category


def _has_numbers(panel: Panel) -> bool:
    curves = panel.curves.values()
    return any(curve.line.x or curve.raw.x or curve.markers.x for curve in curves)


def _panel(found: dict[str, Panel], metric: str, category: str) -> Panel | None:
    """The panel of a category; None for one category too many."""
    title = f"{metric}: {category}" if category else metric
    if title not in found:
        if sum(name.startswith(f"{metric}: ") for name in found) == MOST_CATEGORIES and category:
            return None
        found[title] = Panel(title, _UNITS[metric])
    return found[title]


def _add_losses(found: dict[str, Panel], which: int, stage: Stage, smoothing: float) -> None:
    """The training loss, and that of each category."""
    # A step that was left out taught nothing, and often its loss is what was wrong with it: it
    # is shown, but does not bend the line.
    keep = [not record.get("skipped") for record in stage.steps]
    losses = [number(record.get("loss")) for record in stage.steps]
    _add(found[LOSS].curve(which), stage, losses, smoothing, keep)
    by_category: list[dict[str, Any]] = [
        record.get("loss_by_category") or {} for record in stage.steps
    ]
    for name in dict.fromkeys(itertools.chain.from_iterable(by_category)):
        panel = _panel(found, LOSS, name)
        if panel is not None:
            values = [number(losses.get(name)) for losses in by_category]
            _add(panel.curve(which), stage, values, smoothing, keep)


def _add(
    curve: Curve,
    stage: Stage,
    values: list[float | None],
    smoothing: float,
    keep: Sequence[bool] = (),
) -> None:
    """Adds a stage's values to a curve: smoothed as its line, and as they are behind it."""
    if smoothing:
        kept = keep or [True] * len(values)
        used = [value if is_kept else None for value, is_kept in zip(values, kept, strict=True)]
        curve.line.extend(_thin(stage, smooth(used, smoothing), MOST_POINTS // 2))
        curve.raw.extend(_thin(stage, values))
    else:
        curve.line.extend(_thin(stage, values))


def smooth(values: Sequence[float | None], smoothing: float) -> list[float | None]:
    """The exponential mean of the values up to each one; None where there is no value.

    Divided by the sum of its weights, so that the first values do not pull it to zero (the
    correction of Kingma and Ba 2015, section 3).
    """
    found: list[float | None] = []
    total = weights = 0.0
    for value in values:
        if value is None:
            found.append(None)
            continue
        total = smoothing * total + (1 - smoothing) * value
        weights = smoothing * weights + (1 - smoothing)
        found.append(total / weights)
    return found


def _thin(stage: Stage, values: Sequence[float | None], most: int = MOST_POINTS) -> Points:
    """The points with a value; of many, the least and the greatest of each stretch."""
    points = [(value, place) for place, value in enumerate(values) if value is not None]
    if len(points) > most:
        size = math.ceil(len(points) / (most // 2))
        stretches = (points[start : start + size] for start in range(0, len(points), size))
        extremes = {extreme for part in stretches for extreme in (min(part), max(part))}
        points = sorted(extremes, key=lambda point: point[1])
    return Points(
        [stage.x[place] for _, place in points],
        [value for value, _ in points],
        [stage.steps[place]["step"] for _, place in points],
    )


def _add_evaluations(found: dict[str, Panel], which: int, stage: Stage) -> None:
    steps = [record["step"] for record in stage.steps]
    markers: dict[tuple[str, str], Points] = {}
    for record in stage.evaluations:
        place = bisect.bisect_right(steps, record["step"]) - 1
        # Before the first step that there is: at the beginning, unless the log begins later.
        before = stage.start if steps[0] == 1 else stage.x[0]
        for metric, category, value in _measured(record):
            points = markers.setdefault((metric, category), Points())
            points.x.append(stage.x[place] if place >= 0 else before)
            points.y.append(value)
            points.step.append(record["step"])
    for (metric, category), points in markers.items():
        panel = _panel(found, metric, category)
        if panel is not None:
            panel.curve(which).markers.extend(points)


def _measured(
    record: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, float]]:
    """(LOSS or BITS, category or "", value) of all that an evaluation measured.

    Knows ``{"loss": 2}``, ``{"loss_by_category": {"zh": 2}}`` and
    ``{"categories": {"zh": {"loss": 2}}}`` by whatever name the mapping of categories has.
    """
    for metric, names in ((LOSS, _LOSSES), (BITS, _BITS)):
        figures = [number(record[name]) for name in names if name in record]
        first = next((figure for figure in figures if figure is not None), None)
        if first is not None:
            yield metric, path[-1] if path else "", first
    for name, value in record.items():
        if not isinstance(value, Mapping):
            continue
        metric = LOSS if name in _LOSSES else BITS if name in _BITS else ""
        if metric:
            for category, measured in value.items():
                if (figure := number(measured)) is not None:
                    yield metric, category, figure
        else:
            yield from _measured(value, (*path, name))


def limits(panel: Panel) -> tuple[float, float]:
    """The scale of a panel: lines and markers fit in, and of the raw values all but few.

    One spike of the gradient norm would else leave nothing to be seen of the rest.
    """
    values: list[float] = []
    for curve in panel.curves.values():
        values += _middle(curve.raw) + curve.markers.values()
        values += _middle(curve.line) if panel.trimmed else curve.line.values()
    least, most = min(values), max(values)
    margin = (most - least) * 0.04 or abs(most) * 0.04 or 1.0
    return least - margin, most + margin


def _middle(points: Points) -> list[float]:
    """The values but the least and the greatest fiftieth."""
    values = sorted(points.values())
    cut = len(values) // 50
    return values[cut : len(values) - cut]
