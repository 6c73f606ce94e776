"""How far a text shrinks with the number of new pieces, so that the number can be chosen."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colossal_llama.storage import write_json
from colossal_llama.tokenizer.corpus import EvenSample
from colossal_llama.tokenizer.fast_tokenizer import load

CURVE = "compression_curve.json"
CHART = "compression_curve.svg"


@dataclass(frozen=True)
class Point:
    """The compression with the first ``pieces`` of the list."""

    pieces: int
    bytes_per_token: float  # UTF-8 bytes, special tokens not counted; higher is better
    gain_per_1000: float | None  # in bytes per token since the point before, per 1,000 pieces


def sizes(total: int) -> list[int]:
    """0, then about eight numbers up to ``total``, each about twice the one before.

    Rounded to two digits, so that a user can say one.
    """
    found = {0, total}
    part = total // 2
    while part >= 10 and part * 200 > total:
        digits = 10 ** (len(str(part)) - 2)
        found.add(part // digits * digits)
        part //= 2
    return sorted(found)


def curve(
    tokenizer_of: Callable[[int], dict[str, Any]], numbers: Sequence[int], held_out: EvenSample
) -> list[Point]:
    """Bytes per token on ``held_out`` for each of ``numbers`` of pieces, rising.

    Args:
        tokenizer_of: the content of tokenizer.json with the first so many pieces.
        numbers: of pieces.
        held_out: some text.
    """
    from tqdm import tqdm

    points = list[Point]()
    if not held_out.bytes:  # no documents, or only empty ones
        return points
    for number in tqdm(numbers, desc="measuring", unit=" sizes", delay=1):
        encodings = load(tokenizer_of(number)).encode_batch_fast(
            held_out.texts, add_special_tokens=False
        )
        ratio = held_out.bytes / sum(map(len, encodings))
        gain = None
        if points:
            more = number - points[-1].pieces
            gain = (ratio - points[-1].bytes_per_token) / more * 1000
        points.append(Point(number, ratio, gain))
    return points


def table(points: Sequence[Point], what: str) -> str:
    """The curve for the terminal."""
    if not points:
        return "no held-out text to measure on: give --heldout_input_dirs, or 50 documents or more"
    rows = [f"{what:>12}  bytes per token  gain per 1,000"]
    for point in points:
        gain = "" if point.gain_per_1000 is None else f"{point.gain_per_1000:.4f}"
        rows.append(f"{point.pieces:>12,}  {point.bytes_per_token:>15.3f}  {gain:>14}")
    return "\n".join(rows)


def write(points: Sequence[Point], held_out: EvenSample, what: str, target: Path) -> None:
    """Writes ``compression_curve.json`` and its chart into ``target``; nothing for no points."""
    if not points:
        return
    measured_on = {"documents": len(held_out.texts), "bytes": held_out.bytes}
    write_json(
        target / CURVE,
        {"counted": what, "held_out": measured_on, "points": [asdict(point) for point in points]},
    )
    (target / CHART).write_text(_svg(points, what), encoding="utf-8")


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 640, 360, 60, 50, 20


def _svg(points: Sequence[Point], what: str) -> str:
    """A line through the points, each marked with its numbers."""
    last = max(point.pieces for point in points) or 1
    ratios = [point.bytes_per_token for point in points]
    low, span = min(ratios), (max(ratios) - min(ratios)) or 1.0
    places = [
        (
            _LEFT + (_WIDTH - _LEFT - _MARGIN) * point.pieces / last,
            _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 2 * _MARGIN) * (ratio - low) / span,
        )
        for point, ratio in zip(points, ratios, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{point.pieces:,}: '
        f"{point.bytes_per_token:.3f}</title></circle>"
        for point, (x, y) in zip(points, places, strict=True)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="16">bytes per token</text>',
            f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 8}" text-anchor="end">'
            f"{html.escape(what)}</text>",
            f'<path d="M{_LEFT},{_MARGIN} V{_HEIGHT - _BOTTOM} H{_WIDTH - _MARGIN}" '
            'fill="none" stroke="#888"/>',
            f'<polyline points="{line}" fill="none" stroke="#2a6fb0" stroke-width="2"/>',
            *marks,
            *_labels(points, places),
            "</svg>",
            "",
        ]
    )


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[str]:
    """Numbers below the axis where there is room for them; beside it those of the two ends."""
    texts, free = list[str](), float(_WIDTH)
    for point, (x, _) in zip(points[::-1], places[::-1], strict=True):
        if x < free:
            where = f'x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle"'
            texts.append(f"<text {where}>{point.pieces:,}</text>")
            free = x - 50
    for point, (_, y) in ((points[0], places[0]), (points[-1], places[-1])):
        where = f'x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end"'
        texts.append(f"<text {where}>{point.bytes_per_token:.2f}</text>")
    return texts
