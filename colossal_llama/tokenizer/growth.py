"""A tokenizer extended by pieces of falling importance, with what each number of them gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama.storage import atomic_directory
from colossal_llama.tokenizer import compression, extension_report
from colossal_llama.tokenizer.corpus import EvenSample
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.extension import Extension, extend
from colossal_llama.tokenizer.piece_list import SPACE


@dataclass(frozen=True)
class Growth:
    """What a tokenizer gets."""

    pieces: list[str]  # in its spelling, most important first
    symbols: Sequence[str] = ()
    scores: Mapping[str, float] | None = None
    # Merges of its own pieces need no repair; the few that another split of the same piece
    # keeps from being produced are left out.
    on_unreachable: str = "drop"
    report: dict[str, Any] = field(default_factory=dict)


def write_grown(
    source: ExtensibleTokenizer,
    growth: Growth,
    held_out: EvenSample,
    target: Path,
    *,
    overwrite: bool,
) -> str:
    """Writes the extended tokenizer, its report, ``pieces.jsonl`` and the compression curve.

    Returns:
        A summary for the terminal.

    Raises:
        DataError: some pieces stay out of reach.
    """
    whole = _extended(source, growth, growth.pieces)
    gone = set(whole.dropped)
    listed = [source.text(piece) for piece in growth.pieces if piece not in gone]

    def fast(count: int) -> dict[str, Any]:
        first = [piece for piece in growth.pieces[:count] if piece not in gone]
        if growth.on_unreachable == "repair":  # a shorter list needs other repairs
            return _extended(source, growth, first).tokenizer.fast
        return source.extended(first, scores=growth.scores, symbols=growth.symbols).fast

    numbers = compression.sizes(len(growth.pieces))
    points = compression.curve(fast, numbers, held_out)
    report = {**extension_report.describe(source, whole), **growth.report}
    with atomic_directory(target, overwrite=overwrite) as temporary:
        extension_report.write_into(whole, report, temporary)
        # A cut character is no text: whoever adds the list elsewhere gets these steps by repair.
        texts = (text.replace(" ", SPACE) for text in listed if "\ufffd" not in text)
        extension_report.write_pieces(temporary, texts)
        compression.write(points, held_out, "new pieces", temporary)
    return "\n".join(
        [extension_report.summary(target, report), compression.table(points, "new pieces")]
    )


def _extended(source: ExtensibleTokenizer, growth: Growth, pieces: list[str]) -> Extension:
    return extend(
        source,
        pieces,
        scores=growth.scores,
        symbols=growth.symbols,
        on_unreachable=growth.on_unreachable,
    )
