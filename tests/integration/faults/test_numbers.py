"""Losses and gradients that are not finite: no update, on any process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colossal_llama.training.file_writer import checksum
from tests.integration.faults.lab import (
    FULL_LENGTH,
    Lab,
    checkpoints,
    learnt,
    metrics,
    one_error,
)

LAYOUTS = {
    "zero2": "",
    "zero2-twice": "--micro_batch_size 1 --accumulation_steps 2",
    "gemini": "--plugin gemini",
    "gemini-twice": "--plugin gemini --micro_batch_size 1 --accumulation_steps 2",
    "3d-tp": "--plugin 3d --tp 2 --micro_batch_size 4",
    "3d-pp": "--plugin 3d --pp 2 --accumulation_steps 2",
    "3d-zero0": "--plugin 3d --zero 0",
}
BAD = 3  # the step
TWICE = [3, 4]
FP16 = "--mixed_precision fp16"
SCALED = {name: f"{LAYOUTS[name]} {FP16}" for name in ("zero2", "gemini", "3d-tp")}


def jobs(lab: Lab, layouts: dict[str, str], out: Path, flags: str) -> list[list[str]]:
    return [lab.flags(f"{own} {flags}", out / name) for name, own in layouts.items()]


def as_if_left_out(checkpoint: Path, target: Path, state_after: dict[str, Any]) -> Path:
    """A copy of a checkpoint in which the next step was taken without learning anything."""
    found = shutil.copytree(checkpoint, target / f"epoch-0_step-{BAD}")
    sums = json.loads((found / "checksums.json").read_text())
    (found / "running_states.json").write_text(json.dumps(state_after))
    sums["running_states.json"] = checksum(found / "running_states.json")
    (found / "checksums.json").write_text(json.dumps(sums))
    return found


def moves(before: Path, after: Path) -> list[str]:
    """The tensors of the weights and of the optimizer that are not the same, loss scale aside."""
    found = []
    for path in [*before.glob("modeling/*.safetensors"), *before.glob("optimizer/*.safetensors")]:
        old, new = load_file(path), load_file(after / path.relative_to(before))
        assert old.keys() == new.keys()
        changed = [name for name in old if not torch.equal(old[name], new[name])]
        found += [name for name in changed if not name.startswith("loss_scale")]
    return found


@pytest.fixture(scope="module")
def bad_gradient(lab: Lab) -> Path:
    """Trainings of every layout in which rank 1 once gets a gradient that is NaN."""
    out = lab.root / "bad-gradient"
    spoil = {"do": "spoil", "rank": 1, "steps": [BAD], "value": "nan", "forward": False}
    done = lab.run_all(jobs(lab, LAYOUTS, out, f"--max_steps {BAD + 1}"), spoil)
    assert done.codes == [0, 0], done
    assert len(done.lines(f"warning: step {BAD}: no update, the gradient is")) == len(LAYOUTS)
    return out


@pytest.fixture(scope="module")
def bad_step_left_out(lab: Lab, bad_gradient: Path) -> Path:
    """The same trainings, gone on with in other processes as if that step had not been."""
    out, resumed = lab.root / "left-out", []
    for name, own in LAYOUTS.items():
        found = checkpoints(bad_gradient / name)
        state = json.loads((found[BAD] / "running_states.json").read_text())
        source = as_if_left_out(found[BAD - 1], out / "from" / name, state)
        flags = f"{own} --max_steps {BAD + 1} --load_checkpoint {source}"
        resumed.append(lab.flags(flags, out / name))
    done = lab.run_all(resumed)
    assert done.codes == [0, 0], done
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_nan_in_one_ranks_gradient_moves_nothing(
    bad_gradient: Path, bad_step_left_out: Path, name: str
) -> None:
    found = checkpoints(bad_gradient / name)
    assert not moves(found[BAD - 1], found[BAD])
    assert moves(found[BAD], found[BAD + 1])
    assert not moves(found[BAD + 1], checkpoints(bad_step_left_out / name)[BAD + 1])
    by_step = {line["step"]: line for line in metrics(bad_gradient / name)}
    assert by_step[BAD]["skipped"] == "the gradient is not finite"
    (line,) = map(json.loads, (bad_gradient / name / "bad_batches.jsonl").read_text().splitlines())
    assert line["step"] == BAD
    # Tensor parallel ranks share their gradients, and a later stage hands them to the first.
    assert line["ranks"] == {"3d-tp": [0, 1], "3d-pp": [0]}.get(name, [1])
    assert set(line["samples"]) == {"0", "1"}
    assert sum(map(len, line["samples"].values())) == (8 if name in ("3d-tp", "3d-pp") else 4)


@pytest.mark.parametrize("mode", ["", "--async_save"])
def test_too_many_bad_steps_end_a_run(lab: Lab, straight: Path, tmp_path: Path, mode: str) -> None:
    """The checkpoint that is being written meanwhile is the last to resume from."""
    spoil = {"do": "spoil", "rank": 1, "steps": [3, 4], "value": "nan", "forward": True}
    done = lab.run(f"{FULL_LENGTH} --max_bad_steps 1 {mode}", tmp_path / "run", spoil)
    one_error(done, "the loss is not finite at step 4", "bad_batches.jsonl")
    lines = (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()
    assert [json.loads(line)["ranks"] for line in lines] == [[1], [1]]
    found = checkpoints(tmp_path / "run")
    assert max(found) == 3
    assert not moves(found[2], found[3])
    assert learnt(found[2]) == learnt(checkpoints(straight)[2])


@pytest.fixture(scope="module")
def scaled(lab: Lab) -> Path:
    """Trainings in fp16 that meet twice with a NaN, and others that meet with an overflow."""
    out = lab.root / "scaled"
    for value, forward in (("nan", True), ("inf", False)):
        spoil = {"do": "spoil", "rank": 1, "steps": TWICE, "value": value, "forward": forward}
        done = lab.run_all(jobs(lab, SCALED, out / value, f"--max_steps {TWICE[-1] + 1}"), spoil)
        assert done.codes == [0, 0], done
    return out


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("value", "factor", "reason"),
    [("nan", 1.0, "the loss is not finite"), ("inf", 0.5, "the gradient overflowed")],
)
def test_loss_scale_falls_for_an_overflow_only(
    scaled: Path, name: str, value: str, factor: float, reason: str
) -> None:
    """ColossalAI lowers it at the second one."""
    found = checkpoints(scaled / value / name)
    by_step = {line["step"]: line for line in metrics(scaled / value / name)}
    for step in TWICE:
        assert not moves(found[step - 1], found[step])
        assert by_step[step]["skipped"].startswith(reason)
        assert by_step[step]["grad_norm"] is None
    after = TWICE[-1] + 1
    assert moves(found[after - 1], found[after])
    assert by_step[after]["skipped"] is None
    assert by_step[after]["loss_scale"] == factor * by_step[TWICE[0]]["loss_scale"]
