"""Curves of runs: what is drawn of whole, resumed, broken and staged ones, and how."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from colossal_llama import cli, command
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training.plot import PlotOptions, plot, unit_of
from colossal_llama.training.plotting import picture
from colossal_llama.training.plotting.curves import MOST_POINTS, Panel, limits, panels, smooth
from colossal_llama.training.plotting.run_logs import marks, read_runs
from colossal_llama.training.reporting import RunLog

PNG = b"\x89PNG\r\n\x1a\n"


def record(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "tokens": 1000 * step, "tokens_per_second": 500.0,
        "learning_rate": 1e-4 / step, "grad_norm": 1.0, "seconds": 1.5, "seconds_between": 0.5,
        **more,
    }  # fmt: skip


def write_run(
    directory: Path,
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]] | None = None,
) -> Path:
    """A run's directory, with numbers as RunLog writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics", steps), ("evaluation", evaluations or [])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten steps of which two taught nothing, and three evaluations."""
    steps = [record(n, 10.0 - n, loss_by_category={"zh": 11.0 - n}) for n in range(1, 11)]
    steps[3].update(loss="nan", skipped="the loss is not finite", grad_norm=None)
    steps[3]["loss_by_category"] = {"zh": "nan"}
    steps[6].update(loss=50.0, skipped="a spike")
    evaluations = [
        {"step": step, "loss": 9.0, "bits_per_byte": 3.0, "documents": 7, "seconds": 1.0,
         "categories": {"zh": {"loss": 8.0, "bits_per_byte": 2.0}, "en": {"loss": 7.0}}}
        for step in (0, 5, 10)
    ]  # fmt: skip
    return write_run(tmp_path / "runs" / "first", steps, evaluations)


def draw(path: Path, axis: str = "steps", smoothing: float = 0.0) -> dict[str, Panel]:
    found = panels(read_runs([path], axis), smoothing)
    return {panel.title: panel for panel in found}


def page_data(path: Path) -> dict[str, Any]:
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    return json.loads(text)


def test_every_number_worth_seeing_has_a_panel(run: Path) -> None:
    found = draw(run)
    assert list(found) == [
        *("loss", "bits per byte", "loss: en", "loss: zh", "bits per byte: zh"),
        *("learning rate", "gradient norm", "tokens/s"),
    ]
    assert found["loss"].curves[0].line.step == [1, 2, 3, 5, 6, 7, 8, 9, 10], "4 is no number"
    assert found["gradient norm"].curves[0].line.step == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert found["loss"].curves[0].markers.y == [9.0] * 3
    assert found["bits per byte: zh"].curves[0].markers.y == [2.0] * 3
    assert found["loss: en"].curves[0].line.x == [], "it was only evaluated"


@pytest.mark.parametrize(
    ("axis", "line", "markers"),
    [
        ("steps", [1, 2, 3, 5], [0, 5, 10]),
        ("tokens", [1000, 2000, 3000, 5000], [0, 5000, 10000]),
        ("hours", [2 / 3600, 4 / 3600, 6 / 3600, 10 / 3600], [0, 10 / 3600, 20 / 3600]),
    ],
)
def test_axes(run: Path, axis: str, line: list[float], markers: list[float]) -> None:
    curve = draw(run, axis)["loss"].curves[0]
    assert curve.line.x[:4] == pytest.approx(line)
    assert curve.markers.x == pytest.approx(markers)


@pytest.mark.parametrize(
    "evaluation",
    [
        {"loss": 2.0, "loss_by_category": {"zh": 3.0}, "bits_per_byte_by_category": {"zh": 4.0}},
        {"loss": 2.0, "categories": {"zh": {"loss": 3.0, "bits_per_byte": 4.0}}},
        {"loss": 2.0, "zh": {"loss": 900.0, "loss_per_token": 3.0, "bits_per_byte": 4.0}},
    ],
)
def test_evaluations_are_known_by_their_names(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    write_run(tmp_path / "run", [record(1)], [{"step": 1, **evaluation}])
    found = draw(tmp_path / "run")
    assert found["loss"].curves[0].markers.y == [2.0]
    assert found["loss: zh"].curves[0].markers.y == [3.0]
    assert found["bits per byte: zh"].curves[0].markers.y == [4.0]


def test_a_mean_starts_at_the_first_value_and_skips_what_is_no_value() -> None:
    assert smooth([4.0, None, 4.0, 4.0], 0.9) == pytest.approx([4.0, None, 4.0, 4.0])
    found = smooth([1.0, 2.0], 0.5)
    assert found == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])
    assert smooth([1.0, 2.0], 0.0) == [1.0, 2.0]


