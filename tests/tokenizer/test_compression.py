"""The curve by which a user chooses the number of pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from colossal_llama.tokenizer import compression
from colossal_llama.tokenizer.corpus import EvenSample
from colossal_llama.tokenizer.directory import read_tokenizer


@pytest.mark.parametrize("total", [0, 1, 9, 37, 100, 999, 20_000, 123_456])
def test_sizes(total: int) -> None:
    """From nothing to all, at most ten, each at most about twice the one before."""
    found = compression.sizes(total)
    assert (found[0], found[-1]) == (0, total)
    assert found == sorted(set(found))
    assert len(found) <= 10
    assert all(b <= 2.3 * a for a, b in pairwise(found[1:]))
    assert all(size % 10 ** (len(str(size)) - 2) == 0 for size in found[:-1] if size > 99)


def test_curve_is_what_the_tokenizers_give(small: Path, english: list[str], tmp_path: Path) -> None:
    source = read_tokenizer(small)
    pieces = ["▁▁▁", "qq", "▁the▁"]
    held_out = EvenSample(100_000)
    for text in english[:5]:
        held_out.add(text)
    points = compression.curve(
        lambda count: source.extended(pieces[:count]).fast, [0, 1, 3], held_out
    )
    for point in points:
        ids = source.extended(pieces[: point.pieces]).encode(held_out.texts)
        expected = sum(len(t.encode()) for t in held_out.texts) / sum(map(len, ids))
        assert point.bytes_per_token == pytest.approx(expected)
    assert points[0].gain_per_1000 is None
    more = points[2].bytes_per_token - points[1].bytes_per_token
    assert points[2].gain_per_1000 == pytest.approx(more / 2 * 1000)

    compression.write(points, held_out, "new <pieces>", tmp_path)
    written = json.loads((tmp_path / compression.CURVE).read_text(encoding="utf-8"))
    assert [point["pieces"] for point in written["points"]] == [0, 1, 3]
    assert written["held_out"] == {"documents": 5, "bytes": held_out.bytes}
    chart = ElementTree.fromstring((tmp_path / compression.CHART).read_text(encoding="utf-8"))
    assert len([element for element in chart if element.tag.endswith("circle")]) == 3
    assert len(compression.table(points, "new pieces").splitlines()) == 4


def test_nothing_to_measure_on(tmp_path: Path) -> None:
    blank = EvenSample(10)
    blank.add("")
    assert compression.curve(lambda count: {}, [0, 1], blank) == []
    points = compression.curve(lambda count: {}, [0, 1], EvenSample(10))
    compression.write(points, EvenSample(10), "new pieces", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "--heldout_input_dirs" in compression.table(points, "new pieces")
