"""LoRA: trains as plain PEFT does, resumes bit for bit, and leaves what transformers and PEFT load.

The rows of the table share two process groups: one trains all of them, one resumes all of them
from the middle.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.loader import open_parts
from tests.integration.conftest import World, train_group
from tests.integration.plain_loop import PlainLoop, Plan, Setting


class Row(NamedTuple):
    name: str
    flags: str
    steps: int = 4


SEARCH = 10  # steps: the first ones find a loss scale

EACH_2, EACH_4 = "--micro_batch_size 2", "--micro_batch_size 4"
TWICE_1 = "--micro_batch_size 1 --accumulation_steps 2"
BF16, FP32 = "--mixed_precision bf16", "--mixed_precision fp32"
EMBEDDINGS, DROPOUT = "--lora_train_embeddings", "--lora_dropout 0.1"
RECOMPUTE, SOME = "--use_grad_checkpoint", "--lora_modules q_proj v_proj down_proj"
OLD_ROWS = 500  # of 600
ROWS = f"--train_new_rows_only --num_old_rows {OLD_ROWS}"
TABLE = [
    Row("zero2", f"--plugin zero2 {BF16} {EACH_2} {RECOMPUTE} {DROPOUT}"),
    Row("zero2-fp16", f"--plugin zero2 {TWICE_1} --async_save", SEARCH),
    Row("zero2-fp32", f"--plugin zero2 {FP32} {EACH_2}"),
    Row("zero2-fp32-embeddings", f"--plugin zero2 {FP32} {TWICE_1} {EMBEDDINGS} {RECOMPUTE}"),
    Row("zero2-fp32-fused", f"--plugin zero2 {FP32} {EACH_2} --fused_loss {SOME}"),
    Row("zero2-tied", f"--plugin zero2 {BF16} {EACH_2} {EMBEDDINGS} --use_neft"),
    Row("zero2-rows", f"--plugin zero2 {BF16} {EACH_2} {EMBEDDINGS} {ROWS}"),
    Row("zero2_cpu", f"--plugin zero2_cpu {BF16} {EACH_2}"),
    Row("3d-zero0", f"--plugin 3d --zero 0 {BF16} {EACH_2} {DROPOUT}"),
    Row("3d-zero0-fp32", f"--plugin 3d --zero 0 {FP32} {TWICE_1}"),
    Row("3d-zero1", f"--plugin 3d --zero 1 {BF16} {TWICE_1} {RECOMPUTE}"),
    Row("3d-zero1-tied", f"--plugin 3d --zero 1 {BF16} {EACH_2} {EMBEDDINGS}"),
    Row("3d-zero2", f"--plugin 3d --zero 2 {EACH_2} {EMBEDDINGS}", SEARCH),
    Row("3d-sp", f"--plugin 3d --sp 2 {BF16} {EACH_4}"),
]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, MIDDLE, GRAD_CLIP = 4, 16.0, 2, 0.5
by_name = pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Trains every row straight through, then again from the middle in new processes."""
    train_group([_flags(world, row, row.name) for row in TABLE], world.out / "lora")
    resumed = [
        [
            *_flags(world, row, f"{row.name}-resumed"),
            *["--load_checkpoint", str(_checkpoint(world, row.name, MIDDLE))],
        ]
        for row in TABLE
    ]
    train_group(resumed, world.out / "lora")
    return world


def _model(world: World, row: Row) -> Path:
    return world.tied if row.name.endswith("-tied") else world.model


