"""An analysis as files: CSV for a spreadsheet, JSON for a program, a page for a person."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from colossal_llama.storage import write_json
from colossal_llama.tokenizer import analysis_page
from colossal_llama.tokenizer.analysis import Analysis, TokenizerFigures, tokens_of
from colossal_llama.tokenizer.analysis_format import unreachable_count

ALL = "(all)"


def write(analysis: Analysis, target: Path) -> None:
    """Writes analysis.csv, analysis.json and analysis.html into the directory ``target``."""
    rows = list(table(analysis))
    with (target / "analysis.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(target / "analysis.json", as_json(analysis))
    (target / "analysis.html").write_text(analysis_page.render(analysis), encoding="utf-8")


def table(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """One row per tokenizer and file, and one per tokenizer for all files ("(all)").

    What does not depend on the text is repeated in each row.
    """
    files: list[int | None] = [*range(len(analysis.files)), None]
    for figures in analysis.tokenizers:
        for place in files:
            yield {**_of_vocabulary(analysis, figures), **_of_text(analysis, figures, place)}


def _of_vocabulary(analysis: Analysis, figures: TokenizerFigures) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tokenizer": figures.name,
        "kind": figures.kind,
        "vocabulary_size": figures.size,
    }
    for level in analysis.characters:
        row[f"coverage_{level}"] = _rounded(figures.coverage(level))
    for name, half in (("slow", figures.slow), ("fast", figures.fast)):
        row[f"unreachable_{name}"] = unreachable_count(half) if half else None
    same = figures.agreement
    row["documents_compared"] = same.documents if same else None
    row["documents_identical"] = same.identical if same else None
    row["pieces"] = figures.main.producible
    row["unused_pieces"] = figures.main.producible - figures.main.used
    return row


def _of_text(analysis: Analysis, figures: TokenizerFigures, place: int | None) -> dict[str, Any]:
    files = analysis.files if place is None else [analysis.files[place]]
    size = {n: sum(getattr(f, n) for f in files) for n in ("documents", "characters", "bytes")}
    tokens = tokens_of(figures.main, place)
    fast = tokens_of(figures.fast, place) if figures.fast else None
    return {
        "file": ALL if place is None else files[0].name,
        **size,
        "tokens": tokens,
        "tokens_fast": fast,
        "bytes_per_token": _ratio(size["bytes"], tokens),
        "bytes_per_token_fast": _ratio(size["bytes"], fast),
        "compared_compression": _ratio(tokens, tokens_of(analysis.baseline.main, place)),
        "tokens_per_character": _ratio(tokens, size["characters"]),
        "tokens_per_document": _ratio(tokens, size["documents"]),
    }


def _ratio(above: int | None, below: int | None) -> float | None:
    return None if above is None or not below else _rounded(above / below)


def _rounded(value: float) -> float:
    return round(value, 6)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Everything measured, with the full lists of unreachable pieces."""
    return {
        "sentence": analysis.sentence,
        "baseline": analysis.baseline.name,
        "files": [{**asdict(file), "path": str(file.path)} for file in analysis.files],
        "tokenizers": [
            {
                "name": figures.name,
                "path": str(figures.path),
                **_of_vocabulary(analysis, figures),
                "fast_source": figures.fast_source,
                "first_difference": figures.agreement and figures.agreement.first_difference,
                "text": [
                    _of_text(analysis, figures, place)
                    for place in [*range(len(analysis.files)), None]
                ],
                "halves": {
                    name: {
                        "pieces": half.producible,
                        "pieces_used": half.used,
                        "unreachable": half.unreachable,
                        "split": [asdict(part) for part in half.split],
                    }
                    for name, half in figures.halves.items()
                },
                "characters_by_tokens": {
                    level: _by_tokens(analysis.characters[level], counts)
                    for level, counts in figures.character_tokens.items()
                },
            }
            for figures in analysis.tokenizers
        ],
    }


def _by_tokens(characters: list[str], counts: list[int]) -> dict[str, str]:
    """Number of tokens ("0" for unknown) -> the characters that take so many."""
    return {
        str(number): "".join(c for c, n in zip(characters, counts, strict=True) if n == number)
        for number in sorted(set(counts))
    }
