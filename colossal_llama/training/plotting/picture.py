"""Curves as a PNG, for papers and for places where no page can be opened."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from colossal_llama.training.plotting.curves import Curve, Panel, limits
from colossal_llama.training.plotting.page import colour
from colossal_llama.training.plotting.run_logs import Mark, Run, marks


def draw(runs: Sequence[Run], panels: Sequence[Panel], unit: tuple[str, float]) -> bytes:
    """The PNG's bytes; the same for the same logs.

    Args:
        runs: whose curves they are.
        panels: the curves.
        unit: name and size of the unit of the horizontal axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is a "$"
        return _draw(runs, panels, unit)


def _draw(runs: Sequence[Run], panels: Sequence[Panel], unit: tuple[str, float]) -> bytes:
    from matplotlib import pyplot

    # The first panel takes a row, the others share one two by two.
    rows = 1 + math.ceil((len(panels) - 1) / 2)
    figure = pyplot.figure(figsize=(12, 3 * rows + 0.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    for place, panel in enumerate(panels):
        cell = grid[(place + 1) // 2, (place + 1) % 2] if place else grid[0, :]
        _draw_panel(figure.add_subplot(cell), panel, runs, unit)
    lines = [pyplot.Line2D([], [], color=colour(place)) for place in range(len(runs))]
    names = [run.name for run in runs]
    figure.legend(lines, names, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    stream = io.BytesIO()
    # Without matplotlib's version in it, the same figures give the same bytes.
    figure.savefig(stream, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def _draw_panel(axis: Any, panel: Panel, runs: Sequence[Run], unit: tuple[str, float]) -> None:
    name, size = unit
    low, high = limits(panel)
    for place, curve in panel.curves.items():
        _draw_curve(axis, curve, colour(place), size)
        if len(runs[place].stages) > 1:
            _draw_stages(axis, runs[place], colour(place), size, named=panel.title == "loss")
        if panel.title.startswith("loss"):
            _draw_marks(axis, marks(runs[place]), colour(place), size)
    axis.set_ylim(low, high)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_ylabel(panel.unit, fontsize=8)
    axis.set_xlabel(name, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(axis: Any, curve: Curve, paint: str, size: float) -> None:
    for points, width, alpha in ((curve.raw, 0.6, 0.3), (curve.line, 1.5, 1.0)):
        x = [place / size for place in points.x]
        y = [math.nan if value is None else value for value in points.y]
        axis.plot(x, y, color=paint, linewidth=width, alpha=alpha)
        alone = points.alone()
        axis.plot([x[n] for n in alone], [y[n] for n in alone], color=paint, linestyle="",
                  marker=".", alpha=alpha)  # fmt: skip
    x = [place / size for place in curve.markers.x]
    y = [math.nan if value is None else value for value in curve.markers.y]
    axis.plot(x, y, color=paint, linewidth=0.8, linestyle="--", marker="o", markersize=4,
              markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip


def _draw_stages(axis: Any, run: Run, paint: str, size: float, *, named: bool) -> None:
    """A line where each stage begins; the axis reaches to the first, so that its name is inside."""
    for stage in run.stages:
        axis.axvline(stage.start / size, color=paint, linewidth=0.8, linestyle=":")
        if named:  # upright, so that the names of short stages do not run into each other
            axis.annotate(
                stage.name, (stage.start / size, 1), xycoords=("data", "axes fraction"),
                xytext=(2, -4), textcoords="offset points", rotation=270, va="top", fontsize=7,
                color=paint,
            )  # fmt: skip


def _draw_marks(axis: Any, found: Sequence[Mark], paint: str, size: float) -> None:
    """Small triangles along the bottom, wherever that is."""
    x, y = [mark.x / size for mark in found], [0.02] * len(found)
    bottom = axis.get_xaxis_transform()
    axis.plot(x, y, transform=bottom, color=paint, linestyle="", marker="^", markersize=4)
