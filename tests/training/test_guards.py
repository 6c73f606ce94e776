"""Guards: what may not change the weights is left out, noted, and in the end stops the run."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colossal_llama import storage
from colossal_llama.errors import ColossalLlamaError
from colossal_llama.training import gradients
from colossal_llama.training.guards import NonFiniteGuard, SpikeGuard
from colossal_llama.training.reporting import BAD_BATCHES_FILE, RunLog
from tests.training.stand_ins import Trainer, metrics, outcome, run_processes

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Its optimizer is a number: whether the gradients are finite."""
    monkeypatch.setattr(gradients, "are_finite", lambda optimizer: optimizer.finite)
    return Trainer(optimizer=SimpleNamespace(finite=True))


def noted(directory: Path) -> list[dict[str, Any]]:
    path = directory / BAD_BATCHES_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_finite_steps_pass(tmp_path: Path, trainer: Trainer) -> None:
    guard = NonFiniteGuard(tmp_path, 0)
    for step in range(1, 5):
        assert guard.update_is_due(trainer, outcome(step)) is None
    assert noted(tmp_path) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_left_out(tmp_path: Path, trainer: Trainer, loss: float) -> None:
    guard = NonFiniteGuard(tmp_path, 1)
    reason = guard.update_is_due(trainer, outcome(3, loss, finite=False))
    assert reason == "the loss is not finite"
    (line,) = noted(tmp_path)
    assert line["step"] == 3
    assert line["reason"] == reason
    assert line["loss"] == repr(loss)
    assert float(line["loss"]) == loss or math.isnan(loss)
    assert line["ranks"] == [0]
    assert line["samples"] == {"0": [f"data.arrow:{row}" for row in (4, 5, 6, 7)]}


@pytest.mark.parametrize("finite_backward", [True, False])
def test_gradient_that_is_not_finite_is_left_out(
    tmp_path: Path, trainer: Trainer, finite_backward: bool
) -> None:
    """The process is named if what flowed back to its embeddings shows it."""
    trainer.optimizer.finite, trainer.finite_backward = False, finite_backward
    reason = NonFiniteGuard(tmp_path, 1).update_is_due(trainer, outcome())
    assert reason == "the gradient is not finite"
    (line,) = noted(tmp_path)
    assert line["loss"] == 2.0
    assert line["ranks"] == ([] if finite_backward else [0])


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_too_many_in_a_row_stop_the_run(tmp_path: Path, trainer: Trainer, allowed: int) -> None:
    guard = NonFiniteGuard(tmp_path, allowed)
    bad = outcome(loss=math.nan, finite=False)
    for _ in range(allowed):
        assert guard.update_is_due(trainer, bad)
    assert guard.update_is_due(trainer, outcome()) is None  # counting begins anew
    for _ in range(allowed):
        assert guard.update_is_due(trainer, bad)
    with pytest.raises(ColossalLlamaError) as caught:
        guard.update_is_due(trainer, outcome(9, math.nan, finite=False))
    for word in ("step 9", f"--max_bad_steps is {allowed}", BAD_BATCHES_FILE, "--lr"):
        assert word in str(caught.value)
    assert len(noted(tmp_path)) == 2 * allowed + 1, "the last one is noted, too"


def test_a_resumed_run_goes_on_counting(tmp_path: Path, trainer: Trainer) -> None:
    guard, bad = NonFiniteGuard(tmp_path, 2), outcome(loss=math.nan, finite=False)
    for _ in range(2):
        guard.update_is_due(trainer, bad)
    resumed = NonFiniteGuard(tmp_path, 2)
    resumed.load_state(json.loads(json.dumps(guard.state())))
    with pytest.raises(ColossalLlamaError):
        resumed.update_is_due(trainer, bad)


def fed(guard: SpikeGuard, losses: list[float], trainer: Trainer) -> list[str | None]:
    """What the guard says to each loss, in a run that does as it says."""
    reasons = []
    for step, loss in enumerate(losses, 1):
        reason = guard.update_is_due(trainer, outcome(step, loss))
        guard.step_ended(trainer, metrics(step, loss=loss, skipped=reason))
        reasons.append(reason)
    return reasons


def calm(number: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(3.0, 0.1) for _ in range(number)]


@pytest.mark.parametrize("skip", [True, False])
def test_spike_is_noticed_once_there_is_something_to_compare(
    tmp_path: Path, trainer: Trainer, skip: bool
) -> None:
    guard = SpikeGuard(tmp_path, 6.0, skip=skip)
    early = [30.0, *calm(5)]  # the first steps of a new model
    assert fed(guard, early, trainer) == [None] * 6
    guard = SpikeGuard(tmp_path, 6.0, skip=skip)
    assert not any(fed(guard, calm(SpikeGuard.LEAST), trainer))
    reason = guard.update_is_due(trainer, outcome(77, 4.5))
    assert (reason is not None) == skip
    (line,) = noted(tmp_path)
    assert line["step"] == 77
    assert line["loss"] == 4.5
    assert line["ranks"] == []
    assert "6 standard deviations above the last 20 steps' mean of 2.98" in line["reason"]
    assert trainer.said == ([] if skip else [f"warning: step 77: {line['reason']}"])


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_the_border_is_at_sigma_deviations(tmp_path: Path, trainer: Trainer, sigma: float) -> None:
    losses = calm(150)
    window = losses[-SpikeGuard.WINDOW :]
    border = statistics.fmean(window) + sigma * statistics.pstdev(window)
    for loss, spike in ((border - 1e-6, False), (border + 1e-6, True), (-1e9, False)):
        guard = SpikeGuard(tmp_path, sigma, skip=True)
        for step, value in enumerate(losses):
            guard.step_ended(trainer, metrics(step, loss=value))
        assert (guard.update_is_due(trainer, outcome(1, loss)) is not None) == spike


