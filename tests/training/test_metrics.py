"""A run's log: one line a step, and none twice after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_llama.training.metrics import MetricsWriter, StepMetrics


def metrics(step: int, loss: float = 1.5, grad_norm: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step, loss=loss, learning_rate=1e-4, grad_norm=grad_norm, loss_scale=None,
        tokens=100 * step, tokens_per_second=10.0, seconds=10.0,
    )  # fmt: skip


def log(directory: Path, first: int, last: int, loss: float = 1.5, *, active: bool = True) -> None:
    writer = MetricsWriter(directory, directory / "tensorboard", first, last, active)
    try:
        for step in range(first, last + 1):
            writer.log(metrics(step, loss))
        writer.say("a line of text")
    finally:
        writer.close()


def read(directory: Path) -> list[dict[str, float]]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_step_is_a_line(tmp_path: Path) -> None:
    log(tmp_path, 1, 3)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    assert read(tmp_path)[1] == {
        "step": 2, "loss": 1.5, "learning_rate": 1e-4, "grad_norm": None, "loss_scale": None,
        "tokens": 200, "tokens_per_second": 10.0, "seconds": 10.0,
    }  # fmt: skip


def test_steps_are_on_the_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tmp_path / "tensorboard", 1, 2, True)
    writer.log(metrics(1))
    assert len(read(tmp_path)) == 1
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"step": 5, "loss"', '{"st', "\x00\x00\x00"])
def test_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path, torn: str) -> None:
    """Whatever a crash left of the last line."""
    log(tmp_path, 1, 4, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(torn)
    log(tmp_path, 3, 6, loss=2.0)
    found = [(record["step"], record["loss"]) for record in read(tmp_path)]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_new_run_drops_all_of_an_old_one(tmp_path: Path) -> None:
    log(tmp_path, 1, 5, loss=1.0)
    log(tmp_path, 1, 2, loss=2.0)
    assert [record["loss"] for record in read(tmp_path)] == [2.0, 2.0]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, 1, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/tokens")] == [100, 200, 300]
    assert "train/grad_norm" not in events.Tags()["scalars"], "there was none"


def test_other_processes_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log(tmp_path, 1, 3, active=False)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