def test_a_step_that_was_left_out_is_shown_but_does_not_bend_the_mean(run: Path) -> None:
    curve = draw(run, smoothing=0.9)["loss"].curves[0]
    assert 50.0 in curve.raw.y
    assert max(curve.line.values()) < 10
    assert 7 not in curve.line.step
    (read,) = read_runs([run], "steps")
    assert [(mark.step, mark.reason) for mark in marks(read)] == [
        (4, "skipped: the loss is not finite"),
        (7, "skipped: a spike"),
    ]


def test_a_run_that_went_on_from_elsewhere_begins_where_its_log_does(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [record(501), record(502)], [{"step": 500, "loss": 1.0}])
    curve = draw(tmp_path / "run", "tokens")["loss"].curves[0]
    assert curve.line.x == [501_000, 502_000]
    assert curve.markers.x == [501_000]


def test_steps_that_are_there_twice_count_once(tmp_path: Path) -> None:
    """As after a resume whose first process could not shorten the log."""
    steps = [record(1, 5.0), record(2, 4.0), record(3, 9.0), record(2, 3.0)]
    write_run(tmp_path / "run", steps)
    assert draw(tmp_path / "run")["loss"].curves[0].line.y == [5.0, 3.0, 9.0]


def test_what_a_resumed_run_logged_is_one_curve(tmp_path: Path) -> None:
    for first, last in ((1, 6), (4, 8)):
        log = RunLog(
            tmp_path / "run", tmp_path / "tb", [], first_step=first, total_steps=last,
            active=True, run_name="", config={},
        )  # fmt: skip
        for step in range(first, last + 1):
            log.log_step(record(step, math.nan if step == 5 else float(first)))
            log.log_evaluation({"step": step, "loss": 1.0})
        log.close()
    found = draw(tmp_path / "run")
    assert found["loss"].curves[0].line.step == [1, 2, 3, 4, 6, 7, 8]
    assert found["loss"].curves[0].line.y == [1.0] * 3 + [4.0] * 4
    assert found["loss"].curves[0].markers.step == list(range(1, 9))
    (mark,) = marks(read_runs([tmp_path / "run"], "steps")[0])
    assert (mark.step, mark.reason) == (5, "the loss is nan")


