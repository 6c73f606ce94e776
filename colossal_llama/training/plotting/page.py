"""Curves as one HTML page that needs nothing beside itself: it draws its own inlined numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama.training.plotting.curves import BITS, LOSS, Panel, Points
from colossal_llama.training.plotting.run_logs import Run, marks, number, seconds

COLOURS = (
    *("#3b7dd8", "#d9822b", "#2f9e6e", "#b1467f"),
    *("#7a64c9", "#8a7a2f", "#3aa3b5", "#8f5a46"),
)
_TEMPLATE = Path(__file__).with_name("page.html")


def render(
    runs: Sequence[Run], panels: Sequence[Panel], unit: tuple[str, float], smoothing: float
) -> str:
    """The page's HTML. Names from the logs are escaped.

    Args:
        runs: whose curves they are.
        panels: the curves.
        unit: name and size of the unit of the horizontal axis.
        smoothing: how the lines were smoothed, for the caption.
    """
    from jinja2 import Environment, StrictUndefined

    axis, size = unit
    data = {
        "axis": axis,
        "runs": [_run(run, place, size) for place, run in enumerate(runs)],
        "panels": [_panel(panel, size) for panel in panels],
    }
    # In a script element "</script>" would end the data, and "<!--" would hide what follows.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        data=text,
        smoothing=smoothing,
        rows=[_row(run, place, panels) for place, run in enumerate(runs)],
    )


def colour(place: int) -> str:
    """The colour of a run."""
    return COLOURS[place % len(COLOURS)]


def _run(run: Run, place: int, size: float) -> dict[str, Any]:
    return {
        "name": run.name,
        "colour": colour(place),
        "stages": [[_short(stage.start / size), stage.name] for stage in run.stages],
        "marks": [[_short(mark.x / size), mark.step, mark.reason] for mark in marks(run)],
    }


def _panel(panel: Panel, size: float) -> dict[str, Any]:
    return {
        "title": panel.title,
        "unit": panel.unit,
        "trimmed": panel.trimmed,
        "curves": [
            {
                "run": curve.run,
                "line": _points(curve.line, size),
                "raw": _points(curve.raw, size)[:2],
                "markers": _points(curve.markers, size),
            }
            for curve in panel.curves.values()
        ],
    }


def _points(points: Points, size: float) -> list[list[Any]]:
    y = [None if value is None else _short(value, 5) for value in points.y]
    return [[_short(x / size) for x in points.x], y, points.step]


def _short(value: float, digits: int = 6) -> float:
    """As many digits as can be seen: the page is to stay small."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _row(run: Run, place: int, panels: Sequence[Panel]) -> dict[str, Any]:
    """A run's line of the table."""
    last = [stage.steps[-1] for stage in run.stages]
    steps = [step for stage in run.stages for step in stage.steps]
    curves = {panel.title: panel.curves.get(place) for panel in panels}
    loss, bits = curves.get(LOSS), curves.get(BITS)
    return {
        "name": run.name,
        "path": str(run.path),
        "colour": colour(place),
        "steps": f"{sum(record['step'] for record in last):,}",
        "tokens": f"{sum(number(record.get('tokens')) or 0 for record in last):,}",
        "time": _duration(sum(map(seconds, steps))),
        "loss": _last(loss.line if loss else None),
        "evaluation": _last(loss.markers if loss else None),
        "bits": _last(bits.markers if bits else None),
        "skipped": sum(bool(step.get("skipped")) for step in steps),
    }


def _last(points: Points | None) -> str:
    values = points.values() if points else []
    return f"{values[-1]:.4f}" if values else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
