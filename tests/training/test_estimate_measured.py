"""The estimate against trainings: what their steps hold, and what they write."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.estimate_memory import Measured, job_flags, measure, predict

LENGTH = 128
PROCESSES = 2
CASES = {
    "zero2": "--plugin zero2 --micro_batch_size 4",
    "zero2-recomputed": "--plugin zero2 --micro_batch_size 4 --use_grad_checkpoint",
    "zero2-few-tokens": "--plugin zero2 --micro_batch_size 1",
    "gemini": "--plugin gemini --micro_batch_size 4",
    "gemini-recomputed": "--plugin gemini --micro_batch_size 4 --use_grad_checkpoint",
    "gemini-accumulated": "--plugin gemini --micro_batch_size 1 --accumulation_steps 2",
    "3d-tp": "--plugin 3d --tp 2 --micro_batch_size 8",
    "3d-tp-recomputed": "--plugin 3d --tp 2 --micro_batch_size 8 --use_grad_checkpoint",
    "3d-pp": "--plugin 3d --pp 2 --micro_batch_size 4 --accumulation_steps 2",
    "3d-pp-recomputed": "--plugin 3d --pp 2 --micro_batch_size 4 --accumulation_steps 2 "
    "--use_grad_checkpoint",
}
STAGES = {name: 2 if "-pp" in name else 1 for name in CASES}

Job = tuple[list[str], Measured]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """For each case its flags and what was measured, all in one pair of processes."""
    from benchmarks.training_world import make_world

    root = tmp_path_factory.mktemp("measured")
    world = make_world(root, "demo", "float32", vocab_size=2_000, rows=64, length=LENGTH)
    flags = [
        job_flags(case, world.model, world.data, root / name, LENGTH)
        for name, case in CASES.items()
    ]
    return dict(zip(CASES, zip(flags, measure(flags, root, PROCESSES), strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_memory_is_predicted(jobs: dict[str, Job], name: str) -> None:
    flags, measured = jobs[name]
    predicted, _ = predict(flags, PROCESSES, cuda=False)
    if STAGES[name] > 1:
        assert predicted == pytest.approx(measured.peaks, rel=0.15)
    else:
        assert predicted[0] == pytest.approx(measured.peak, rel=0.15)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_predicted(jobs: dict[str, Job], name: str) -> None:
    flags, measured = jobs[name]
    _, predicted = predict(flags, PROCESSES, cuda=False)
    # Settings, checksums and headers: some 50 KB, whatever the size.
    assert predicted == pytest.approx(measured.checkpoint, rel=0.01)


def test_adapters_are_predicted(jobs: dict[str, Job], tmp_path: Path) -> None:
    flags, _ = jobs["zero2"]
    _, whole = predict(flags, PROCESSES, cuda=False)
    _, adapted = predict([*flags, "--lora_rank", "4"], PROCESSES, cuda=False)
    assert adapted < whole / 3