def test_stages_follow_one_another(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    write_run(recipe / "02-all", [record(n, 3.0) for n in (1, 2)], [{"step": 0, "loss": 3.0}])
    write_run(recipe / "01-embeddings", [record(n, 9.0) for n in (1, 2, 3)])
    write_run(recipe / "03-sft", [])
    (recipe / "notes").mkdir()
    (found,) = read_runs([recipe], "tokens")
    assert [(stage.name, stage.start) for stage in found.stages] == [
        ("01-embeddings", 0),
        ("02-all", 3000),
    ], "the third has not begun"
    curve = draw(recipe, "tokens", smoothing=0.9)["loss"].curves[0]
    assert curve.line.x == [1000, 2000, 3000, 4000, 4000, 5000]
    assert curve.line.y == pytest.approx([9.0, 9.0, 9.0, None, 3.0, 3.0]), "a mean of each"
    assert curve.line.step == [1, 2, 3, 1, 1, 2]
    assert curve.markers.x == [3000]


def test_many_steps_become_few_points_with_every_spike(tmp_path: Path) -> None:
    steps = [record(n, 2.0 + math.sin(n) / 10) for n in range(1, 10_001)]
    steps[1234]["loss"], steps[8888]["grad_norm"] = 7.0, 1e9
    for step in steps:
        step["loss_by_category"] = dict.fromkeys(("zh", "en", "code"), step["loss"])
    write_run(tmp_path / "run", steps)
    started = time.perf_counter()
    output = tmp_path / "plot.html"
    plot(PlotOptions([tmp_path / "run"], output))
    assert time.perf_counter() - started < 10  # an idle core needs half a second
    assert output.stat().st_size < 1_000_000
    found = draw(tmp_path / "run", smoothing=0.9)
    for panel in found.values():
        (curve,) = panel.curves.values()
        assert len(curve.line.x) <= MOST_POINTS
        assert len(curve.raw.x) <= MOST_POINTS
        assert curve.line.x == sorted(curve.line.x)
    assert 7.0 in found["loss"].curves[0].raw.y
    assert 1e9 in found["gradient norm"].curves[0].raw.y
    assert limits(found["gradient norm"])[1] < 10, "which would leave nothing to see of the rest"
    low, high = limits(found["loss"])
    assert low < 1.9 < 2.1 < high < 7.0


def test_units_are_those_of_the_longest_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [record(1)])
    write_run(tmp_path / "b", [record(2000)])
    paths = [tmp_path / "a", tmp_path / "b"]
    assert unit_of(read_runs(paths, "tokens"), "tokens") == ("million tokens", 1e6)
    assert unit_of(read_runs(paths[:1], "tokens"), "tokens") == ("thousand tokens", 1e3)
    assert unit_of(read_runs(paths, "steps"), "steps") == ("steps", 1.0)
    assert unit_of(read_runs(paths, "hours"), "hours") == ("minutes", 1 / 60)


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/run", "y/run", "z"):
        write_run(tmp_path / name, [record(1)])
    monkeypatch.chdir(tmp_path)
    names = [run.name for run in read_runs([Path("x/run"), Path("y/run"), Path("z")], "steps")]
    assert names == ["x/run", "y/run", "z"]
    monkeypatch.chdir(tmp_path / "z")
    assert read_runs([Path(".")], "steps")[0].name == "z"
    with pytest.raises(UsageError, match=r"\.\./z is given twice"):
        read_runs([Path("../z"), Path(".")], "steps")


def test_a_page_holds_its_numbers_and_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second", [record(1)])
    output = tmp_path / "plot.html"
    argv = ["plot", str(run), str(other), "--output", str(output), "--x", "steps"]
    assert cli.main(argv) == 0
    data = page_data(output)
    assert data["axis"] == "steps"
    assert [entry["name"] for entry in data["runs"]] == ["first", "second"]
    assert data["runs"][0]["marks"][1] == [7, 7, "skipped: a spike"]
    loss = data["panels"][0]
    assert (loss["title"], [curve["run"] for curve in loss["curves"]]) == ("loss", [0, 1])
    assert loss["curves"][0]["markers"] == [[0, 5, 10], [9, 9, 9], [0, 5, 10]]
    text = output.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<td>10</td><td>2</td><td>10,000</td><td>20 s</td>" in text
    before = output.read_bytes()
    assert cli.main([*argv, "--overwrite"]) == 0
    assert output.read_bytes() == before


def test_names_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--<b>&"
    steps = [record(1, skipped=evil, loss_by_category={evil: 1.0})]
    run = write_run(tmp_path / "<i>run&", steps)
    output = tmp_path / "plot.html"
    plot(PlotOptions([run], output))
    text = output.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<i>run" not in text
    data = page_data(output)
    assert data["runs"][0]["name"] == "<i>run&"
    assert data["runs"][0]["marks"][0][2] == f"skipped: {evil}"
    assert f"loss: {evil}" in [panel["title"] for panel in data["panels"]]


# As much of a browser as the page's script asks for; `made` is what it drew.
BROWSER = """
const made = [];
function element(name) {
  const self = { name, attributes: {}, children: [], style: {}, value: "", offsetTop: 0,
    setAttribute(key, value) { self.attributes[key] = String(value); },
    append(...more) { self.children.push(...more); },
    replaceChildren() { self.children.length = 0; made.length = 0; },
    getBoundingClientRect: () => ({ left: 0, width: 1000 }) };
  made.push(self);
  return self;
}
const known = { panels: element("div"), logarithmic: element("input"),
                data: { textContent: DATA } };
const boxes = RUNS.map(value => ({ value, checked: true }));
globalThis.document = { getElementById: id => known[id], querySelectorAll: () => boxes,
                        createElement: element, createElementNS: (_, name) => element(name) };
globalThis.innerWidth = 1200;
(0, eval)(SCRIPT);
"""
TOGGLE = """
const count = name => made.filter(e => e.name === name).length;
const report = () => ({ svg: count("svg"), circles: count("circle"), bad: made.filter(
  e => Object.values(e.attributes).some(v => /NaN|Infinity|undefined/.test(v))).length });
const found = [report()];
boxes[1].checked = false; boxes[1].onchange(); found.push(report());
known.logarithmic.onchange({ target: { checked: true } }); found.push(report());
const svg = made.find(e => e.name === "svg");
svg.onpointermove({ clientX: 524 });  // 5 steps
found.push(made.filter(e => e.name === "span").map(e => e.textContent).at(-1));
boxes[0].checked = false; boxes[0].onchange(); found.push(report());
console.log(JSON.stringify(found));
"""


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


