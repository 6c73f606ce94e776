"""An analysis as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colossal_llama.tokenizer.analysis import Analysis, TokenizerFigures, tokens_of
from colossal_llama.tokenizer.analysis_format import (
    count,
    difference,
    per_half,
    percent,
    shortened,
    splits,
    unreachable_count,
    visible,
)

_TEMPLATE = Path(__file__).with_name("analysis_page.html")
_MOST_FILES = 12
_EXAMPLES = 40
# The grid's colours; four stands for four and more, zero for a character that is unknown.
_MOST_TOKENS = 4
_LEVELS = {
    "level1": ("Level 1", "everyday use"),
    "level2": ("Level 2", "publishing"),
    "level3": ("Level 3", "names, terms"),
}


def render(analysis: Analysis) -> str:
    """The page's HTML. Text from tokenizers and files is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=count, percent=percent, visible=visible, shortened=shortened, bar=_bar
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        analysis=analysis,
        rows=[_row(analysis, figures) for figures in analysis.tokenizers],
        levels=_LEVELS,
        documents=sum(file.documents for file in analysis.files),
        megabytes=sum(file.bytes for file in analysis.files) / 1e6,
        charts=_charts(analysis),
        files_left_out=max(0, len(analysis.files) - _MOST_FILES),
        grid=_grid(analysis),
        most_tokens=_MOST_TOKENS,
        sentence=visible(analysis.sentence),
        splits=[split for figures in analysis.tokenizers for split in splits(figures)],
    )


def _row(analysis: Analysis, figures: TokenizerFigures) -> dict[str, Any]:
    """What the tables say of one tokenizer."""
    total = {
        name: sum(getattr(file, name) for file in analysis.files)
        for name in ("bytes", "characters", "documents")
    }
    tokens, main, found = tokens_of(figures.main), figures.main, figures.agreement
    unreachable = {n: count(unreachable_count(half)) for n, half in figures.halves.items()}
    bytes_per_token = {
        n: f"{total['bytes'] / tokens_of(half):.2f}" for n, half in figures.halves.items()
    }
    return {
        "figures": figures,
        "is_baseline": figures is analysis.baseline,
        "tokens": tokens,
        "bytes_per_token": per_half(figures, bytes_per_token),
        "compression": analysis.compression(figures),
        "tokens_per_character": tokens / total["characters"],
        "tokens_per_document": tokens / total["documents"],
        "coverage": {level: figures.coverage(level) for level in analysis.characters},
        "unreachable": per_half(figures, unreachable),
        "unused": 1 - main.used / main.producible if main.producible else 0.0,
        "alike": found.identical / found.documents if found else None,
        "difference": difference(figures),
        "examples": {
            name: half.unreachable[:_EXAMPLES]
            for name, half in figures.halves.items()
            if half.unreachable
        },
    }


def _charts(analysis: Analysis) -> list[dict[str, Any]]:
    """Bytes per token, for all text and per file."""
    places: list[int | None] = [*range(len(analysis.files))][:_MOST_FILES]
    if len(analysis.files) > 1:
        places = [None, *places]
    charts = []
    for place in places:
        files = analysis.files if place is None else [analysis.files[place]]
        size = sum(file.bytes for file in files)
        values = []
        for figures in analysis.tokenizers:
            tokens = tokens_of(figures.main, place)
            values.append(size / tokens if tokens else 0.0)
        charts.append({"title": "all text" if place is None else files[0].name, "values": values})
    return charts


def _grid(analysis: Analysis) -> dict[str, Any]:
    """The page's script gets the characters once and one digit per character and tokenizer."""
    return {
        "levels": {level: "".join(found) for level, found in analysis.characters.items()},
        "tokenizers": [
            {
                "name": figures.name,
                "counts": {
                    level: "".join(str(min(number, 9)) for number in counts)
                    for level, counts in figures.character_tokens.items()
                },
            }
            for figures in analysis.tokenizers
        ],
        "most": _MOST_TOKENS,
    }


def _bar(value: float, largest: float) -> str:
    """A bar's width in percent."""
    return f"{100 * value / largest:.1f}" if largest else "0"