def _flags(world: World, row: Row, name: str) -> list[str]:
    return [
        *["--pretrained", str(_model(world, row))],
        *["--dataset", str(world.pretrain / "part-00000"), "--max_steps", str(row.steps)],
        *["--save_dir", str(world.out / "lora" / name), "--save_interval", str(MIDDLE)],
        *["--lr", "0.01", "--warmup_steps", "1", "--grad_clip", str(GRAD_CLIP)],
        *["--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), *row.flags.split()],
    ]


def _checkpoint(world: World, name: str, step: int | None = None) -> Path:
    save_dir = world.out / "lora" / name
    if step is None:
        return save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()
    (found,) = save_dir.glob(f"epoch-*_step-{step}")
    return found


def _metrics(world: World, name: str) -> dict[int, dict[str, float]]:
    lines = (world.out / "lora" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def _ids(world: World) -> torch.Tensor:
    return torch.arange(2, 66).view(2, 32)


@torch.no_grad()
@functools.cache
def _mean_loss(model: Path, part: Path) -> float:
    """Of the data that was trained on."""
    rows = open_parts([part], model, 512)
    batch = collate(rows.take(range(len(rows))), pad_id=0)
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    return float(loaded(**batch).loss)


@by_name
def test_trains(runs: World, row: Row) -> None:
    part = runs.pretrain / "part-00000"
    before, after = (
        _mean_loss(model, part)
        for model in (_model(runs, row), _checkpoint(runs, row.name) / "modeling")
    )
    assert after < before - 0.01


@by_name
def test_resumed_run_equals_uninterrupted_one(runs: World, row: Row) -> None:
    wanted, found = _metrics(runs, row.name), _metrics(runs, f"{row.name}-resumed")
    assert sorted(found) == list(range(MIDDLE + 1, row.steps + 1))
    for step in found:
        for name in ("loss", "grad_norm", "learning_rate", "tokens", "loss_scale"):
            assert found[step][name] == wanted[step][name], (step, name)
    straight, resumed = (_checkpoint(runs, n) for n in (row.name, f"{row.name}-resumed"))
    for folder in ("modeling", "adapter", "optimizer", "rng"):
        paths = sorted((straight / folder).glob("*.safetensors"))
        assert paths
        for path in paths:
            assert path.read_bytes() == (resumed / folder / path.name).read_bytes(), path
    base = json.loads((straight / "adapter" / "base.json").read_text())
    assert base["directory"] == str(_model(runs, row).resolve())
    assert (resumed / "adapter" / "base.json").read_text() == json.dumps(base, indent=2) + "\n"


@by_name
@torch.no_grad()
def test_adapter_and_sum_are_the_same_model(runs: World, row: Row) -> None:
    checkpoint = _checkpoint(runs, row.name)
    base = AutoModelForCausalLM.from_pretrained(_model(runs, row), torch_dtype=torch.float32)
    before = base(_ids(runs)).logits
    with_adapter = PeftModel.from_pretrained(base, checkpoint / "adapter").eval()
    merged, report = AutoModelForCausalLM.from_pretrained(
        checkpoint / "modeling", output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted, found = with_adapter(_ids(runs)).logits, merged(_ids(runs)).logits
    moved = (wanted - before).abs().max()
    # The sum is rounded to the working dtype, adapter and base are not rounded together.
    assert (found - wanted).abs().max() < (1e-4 if FP32 in row.flags else 0.1) * moved
    with with_adapter.disable_adapter():
        assert torch.equal(with_adapter(_ids(runs)).logits, before)
    # Base weights that PEFT leaves alone are the base's, to the bit.
    embeddings = EMBEDDINGS in row.flags
    _compare_frozen(_model(runs, row), checkpoint, embeddings, ROWS in row.flags)


def _compare_frozen(model: Path, checkpoint: Path, embeddings: bool, in_part: bool) -> None:
    adapted = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    merged = load_file(checkpoint / "modeling" / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        embedding = "embed_tokens" in name or "lm_head" in name
        trained = name.split(".")[-2] in adapted["target_modules"] or (embeddings and embedding)
        before, after = tensor.to(merged[name].dtype), merged[name]
        assert torch.equal(before, after) == (not trained), name
        if embedding and in_part:
            assert torch.equal(before[:OLD_ROWS], after[:OLD_ROWS])


class _PeftLoop(PlainLoop):
    """PEFT's own model, trained by AdamW."""

    def __init__(self, setting: Setting, modules: list[str], embeddings: bool) -> None:
        super().__init__(setting)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules,
            modules_to_save=["embed_tokens", "lm_head"] if embeddings else None,
        )  # fmt: skip
        torch.manual_seed(setting.seed)
        self.model = get_peft_model(self.model, config)
        self.model.train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters = {n: p.detach().float().clone() for n, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )


@pytest.mark.parametrize("row", [r for r in TABLE if FP32 in r.flags], ids=lambda row: row.name)
def test_agrees_with_plain_peft(runs: World, row: Row) -> None:
    found = _metrics(runs, row.name)
    setting = Setting(
        model=_model(runs, row),
        part=runs.pretrain / "part-00000",
        seed=42,
        batch_size=4,
        ranks=2,
        passes=2 if TWICE_1 in row.flags else 1,
        dtype=torch.float32,
        grad_clip=GRAD_CLIP,
    )
    plans = [Plan(step["learning_rate"], scale=None, skipped=False) for step in found.values()]
    modules = SOME.split()[1:] if SOME in row.flags else ALL
    plain = _PeftLoop(setting, modules, EMBEDDINGS in row.flags).run(plans)
    assert max(step.grad_norm or 0 for step in plain.steps) > GRAD_CLIP, "clipping should bite"
    for ours, wanted in zip(found.values(), plain.steps, strict=True):
        assert ours["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(wanted.grad_norm, rel=1e-4)
    adapter = load_file(_checkpoint(runs, row.name) / "adapter" / "adapter_model.safetensors")
    names = {name.replace(".default", "").replace(".modules_to_save", ""): name
             for name in plain.after}  # fmt: skip
    assert names.keys() == adapter.keys()
    for name, there in names.items():
        torch.testing.assert_close(adapter[name], plain.after[there], rtol=1e-3, atol=1e-4)
