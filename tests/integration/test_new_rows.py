"""--train_new_rows_only on every plugin: old rows stay bit for bit, the rest agrees with PyTorch.

The rows of the table share one process group. What they should agree with is in
``plain_loop.py``.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.conftest import World, train_group
from tests.integration.plain_loop import PlainLoop, Plan, Run, Setting


class Row(NamedTuple):
    name: str
    flags: str
    steps: int = 3


OLD_ROWS = 500  # of 600: with two processes that divide them, the border is within the second half
GRAD_CLIP, WEIGHT_DECAY = 0.05, 2.0
EACH_2, EACH_4 = "--micro_batch_size 2", "--micro_batch_size 4"
TWICE_1 = "--micro_batch_size 1 --accumulation_steps 2"
TWICE_2 = "--micro_batch_size 2 --accumulation_steps 2"
BF16, FP32 = "--mixed_precision bf16", "--mixed_precision fp32"
FROZEN = "--freeze_non_embeds_params"
TABLE = [
    Row("zero2", f"--plugin zero2 {BF16} {EACH_2} {FROZEN}"),
    Row("zero2-layers", f"--plugin zero2 {BF16} {EACH_2}"),
    Row("zero2-fp32", f"--plugin zero2 {FP32} {TWICE_1} {FROZEN}"),
    Row("zero2-fp16", f"--plugin zero2 {EACH_2} {FROZEN}", 12),  # some find a loss scale
    Row("zero2-fused", f"--plugin zero2 {BF16} {EACH_2} {FROZEN} --fused_loss"),
    Row("zero2-tied", f"--plugin zero2 {BF16} {EACH_2} {FROZEN}"),
    Row("zero2_cpu", f"--plugin zero2_cpu {BF16} {EACH_2} {FROZEN}"),
    Row("gemini", f"--plugin gemini {BF16} {EACH_2} {FROZEN}"),
    Row("gemini-twice", f"--plugin gemini {BF16} {TWICE_1} {FROZEN}"),
    Row("gemini-layers", f"--plugin gemini {BF16} {EACH_2}"),
    Row("gemini-tied", f"--plugin gemini {BF16} {EACH_2} {FROZEN}"),
    Row("3d-zero0", f"--plugin 3d --zero 0 {BF16} {EACH_2} {FROZEN}"),
    Row("3d-zero1", f"--plugin 3d --zero 1 {BF16} {EACH_2} {FROZEN}"),
    Row("3d-zero2", f"--plugin 3d --zero 2 {BF16} {TWICE_1} {FROZEN}"),
    Row("3d-tp", f"--plugin 3d --tp 2 {BF16} {EACH_4} {FROZEN}"),
    Row("3d-tp-fp32", f"--plugin 3d --tp 2 {FP32} {EACH_4} {FROZEN}"),
    Row("3d-tp-tied", f"--plugin 3d --tp 2 {BF16} {EACH_4} {FROZEN}"),
    Row("3d-pp", f"--plugin 3d --pp 2 {BF16} {TWICE_2} {FROZEN}"),
    Row("3d-pp-layers", f"--plugin 3d --pp 2 {BF16} {TWICE_2}"),
    Row("3d-pp-tied", f"--plugin 3d --pp 2 {BF16} {TWICE_2} {FROZEN}"),
    Row("3d-sp", f"--plugin 3d --sp 2 {BF16} {EACH_4} {FROZEN}"),
]
by_name = pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Trains every row."""
    train_group([_flags(world, row) for row in TABLE], world.out / "new-rows")
    return world


def _model(world: World, name: str) -> Path:
    return world.tied if name.endswith("-tied") else world.model


def _flags(world: World, row: Row) -> list[str]:
    return [
        *["--pretrained", str(_model(world, row.name))],
        *["--dataset", str(world.pretrain / "part-00000"), "--max_steps", str(row.steps)],
        *["--save_dir", str(world.out / "new-rows" / row.name), "--save_interval", "0"],
        *["--lr", "0.01", "--lr_schedule", "constant", "--warmup_steps", "1"],
        *["--grad_clip", str(GRAD_CLIP)],
        *["--weight_decay", str(WEIGHT_DECAY)],
        *["--train_new_rows_only", "--num_old_rows", str(OLD_ROWS), *row.flags.split()],
    ]


def _checkpoint(world: World, row: Row) -> Path:
    save_dir = world.out / "new-rows" / row.name
    return save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()


def _metrics(world: World, row: Row) -> list[dict[str, Any]]:
    path = world.out / "new-rows" / row.name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


