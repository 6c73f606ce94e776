"""Draws the curves of runs: loss, evaluations, learning rate, gradient norm, speed.

    colossal-llama plot runs/first runs/second
    colossal-llama plot runs/chinese --x hours --smoothing 0.98 --output chinese.png

A run is a directory with ``metrics.jsonl``, or one with such directories in it, which are drawn
one after the other as its stages. A run may be drawn while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.command import option
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training.plotting.run_logs import AXES, Run, read_runs

if TYPE_CHECKING:
    from colossal_llama.training.plotting.curves import Panel

_UNITS = {
    "tokens": (("billion tokens", 1e9), ("million tokens", 1e6), ("thousand tokens", 1e3)),
    "steps": (),
    "hours": (("hours", 1.0), ("minutes", 1 / 60)),
}


@dataclass
class PlotOptions:
    """Draw the curves of one or several runs, as a page (.html) or a picture (.png)."""

    run_dirs: list[Path] = option(
        help="directories of runs (--save_dir), or of recipes", positional=True
    )
    output: Path = option(
        Path("plot.html"), help="what to write: a page that opens in any browser, or a .png"
    )
    x: str = option("tokens", help="what the curves are drawn over", choices=AXES)
    smoothing: float = option(
        0.9, help="weight of the past in the mean that is drawn, 0.0 (none) to 0.99"
    )
    overwrite: bool = option(False, help="replace the output if it exists")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if self.output.suffix not in (".html", ".png"):
            found.append(f"--output {self.output}: the name must end in .html or .png")
        if not 0 <= self.smoothing <= 0.99:
            found.append("--smoothing must be from 0.0 to 0.99")
        return found


def plot(options: PlotOptions) -> None:
    """Writes the curves of the runs and says where.

    Raises:
        DataError: a directory holds no run, or the output exists.
        UsageError: matplotlib, which draws the .png, is not installed.
    """
    from colossal_llama.storage import atomic_file, refuse_existing
    from colossal_llama.training.plotting.curves import panels

    if options.output.is_dir():
        raise DataError(f"{options.output} is a directory; give the name of a file")
    refuse_existing(options.output, overwrite=options.overwrite)
    runs = read_runs(options.run_dirs, options.x)
    found = panels(runs, options.smoothing)
    if not found:
        raise DataError(f"{options.run_dirs[0]}: no number to draw in its log")
    unit = unit_of(runs, options.x)
    if options.output.suffix == ".png":
        content = _picture(runs, found, unit)
    else:
        from colossal_llama.training.plotting.page import render

        content = render(runs, found, unit, options.smoothing).encode("utf-8")
    with atomic_file(options.output) as temporary:
        temporary.write_bytes(content)
    print(f"{options.output} written")


def _picture(runs: Sequence[Run], found: Sequence[Panel], unit: tuple[str, float]) -> bytes:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            ["--output *.png needs matplotlib: pip install matplotlib, or write a .html"]
        ) from None
    from colossal_llama.training.plotting.picture import draw

    return draw(runs, found, unit)


def unit_of(runs: Sequence[Run], axis: str) -> tuple[str, float]:
    """Name and size of the largest unit of which the longest run has at least one."""
    longest = max(run.stages[-1].x[-1] for run in runs)
    for name, size in _UNITS[axis]:
        if longest >= size:
            return name, size
    return _UNITS[axis][-1] if axis == "hours" else (axis, 1.0)