def in_browser(page: Path, runs: int, then: str) -> Any:
    """What the script ``then`` prints after the page has drawn itself."""
    text = page.read_text(encoding="utf-8")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    program = page.with_suffix(".js")
    program.write_text(
        f"const SCRIPT = {json.dumps(script)}, DATA = {json.dumps(json.dumps(page_data(page)))},"
        f" RUNS = {list(range(runs))};\n{BROWSER}{then}",
        encoding="utf-8",
    )
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_page_draws_itself(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second", [record(1)], [{"step": 1, "loss": 2.0}])
    output = tmp_path / "plot.html"
    plot(PlotOptions([run, other], output, x="steps", smoothing=0.5))
    both, first, logarithmic, told, none = in_browser(output, 2, TOGGLE)
    # Evaluations; of the second run, also single steps that make no line, and three of them raw.
    assert both == {"svg": 8, "circles": 3 * 5 + 1 + 4 + 3, "bad": 0}
    assert first == logarithmic == {"svg": 8, "circles": 3 * 5, "bad": 0}
    assert re.fullmatch(r"first  [\d.]+ \([\d.]+\) evaluation 9 step 5", told)
    assert none == {"svg": 0, "circles": 0, "bad": 0}


@pytest.fixture
def short_stages(tmp_path: Path) -> Path:
    """A recipe's directory: stages of one step, of two and of one."""
    for name, steps in (("01-x", 1), ("02-y", 2), ("03-z", 1)):
        write_run(tmp_path / "recipe" / name, [record(n) for n in range(1, steps + 1)])
    return tmp_path / "recipe"


# In the panel of the loss: where the lone points are, where the stages' names are, and what is
# told of the places 0.9, 1.9, 2.9 and 4.
LONE = """
const frame = made.find(e => e.name === "rect").attributes;
const svg = made.find(e => e.name === "svg");
const names = svg.children.filter(e => e.attributes.transform);
console.log(JSON.stringify({
  dots: svg.children.filter(e => e.name === "circle").map(e => Math.round(+e.attributes.cx)),
  names: names.map(e => [e.textContent, Math.round(e.attributes.transform.match(/[-.0-9]+/)[0])]),
  left: +frame.x, right: +frame.x + +frame.width,
  told: [0.9, 1.9, 2.9, 4].map(x => {
    svg.onpointermove({ clientX: (+frame.x + 5 + x / 4 * (frame.width - 10)) / 1130 * 1000 });
    return made.filter(e => e.name === "span").at(-1).textContent;
  }) }));
"""


@needs_node
def test_the_page_shows_stages_of_one_step(short_stages: Path, tmp_path: Path) -> None:
    output = tmp_path / "plot.html"
    plot(PlotOptions([short_stages], output, x="steps", smoothing=0.0))
    found = in_browser(output, 1, LONE)
    left, right = found["left"] + 5, found["right"] - 5  # the clip is that much wider
    step = (right - left) / 4
    assert found["dots"] == [round(left + step), round(right)], "the two steps between are a line"
    assert found["names"] == [
        ["01-x", round(left + 4)],
        ["02-y", round(left + step + 4)],
        ["03-z", round(left + 3 * step + 4)],
    ]
    assert found["told"] == [
        *("recipe  2 step 1 of 01-x", "recipe  2 step 1 of 02-y"),
        *("recipe  2 step 2 of 02-y", "recipe  2 step 1 of 03-z"),
    ]


def test_a_picture_shows_stages_of_one_step(short_stages: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    runs = read_runs([short_stages], "steps")
    figure, axis = pyplot.subplots()
    picture._draw_panel(axis, panels(runs, 0.0)[0], runs, ("steps", 1.0))
    figure.canvas.draw()
    dots = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "."]
    assert [1, 4] in dots, "the two steps between are a line"
    frame = axis.get_window_extent()
    boxes = [text.get_window_extent() for text in axis.texts]
    pyplot.close(figure)
    assert [text.get_text() for text in axis.texts] == ["01-x", "02-y", "03-z"]
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize(("axis", "smoothing"), [("tokens", 0.9), ("hours", 0.0)])
def test_a_picture_of_several_runs(
    run: Path, tmp_path: Path, axis: str, smoothing: float, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "_a$b$" / "01-x", [record(1)])
    write_run(tmp_path / "_a$b$" / "02-y", [record(1)])
    output = tmp_path / "plot.png"
    options = PlotOptions([run, tmp_path / "_a$b$"], output, axis, smoothing)
    plot(options)
    first = output.read_bytes()
    assert first.startswith(PNG)
    options.overwrite = True
    plot(options)
    assert output.read_bytes() == first
    # A file that another test has left open is closed when it happens to be collected.
    warned = [w.message for w in recwarn.list if w.category is not ResourceWarning]
    assert not warned


def test_a_picture_without_matplotlib_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(run), "--output", str(tmp_path / "plot.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output")
    assert "pip install matplotlib" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()
    plot(PlotOptions([run], tmp_path / "plot.html"))


def test_an_output_that_exists_stays(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "plot.html"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="--overwrite"):
        plot(PlotOptions([run], output))
    assert output.read_text(encoding="utf-8") == "mine"
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        plot(PlotOptions([run], tmp_path / "folder.html", overwrite=True))


def test_the_output_lands_where_one_stands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == "plot.html written\n"
    assert (tmp_path / "plot.html").is_file()


def test_what_is_no_run_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for path, said in (
        (tmp_path / "nothing", r"nothing: no metrics\.jsonl in it"),
        (tmp_path / "absent", "absent: no such directory"),
        (run / "metrics.jsonl", r"metrics\.jsonl: is a file"),
        (write_run(tmp_path / "empty", []), r"empty/metrics\.jsonl: empty"),
        (write_run(tmp_path / "other", [{"a": 1}]), r"other/metrics\.jsonl: a line without a step"),
    ):
        with pytest.raises(DataError, match=said):
            plot(PlotOptions([run, path], tmp_path / "plot.html"))
    (run / "metrics.jsonl").write_text('{"st\n{"step": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: "):
        plot(PlotOptions([run], tmp_path / "plot.html"))
    assert not (tmp_path / "plot.html").exists()


def test_a_log_without_the_axis_says_which_has_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    for axis, lacking in (("tokens", "tokens"), ("hours", "seconds")):
        with pytest.raises(DataError, match=f"step 1 has no {lacking}; try --x steps"):
            plot(PlotOptions([run], tmp_path / "plot.html", axis))
    plot(PlotOptions([run], tmp_path / "plot.html", "steps"))


def test_a_log_without_any_number_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "loss": "nan"}])
    with pytest.raises(DataError, match="no number to draw"):
        plot(PlotOptions([run], tmp_path / "plot.html", "steps"))


@pytest.mark.parametrize("output", ["plot.html", "plot.png"])
def test_a_run_with_losses_that_are_no_numbers_still_has_its_other_curves(
    tmp_path: Path, output: str
) -> None:
    if output.endswith("png"):
        pytest.importorskip("matplotlib")
    steps = [record(n, loss_by_category={}) for n in (1, 2)]
    for step in steps:
        step["loss"] = "inf"
    run = write_run(tmp_path / "run", steps)
    plot(PlotOptions([run], tmp_path / output))
    assert "loss" not in draw(run)
    assert "learning rate" in draw(run)


def test_flags_are_checked() -> None:
    with pytest.raises(UsageError) as caught:
        command.parse(PlotOptions, ["run", "--output", "plot.pdf", "--smoothing", "1"])
    assert len(caught.value.problems) == 2
    with pytest.raises(UsageError, match="RUN_DIRS is required"):
        command.parse(PlotOptions, [])
    assert command.parse(PlotOptions, ["a", "b", "--x", "hours"]).run_dirs == [Path("a"), Path("b")]
