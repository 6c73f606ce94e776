"""Pipelines of which a stage has nothing to train, because its weights are frozen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.faults.lab import Lab, checkpoints, course, learnt

MIDDLE, LAST = 2, 4
FIRST_STAGE = "--freeze model.embed_tokens.weight model.layers.0.*"
LAST_STAGE = "--freeze lm_head.weight model.norm.weight model.layers.1.*"
# One stage trains matrices, the other one norms: each lacks one of the parameter groups.
GROUPS = "--freeze model.layers.0.*norm.weight model.layers.1.*proj.weight lm_head.weight"
INNER_STAGES = "--pretrained {deep} --freeze_non_embeds_params"
TIED = "--pretrained {tied} --freeze model.embed_tokens.weight model.layers.0.*"
# What the order of sums may change: of losses and norms, and ten times that of weights.
CLOSE = {"fp32": 1e-4, "bf16": 3e-3}


class Case(NamedTuple):
    """What is frozen in a pipeline."""

    freeze: str
    layout: str
    dtype: str = "bf16"
    ranks: int = 2
    stages: int = 2


CASES = [
    Case(FIRST_STAGE, "--zero 0", "fp32"),
    Case(LAST_STAGE, "--zero 0", "fp32"),
    Case(FIRST_STAGE, "--zero 0"),
    Case(LAST_STAGE, "--zero 1"),
    Case(FIRST_STAGE, "--zero 1", ranks=4),
    Case(GROUPS, "--zero 1"),
    Case(LAST_STAGE, "--zero 0 --tp 2", "fp32", ranks=4),
    Case(TIED, "--zero 1"),
    Case(TIED, "--zero 0", "fp32"),
    Case(INNER_STAGES, "--zero 0", "fp32", ranks=4, stages=4),
    Case(INNER_STAGES, "--zero 1", ranks=4, stages=4),
]


@pytest.fixture(scope="module")
def deep(lab: Lab) -> Path:
    """A model with four layers."""
    path = lab.root / "deep"
    shutil.copytree(lab.world.model, path)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(path, num_hidden_layers=4)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def weights(save_dir: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint, all stages together."""
    files = (checkpoints(save_dir)[LAST] / "modeling").glob("*.safetensors")
    return {name: weight.float() for path in files for name, weight in load_file(path).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_it_trains_as_without_a_pipeline(lab: Lab, deep: Path, case: Case, tmp_path: Path) -> None:
    frozen = case.freeze.format(deep=deep, tied=lab.world.tied)
    rest = f"{frozen} --mixed_precision {case.dtype} --max_steps {LAST}"
    data_ranks = case.ranks // case.stages // (2 if "--tp" in case.layout else 1)
    # Every run has 8 rows a step.
    rows = 8 // data_ranks // case.stages
    pipeline = (
        f"--plugin 3d --pp {case.stages} {case.layout} --micro_batch_size {rows} "
        f"--accumulation_steps {case.stages} {rest}"
    )
    straight, resumed, plain = (tmp_path / name for name in ("straight", "resumed", "plain"))
    done = lab.run(pipeline, straight, ranks=case.ranks)
    assert set(done.codes) == {0}, done
    middle = checkpoints(straight)[MIDDLE]
    done = lab.run(f"{pipeline} --load_checkpoint {middle}", resumed, ranks=case.ranks)
    assert set(done.codes) == {0}, done
    assert learnt(checkpoints(resumed)[LAST]) == learnt(checkpoints(straight)[LAST])

    done = lab.run(f"--plugin zero2 --micro_batch_size 4 {rest}", plain)
    assert set(done.codes) == {0}, done
    found, wanted = course(straight), course(plain)
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=CLOSE[case.dtype])
    ours, theirs = weights(straight), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        distance = (ours[name] - weight).norm() / weight.norm()
        assert distance < 10 * CLOSE[case.dtype], name
