"""A dataset's figures and rows as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama.dataset.inspection.figures import Target, bins, share
from colossal_llama.dataset.inspection.grids import grids, heading
from colossal_llama.dataset.inspection.rows import ShownRow, document_title, title
from colossal_llama.tokenizer.analysis_format import percent, visible

_TEMPLATE = Path(__file__).with_name("page.html")
_MOST_PARTS, _MOST_CATEGORIES = 500, 30  # a browser has to draw them


def render(target: Target, part: str, rows: Sequence[ShownRow], note: str) -> str:
    """The page's HTML. Names and text from the dataset are escaped.

    Args:
        target: the dataset, or the part.
        part: the part that ``rows`` are of.
        rows: what is shown as text.
        note: why there are no rows.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    manifest = target.manifest
    return template.render(
        name=visible(target.path.resolve().name),
        heading=heading(target),
        grids=grids(target, _MOST_PARTS, _MOST_CATEGORIES),
        mixture=_mixture(target) if target.whole else [],
        charts=_charts(target) if target.whole else [],
        part=part,
        rows=[
            {
                "title": title(row),
                "documents": [(document_title(found), found.stretches) for found in row.shown],
            }
            for row in rows
        ],
        note=note,
        settings=json.dumps(manifest.settings, ensure_ascii=False, indent=2),
        chat_template=manifest.chat_template or "",
    )


def _mixture(target: Target) -> list[tuple[str, float]]:
    """(category, share of the training tokens) of every category that has any."""
    counts = target.manifest.categories
    tokens = sum(count.training_tokens for count in counts.values())
    shares = {name: share(count.training_tokens, tokens) for name, count in counts.items()}
    return [(visible(name), part) for name, part in shares.items() if part]


def _charts(target: Target) -> list[dict[str, Any]]:
    """A bar per training part for every category, in per cent of the category's largest bin."""
    names = list(target.training_parts())[:_MOST_PARTS]
    charts = []
    for found in bins(target):
        most = found.most or 1
        bars = [
            (f"{100 * tokens / most:.2f}", f"{visible(name)}: {tokens:,} tokens")
            for name, tokens in zip(names, found.tokens, strict=False)
        ]
        charts.append(
            {
                "category": visible(found.category),
                "bars": bars,
                "mean": f"{100 * found.mean / most:.2f}",
                "summary": f"{found.fewest:,} to {found.most:,} tokens",
            }
        )
    return charts
