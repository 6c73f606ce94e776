"""A run goes on with other processes, or another plugin, with the moments that it had."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.faults.lab import Lab, checkpoints, metrics

MIDDLE, LAST = 3, 6
TIED = "--pretrained {tied}"
PIPELINE = "3d --pp 2 --accumulation_steps 2"


class Move(NamedTuple):
    """From two processes with one plugin to others; both with ``flags``."""

    plugin: str
    to: str
    ranks: int
    flags: str = ""


MOVES = [
    Move("zero2", "gemini", 4),
    Move("gemini", "zero2", 1),
    Move("gemini", PIPELINE, 2),
    Move("3d --sp 2 --zero 1", "zero2_cpu", 4),
    Move(PIPELINE, "gemini", 1, TIED),
    Move("zero2", PIPELINE, 2, TIED),
    Move("zero2", "3d --zero 2", 4, "--lora_rank 4"),
    Move("3d --zero 0", "zero2", 2, "--mixed_precision fp16"),
    Move("3d --tp 2", "3d --tp 2 --zero 2", 4),
    Move("3d --tp 2", "3d --tp 2 --pp 2 --accumulation_steps 2", 4, TIED),
]
BATCH = 8  # rows of a step


def flags(plugin: str, ranks: int, rest: str, lab: Lab) -> str:
    data_ranks = ranks // 2 ** len(re.findall("--[pst]p 2", plugin))
    rows = BATCH // data_ranks // (2 if "--accumulation_steps" in plugin else 1)
    rest = rest.format(tied=lab.world.tied)
    return f"--plugin {plugin} --micro_batch_size {rows} --max_steps {LAST} {rest}"


@pytest.fixture(scope="module")
def run_of(lab: Lab) -> dict[tuple[str, str], Path]:
    """The runs that are gone on from, by plugin and flags, each with the state of the middle."""
    found = {}
    for number, (plugin, rest) in enumerate({(m.plugin, m.flags): None for m in MOVES}):
        save_dir = found[plugin, rest] = lab.root / f"moves-{number}"
        save = f"--save_interval {MIDDLE}"
        done = lab.run(f"{flags(plugin, 2, rest, lab)} {save}", save_dir)
        assert done.codes == [0, 0], done
    return found


def put_together(directory: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Whole masters and moments, flat, by the names of weights; each part is there."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        for number, (name, begin) in enumerate(json.loads(path.with_suffix(".json").read_text())):
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                values = tensors[f"{number}.{kind}"].flatten()
                # What is beyond the weight is padding.
                into = whole.setdefault(f"{name}.{kind}", torch.full((sizes[name],), torch.nan))
                into[begin : begin + len(values)] = values[: max(sizes[name] - begin, 0)]
            assert int(tensors[f"{number}.step"]) == MIDDLE
    assert not any(values.isnan().any() for values in whole.values())
    return whole


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """The number of elements of each weight, of those of an adapter, and of parts of weights."""
    sizes = {}
    for path in (checkpoint / "optimizer").glob("*.safetensors"):
        tensors = load_file(path)
        for number, (name, _) in enumerate(json.loads(path.with_suffix(".json").read_text())):
            if " of 2)" in name:  # on two processes nothing else is divided
                sizes[name] = tensors[f"{number}.master"].numel()
    for path in checkpoint.rglob("*/*.safetensors"):
        for name, values in load_file(path).items() if "rank" not in path.name else ():
            # PEFT's files have other names than its modules.
            name = name.removeprefix("base_model.model.").replace("A.weight", "A.default.weight")
            sizes[name.replace("B.weight", "B.default.weight")] = values.numel()
    return sizes


@pytest.mark.parametrize("move", MOVES, ids=[f"{m.plugin}, {m.to}, {m.flags}" for m in MOVES])
def test_moments_are_carried_over(
    lab: Lab, run_of: dict[tuple[str, str], Path], tmp_path: Path, move: Move
) -> None:
    before = run_of[move.plugin, move.flags]
    start, dump, save_dir = checkpoints(before)[MIDDLE], tmp_path / "dump", tmp_path / "run"
    dump.mkdir()
    resume = f"--save_interval 0 --load_checkpoint {start}"
    done = lab.run(
        f"{flags(move.to, move.ranks, move.flags, lab)} {resume}",
        save_dir,
        {"do": "dump_optimizer", "step": MIDDLE + 1, "to": str(dump)},
        ranks=move.ranks,
    )
    assert set(done.codes) == {0}, done
    (warned,) = done.lines(f"warning: {start} was written by ")
    assert "weights, the optimizer's moments and the data position are carried over" in warned
    sizes = sizes_of(start)
    wanted, found = (put_together(path, sizes) for path in (start / "optimizer", dump))
    assert len(wanted) > 6
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
    losses = {line["step"]: line["loss"] for line in metrics(before)}
    for line in metrics(save_dir):
        assert line["loss"] == pytest.approx(losses[line["step"]], rel=1e-3)


def test_another_tensor_parallelism_begins_anew(
    lab: Lab, run_of: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    start = checkpoints(run_of["zero2", TIED])[MIDDLE]
    to = flags("3d --tp 2", 2, TIED, lab)
    done = lab.run(f"{to} --load_checkpoint {start}", tmp_path / "run")
    assert done.codes == [0, 0], done
    (warned,) = done.lines(f"warning: {start} was written by ")
    assert warned.endswith("the optimizer's moments start anew")


def test_a_lost_list_is_named(
    lab: Lab, run_of: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    start = tmp_path / "epoch-0_step-3"
    shutil.copytree(checkpoints(run_of["gemini", ""])[MIDDLE], start)
    (start / "optimizer" / "rank-00001.json").unlink()
    done = lab.run(
        f"{flags('zero2', 1, '', lab)} --load_checkpoint {start}", tmp_path / "run", ranks=1
    )
    assert done.codes == [2], done
    assert "rank-00001.json: missing; the checkpoint is incomplete" in done.said[0]
