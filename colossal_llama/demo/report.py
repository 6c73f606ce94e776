"""Draws the demo's report: one HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from colossal_llama.demo.plan import MODELS, TRAINED
from colossal_llama.storage import atomic_file, write_json

CATEGORIES = {"zh": "Chinese", "en": "English", "code": "code"}
_TEMPLATE = Path(__file__).with_name("report.html")
_COLOURS = ("#2563eb", "#7c3aed", "#db2777", "#ea580c")


def write_report(figures: dict[str, Any], out: Path) -> Path:
    """Writes ``report.html``, ``report.json`` and ``loss.png`` into ``out``.

    Args:
        figures: what ``figures.collect`` returned.

    Returns:
        The path of the HTML file.
    """
    from jinja2 import Environment, StrictUndefined

    plot = loss_plot(figures["curves"])
    with atomic_file(out / "loss.png") as temporary:
        temporary.write_bytes(plot)
    write_json(out / "report.json", figures)
    # Autoescape: what a model generates is not to become part of the page.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(duration=_duration, size=_size, one_line=_one_line)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(
        **figures,
        categories=CATEGORIES,
        titles=MODELS,
        largest_bits=largest_bits(figures),
        by_prompt=samples_by_prompt(figures["samples"]),
        plot="data:image/png;base64," + base64.b64encode(plot).decode("ascii"),
    )
    with atomic_file(out / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "report.html"


def loss_plot(curves: dict[str, list[dict[str, float]]]) -> bytes:
    """A PNG with one panel per trained stage: loss per token, in nats, over tokens seen.

    Thin: every step; bold: a running mean.

    The panels have scales of their own: vocabularies and texts differ between stages, so their
    losses per token cannot be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(12, 3), dpi=150, squeeze=False)
    for axis, colour, (name, steps) in zip(axes[0], _COLOURS, curves.items(), strict=True):
        tokens = [step["tokens"] / 1000 for step in steps]
        losses = [step["loss"] for step in steps]
        axis.plot(tokens, losses, color=colour, linewidth=0.8, alpha=0.35)
        axis.plot(tokens, smooth(losses), color=colour, linewidth=1.8)
        axis.set_title(TRAINED[name], fontsize=10)
        axis.set_xlabel("thousand tokens", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss per token (nats)", fontsize=8)
    figure.tight_layout()
    stream = io.BytesIO()
    # Without matplotlib's version in it, the same figures give the same bytes.
    figure.savefig(stream, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, over a tenth of them in all."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def largest_bits(figures: dict[str, Any]) -> float:
    """The longest bar of the table, in bits per byte."""
    return max(
        row["bits_per_byte"] for model in figures["models"] for row in model["categories"].values()
    )


def samples_by_prompt(samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The samples grouped by prompt, models in the order of their making."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        grouped.setdefault(sample["prompt"], []).append(sample)
    return grouped


def summary(figures: dict[str, Any]) -> str:
    """The report's main table and marks as text for a terminal."""
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in CATEGORIES.values())]
    lines.append(f"{'':24}" + f"{'bytes/token':>12}{'bits/byte':>10}" * len(CATEGORIES))
    for model in figures["models"]:
        cells = "".join(
            f"{model['categories'][category]['bytes_per_token']:>12.2f}"
            f"{model['categories'][category]['bits_per_byte']:>10.3f}"
            for category in CATEGORIES
        )
        lines.append(f"{model['title']:<24}{cells}")
    lines.append("")
    for mark in figures["marks"]:
        verdict = "reached" if mark["met"] else "MISSED"
        lines.append(f"{verdict:>8}  {mark['name']}: {mark['value']} (wanted: {mark['target']})")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ⏎ ", text.strip()) or "(nothing)"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
