"""The report and the marks, from fabricated figures."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.demo.figures import environment, marks
from colossal_llama.demo.plan import MODELS, TRAINED
from colossal_llama.demo.report import CATEGORIES, smooth, summary, write_report
from colossal_llama.demo.samples import PROMPTS

pytest.importorskip("matplotlib")
EVIL = "<script>alert('x')</script> & 你好"


def evaluation(compression: float, bits: float) -> dict[str, Any]:
    return {
        "documents": 12,
        "bytes": 34_567,
        "tokens": 7_000,
        "windowed": 1,
        "bytes_per_token": compression,
        "loss_per_token": 5.0,
        "bits_per_byte": bits,
    }


def fabricate() -> dict[str, Any]:
    """Figures in which no number occurs twice."""
    evaluations = {
        model: {
            category: evaluation(1.01 + i + 0.1 * j, 2.345 + i + 0.211 * j)
            for j, category in enumerate(CATEGORIES)
        }
        for i, model in enumerate(MODELS)
    }
    verification = {"first_loss": {"training": 6.001, "transformers": 6.002}, "parameters": {}}
    return {
        "marks": marks(evaluations, verification),
        "models": [
            {"name": name, "title": title, "categories": evaluations[name]}
            for name, title in MODELS.items()
        ],
        "curves": {
            name: [{"tokens": 2048 * step, "loss": 7 - 0.1 * step} for step in range(1, 9)]
            for name in TRAINED
        },
        "samples": [
            {
                "model": model,
                "model_path": f"demo/{model}",
                "language": language,
                "prompt": prompt,
                "asked": f"Continue: {prompt}" if model == "sft" else prompt,
                "text": f"{model} says {EVIL}",
            }
            for model in MODELS
            for language, prompts in PROMPTS.items()
            for prompt in prompts
        ],
        "stages": [
            {
                "name": f"stage{i}",
                "title": f"title {i}",
                "command": f"python step_{i}.py --flag '<{i}>'",
                "fingerprint": "f" * 64,
                "seconds": 61.0 + i,
                "peak_rss_bytes": (200 + i) << 20,
                "kept": False,
            }
            for i in range(4)
        ],
        "seconds": 250.0,
        "peak_rss_bytes": 203 << 20,
        "parameters": {"base": 4_694_272},
        "environment": environment(),
    }


class Page(html.parser.HTMLParser):
    """The text of a page, its tags, and whether they nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []  # type: ignore[var-annotated]
        self.sources: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return fabricate()


@pytest.fixture(scope="module")
def page(figures: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_report(figures, tmp_path_factory.mktemp("report"))
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_every_figure_is_on_the_page(figures: dict[str, Any], page: Page) -> None:
    for model in figures["models"]:
        assert model["title"] in page.text
        for row in model["categories"].values():
            assert f"{row['bits_per_byte']:.3f}" in page.text
            assert f"{row['bytes_per_token']:.2f}" in page.text
    for stage in figures["stages"]:
        assert stage["command"] in page.text
        assert f"1 min {stage['seconds'] - 60:02.0f} s" in page.text
        assert f"{stage['peak_rss_bytes'] >> 20} MiB" in page.text
    for mark in figures["marks"]:
        assert mark["name"] in page.text
        assert mark["value"] in page.text
    for sample in figures["samples"]:
        assert sample["asked"] in page.text
        assert sample["text"] in page.text
    for name, value in figures["environment"].items():
        assert name in page.text
        assert value in page.text


def test_the_page_needs_nothing_beside_itself(page: Page) -> None:
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "link" not in page.tags


def test_what_a_model_says_does_not_become_part_of_the_page(page: Page) -> None:
    assert "script" not in page.tags
    assert EVIL in page.text


def test_json_and_plot_hold_the_same_run(figures: dict[str, Any], tmp_path: Path) -> None:
    write_report(figures, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == figures
    plot = (tmp_path / "loss.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss.png",
        "report.html",
        "report.json",
    ]


def test_the_terminal_shows_the_same_numbers(figures: dict[str, Any]) -> None:
    text = summary(figures)
    for model in figures["models"]:
        (line,) = [line for line in text.splitlines() if line.startswith(model["title"])]
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        rows = list(model["categories"].values())
        assert numbers[0::2] == pytest.approx([row["bytes_per_token"] for row in rows], abs=0.006)
        assert numbers[1::2] == pytest.approx([row["bits_per_byte"] for row in rows], abs=6e-4)


def test_smoothing_keeps_a_straight_line_and_the_length() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    line = [float(value) for value in range(101)]
    assert smooth(line)[10:-10] == pytest.approx(line[10:-10])
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


GOOD = {
    "base_zh": (1.0, 8.0),
    "base_en": (3.0, 2.0),
    "b_zh": (2.51, 6.39),
    "b_en": (3.0, 2.09),
    "first": (6.0, 6.05),
}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"b_zh": (2.51, 6.41)}, "Chinese bits"),
        ({"b_zh": (2.49, 6.0)}, "Chinese bytes"),
        ({"b_en": (3.0, 2.11)}, "English bits"),
        ({"first": (6.0, 6.07)}, "first loss"),
        ({"first": (6.07, 6.0)}, "first loss"),
    ],
)
def test_a_mark_is_missed_just_beyond_its_limit(change: dict[str, Any], missed: str | None) -> None:
    values = {**GOOD, **change}
    evaluations = {
        "base": {"zh": evaluation(*values["base_zh"]), "en": evaluation(*values["base_en"])},
        "stage-b": {"zh": evaluation(*values["b_zh"]), "en": evaluation(*values["b_en"])},
    }
    training, transformers = values["first"]
    verification = {
        "first_loss": {"training": training, "transformers": transformers},
        "parameters": {"a": 1},
    }
    names = [mark["name"] for mark in marks(evaluations, verification) if not mark["met"]]
    assert [name.startswith(str(missed)) for name in names] == ([] if missed is None else [True])