@by_name
def test_only_new_rows_change(runs: World, row: Row) -> None:
    before = _weights(_model(runs, row.name))
    after = _weights(_checkpoint(runs, row) / "modeling")
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    for name in embeddings:
        same = (before[name].to(after[name].dtype) == after[name]).all(dim=1)
        assert same[:OLD_ROWS].all(), name
        assert (~same[OLD_ROWS:]).float().mean() > 0.3, name
    for name in before.keys() - embeddings:
        moved = not torch.equal(before[name].to(after[name].dtype), after[name])
        assert moved == (FROZEN not in row.flags), name


class _NewRowsLoop(PlainLoop):
    """Hides the old rows' gradients, and decays the new rows alone."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.embeddings = [n for n in self.masters if "embed_tokens" in n or "lm_head" in n]
        matrices = [n for n, m in self.masters.items() if m.dim() > 1 and n not in self.embeddings]
        others = [n for n in self.masters if n not in matrices]
        groups = [
            {"params": [self.masters[n] for n in matrices], "weight_decay": WEIGHT_DECAY},
            {"params": [self.masters[n] for n in others], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8
        )

    def _update(self, gradients: list[torch.Tensor], rate: float) -> float:
        for name, gradient in zip(self.masters, gradients, strict=True):
            if name in self.embeddings:
                gradient[:OLD_ROWS] = 0
        for name in self.embeddings:
            self.masters[name][OLD_ROWS:] *= 1 - rate * WEIGHT_DECAY
        return super()._update(gradients, rate)


@by_name
def test_export_loads_in_transformers(runs: World, row: Row) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        _checkpoint(runs, row) / "modeling", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == row.name.endswith("-tied")


@functools.cache
def _plain(setting: Setting, plans: tuple[Plan, ...]) -> Run:
    return _NewRowsLoop(setting).run(plans)


def _setting(world: World, row: Row) -> Setting:
    dtypes = {BF16: torch.bfloat16, FP32: torch.float32}
    return Setting(
        model=_model(world, row.name),
        part=world.pretrain / "part-00000",
        seed=42,
        batch_size=4,
        ranks=1 if EACH_4 in row.flags or TWICE_2 in row.flags else 2,
        passes=1 if EACH_4 in row.flags or EACH_2 in row.flags else 2,
        dtype=next((dtypes[flag] for flag in dtypes if flag in row.flags), torch.float16),
        grad_clip=GRAD_CLIP,
        frozen=FROZEN in row.flags,
    )


@by_name
def test_agrees_with_plain_pytorch(runs: World, row: Row) -> None:
    found = _metrics(runs, row)
    plans = [
        Plan(step["learning_rate"], step["loss_scale"], step["skipped"] is not None)
        for step in found
    ]
    plain = _plain(_setting(runs, row), tuple(plans))
    full = FP32 in row.flags
    assert len(found) == row.steps
    norms = [wanted.grad_norm for wanted in plain.steps if wanted.grad_norm is not None]
    assert len(norms) >= 3
    assert max(norms) > 2 * GRAD_CLIP, "clipping should bite"
    for ours, wanted in zip(found, plain.steps, strict=True):
        assert ours["loss"] == pytest.approx(wanted.loss, rel=1e-5 if full else 1e-3)
        if wanted.grad_norm is not None:
            assert ours["grad_norm"] == pytest.approx(wanted.grad_norm, rel=1e-4 if full else 1e-2)
    for name, tensor in _weights(_checkpoint(runs, row) / "modeling").items():
        if name in plain.after:
            moved = (plain.after[name] - plain.before[name]).norm()
            apart = (tensor.float() - plain.after[name]).norm()
            assert apart < (1e-3 if full else 0.2) * moved, name


@by_name
def test_new_rows_decay(runs: World, row: Row) -> None:
    name = "model.embed_tokens.weight"
    if row.name.endswith("-tied"):
        pytest.skip("every row of a tied embedding has a gradient")
    before = _weights(_model(runs, row.name))[name].float()[OLD_ROWS:]
    after = _weights(_checkpoint(runs, row) / "modeling")[name].float()[OLD_ROWS:]
    rates = [step["learning_rate"] for step in _metrics(runs, row) if step["grad_norm"] is not None]
    left = math.prod(1 - rate * WEIGHT_DECAY for rate in rates)
    shrunk = (after / before).median(dim=1).values - left
    # Rows whose piece is in no row of the data have no gradient: nothing but decay moves them.
    assert (shrunk.abs() < 0.004).float().mean() > 0.2
    assert left < 0.97