def test_constant_losses_make_no_spike_of_a_rounding(tmp_path: Path, trainer: Trainer) -> None:
    guard = SpikeGuard(tmp_path, 6.0, skip=True)
    assert not any(fed(guard, [2.0] * 30 + [2.001], trainer))


def test_what_was_skipped_does_not_become_normal(tmp_path: Path, trainer: Trainer) -> None:
    guard = SpikeGuard(tmp_path, 6.0, skip=True)
    reasons = fed(guard, calm(50) + [9.0] * 60 + calm(5), trainer)
    assert all(reasons[50:110])
    assert not any(reasons[:50] + reasons[110:])


def test_what_was_learned_from_becomes_normal(tmp_path: Path, trainer: Trainer) -> None:
    guard = SpikeGuard(tmp_path, 6.0, skip=False)
    fed(guard, calm(50) + [9.0] * 60, trainer)
    warnings = len(noted(tmp_path))
    assert 0 < warnings < 30


def test_losses_that_are_not_finite_are_the_other_guards(tmp_path: Path, trainer: Trainer) -> None:
    guard = SpikeGuard(tmp_path, 6.0, skip=True)
    fed(guard, [*calm(30), math.nan, math.inf], trainer)
    assert noted(tmp_path) == []
    assert all(map(math.isfinite, guard.state()["losses"]))


@pytest.mark.parametrize("before", [0, 5, 19, 20, 99, 100, 250])
def test_a_resumed_run_says_the_same(tmp_path: Path, trainer: Trainer, before: int) -> None:
    """Exactly: losses come back from JSON as they were."""
    losses = calm(before + 60, seed=7)
    losses[before + 30] = 5.0
    straight, first, second = (SpikeGuard(tmp_path, 3.0, skip=True) for _ in range(3))
    wanted = fed(straight, losses, trainer)
    fed(first, losses[:before], trainer)
    storage.write_json(tmp_path / "state", first.state())
    second.load_state(storage.read_json(tmp_path / "state"))
    assert second.state() == first.state()
    assert fed(second, losses[before:], trainer) == wanted[before:]
    assert second.state() == straight.state()
    assert len(second.state()["losses"]) <= SpikeGuard.WINDOW


def test_full_disk_stops_nothing_and_loses_nothing(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = NonFiniteGuard(tmp_path, 3)
    bad = outcome(1, math.nan, finite=False)
    guard.update_is_due(trainer, bad)
    written = (tmp_path / BAD_BATCHES_FILE).read_bytes()
    write, calls = os.write, []

    def half_full(descriptor: int, content: Any) -> int:
        calls.append(len(content))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, bytes(content)[:10])

    monkeypatch.setattr(os, "write", half_full)
    assert guard.update_is_due(trainer, bad)
    monkeypatch.undo()
    assert (tmp_path / BAD_BATCHES_FILE).read_bytes() == written, "half a line"
    (said,) = trainer.said
    assert said.startswith(f"warning: {tmp_path / BAD_BATCHES_FILE}: No space left on device; ")
    assert '"data.arrow:4"' in said


@pytest.mark.parametrize(("first", "kept"), [(1, []), (3, [2]), (6, [2, 3, 5])])
def test_resumed_run_notes_no_batch_twice(
    tmp_path: Path, trainer: Trainer, first: int, kept: list[int]
) -> None:
    """What is taken again is noted again if it is bad again; a new run has none of an old one's."""
    guard = NonFiniteGuard(tmp_path, 9)
    for step in (2, 3, 5):
        guard.update_is_due(trainer, outcome(step, math.nan, finite=False))
    RunLog(
        tmp_path, tmp_path / "tensorboard", [], first_step=first, total_steps=9, active=True,
        run_name="", config={},
    ).close()  # fmt: skip
    assert (tmp_path / BAD_BATCHES_FILE).exists() == bool(kept)
    assert [line["step"] for line in noted(tmp_path)] == kept
    guard.update_is_due(trainer, outcome(first, math.nan, finite=False))
    assert [line["step"] for line in noted(tmp_path)] == [*kept, first]


def test_directory_that_is_gone(tmp_path: Path, trainer: Trainer) -> None:
    guard = NonFiniteGuard(tmp_path / "gone", 3)
    assert guard.update_is_due(trainer, outcome(1, math.nan, finite=False))
    assert "No such file or directory" in trainer.said[0]


def test_one_process_s_mistake_is_noted_for_all(tmp_path: Path) -> None:
    """Loss or gradient of one process: all leave the update out, one writes, all are listed."""
    results = run_processes("guard_worker", 2, tmp_path)
    assert results[0] == results[1] == ["the loss is not finite", "the gradient is not finite"]
    for line, ranks in zip(noted(tmp_path), ([1], [0]), strict=True):
        assert line["ranks"] == ranks
        assert line["samples"] == {
            "0": ["data.arrow:0", "data.arrow:1"],
            "1": ["data.arrow:2", "data.arrow:3"],
        }
