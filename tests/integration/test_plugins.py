"""Every plugin trains, saves, resumes bit for bit, and leaves what transformers loads.

The rows of the table share two process groups: one trains all of them, one resumes all of them
from the middle. What they should agree with is written down in ``plain_loop.py``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import World, train_group
from tests.integration.plain_loop import Step, train_plainly


class Row(NamedTuple):
    name: str
    description: str
    flags: str


# Four rows a step for pretraining data, eight for conversations, however they are spread.
EACH_2, EACH_4 = "--micro_batch_size 2", "--micro_batch_size 4"
TWICE_1 = "--micro_batch_size 1 --accumulation_steps 2"
TWICE_2 = "--micro_batch_size 2 --accumulation_steps 2"
TWICE_4 = "--micro_batch_size 4 --accumulation_steps 2"
BF16, FP32 = "--mixed_precision bf16", "--mixed_precision fp32"
FROZEN = "--freeze_non_embeds_params"
NEFT = "--use_neft"
TABLE = [
    Row("gemini", "ZeRO 3 in chunks", f"--plugin gemini {BF16} {EACH_2}"),
    Row("gemini-twice", "accumulated gradients", f"--plugin gemini {BF16} {TWICE_1}"),
    Row("gemini-frozen", "embeddings only", f"--plugin gemini {BF16} {EACH_2} {FROZEN}"),
    Row("gemini-fp16", "with a loss scale", f"--plugin gemini {EACH_2}"),
    Row("gemini_auto", "static placement on a CPU", f"--plugin gemini_auto {BF16} {EACH_2}"),
    Row("zero2", "sharded gradients", f"--plugin zero2 {BF16} {EACH_2}"),
    Row("zero2-twice", "accumulated gradients", f"--plugin zero2 {BF16} {TWICE_1}"),
    Row("zero2-frozen", "embeddings only", f"--plugin zero2 {BF16} {EACH_2} {FROZEN}"),
    Row("zero2-fp32", "full precision", f"--plugin zero2 {FP32} {EACH_2}"),
    Row("zero2-fp16", "with a loss scale", f"--plugin zero2 {EACH_2}"),
    Row(
        "zero2-recompute", "checkpointing", f"--plugin zero2 {BF16} {EACH_2} --use_grad_checkpoint"
    ),
    Row("zero2-sft", "padded rows, noise", f"--plugin zero2 {BF16} {TWICE_2} {NEFT}"),
    Row("zero2_cpu", "optimizer in host memory", f"--plugin zero2_cpu {BF16} {EACH_2}"),
    Row("3d-zero0", "plain data parallel", f"--plugin 3d --zero 0 {BF16} {EACH_2}"),
    Row("3d-zero1", "sharded optimizer", f"--plugin 3d --zero 1 {BF16} {EACH_2}"),
    Row("3d-zero2", "sharded gradients", f"--plugin 3d --zero 2 {BF16} {EACH_2}"),
    Row("3d-tp", "tensor parallel", f"--plugin 3d --tp 2 {BF16} {EACH_4}"),
    Row("3d-tp-frozen", "embeddings only", f"--plugin 3d --tp 2 {BF16} {EACH_4} {FROZEN}"),
    Row("3d-tp-fp16", "with a loss scale", f"--plugin 3d --tp 2 {EACH_4}"),
    Row("3d-tp-fp32", "full precision", f"--plugin 3d --tp 2 {FP32} {EACH_4}"),
    Row("3d-tp-sft", "padded rows, noise", f"--plugin 3d --tp 2 {BF16} {TWICE_4} {NEFT}"),
    Row("3d-pp", "two stages", f"--plugin 3d --pp 2 {BF16} {TWICE_2}"),
    Row("3d-pp-frozen", "embeddings only", f"--plugin 3d --pp 2 {BF16} {TWICE_2} {FROZEN}"),
    Row("3d-pp-fp32", "full precision", f"--plugin 3d --pp 2 {FP32} {TWICE_2}"),
    Row("3d-pp-sft", "padded rows, noise", f"--plugin 3d --pp 2 {BF16} {TWICE_4} {NEFT}"),
    Row("3d-sp", "sequence parallel", f"--plugin 3d --sp 2 {BF16} {EACH_4}"),
    Row("3d-sp-zero0", "without ZeRO", f"--plugin 3d --sp 2 --zero 0 {BF16} {EACH_4}"),
    Row("3d-sp-sft", "padded rows, noise", f"--plugin 3d --sp 2 {BF16} {TWICE_4} {NEFT}"),
]
MIDDLE = 2
GRAD_CLIP = 0.5


def _is_sft(row: Row) -> bool:
    return row.name.endswith("-sft")


def _part(world: World, row: Row) -> Path:
    return (world.sft if _is_sft(row) else world.pretrain) / "part-00000"


def _flags(world: World, row: Row, save_dir: Path) -> list[str]:
    return [
        *["--pretrained", str(world.model), "--dataset", str(_part(world, row))],
        *["--save_dir", str(save_dir), "--save_interval", str(MIDDLE), "--max_length", "512"],
        *["--lr", "0.01", "--warmup_steps", "1", "--grad_clip", str(GRAD_CLIP)],
        *row.flags.split(),
    ]


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Trains every row straight through, then again from the middle in new processes."""
    out = world.out
    train_group([_flags(world, row, out / row.name) for row in TABLE], out)
    resumed = [
        [
            *_flags(world, row, out / f"{row.name}-resumed"),
            *["--load_checkpoint", str(_checkpoints(out / row.name)[MIDDLE])],
        ]
        for row in TABLE
    ]
    by_row = {row.name: row for row in TABLE}
    other = _flags(world, by_row["3d-tp"], out / "zero2-as-3d-tp")
    middle = str(_checkpoints(out / "zero2")[MIDDLE])
    said = train_group([*resumed, [*other, "--load_checkpoint", middle]], out)
    (out / "said").write_text(said, encoding="utf-8")
    return world


def _checkpoints(save_dir: Path) -> dict[int, Path]:
    return {int(path.name.split("step-")[1]): path for path in save_dir.glob("epoch-*_step-*")}


def _metrics(save_dir: Path) -> dict[int, dict[str, float]]:
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def _last(save_dir: Path) -> Path:
    return save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()


by_name = pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])


@by_name
def test_resumed_run_equals_uninterrupted_one(runs: World, row: Row) -> None:
    straight, resumed = runs.out / row.name, runs.out / f"{row.name}-resumed"
    wanted, found = _metrics(straight), _metrics(resumed)
    assert min(found) == MIDDLE + 1, "resumed at the wrong step"
    for step in found:
        for name in ("loss", "grad_norm", "learning_rate", "tokens", "loss_scale"):
            assert found[step][name] == wanted[step][name], (step, name)
    assert _last(straight).name == _last(resumed).name
    for folder in ("modeling", "optimizer", "rng"):
        paths = sorted((_last(straight) / folder).glob("*.safetensors"))
        assert paths
        for path in paths:
            ours = load_file(_last(resumed) / folder / path.name)
            for name, tensor in load_file(path).items():
                assert torch.equal(tensor, ours[name]), (folder, path.name, name)


@functools.cache
def _plain(
    world: World, part: Path, rates: tuple[float, ...], *, frozen: bool, dtype: torch.dtype
) -> list[Step]:
    sft = part.parent == world.sft
    return train_plainly(
        world.model,
        part,
        list(rates),
        batch_size=8 if sft else 4,
        grad_clip=GRAD_CLIP,
        frozen=frozen,
        dtype=dtype,
        noise_alpha=5.0 if sft else None,
        seed=42,
    )


@by_name
def test_agrees_with_plain_pytorch(runs: World, row: Row) -> None:
    found = _metrics(runs.out / row.name)
    rates = tuple(found[step]["learning_rate"] for step in sorted(found))
    dtype = torch.float32 if FP32 in row.flags else torch.bfloat16
    wanted = _plain(runs, _part(runs, row), rates, frozen=FROZEN in row.flags, dtype=dtype)
    assert max(step.grad_norm for step in wanted) > 2 * GRAD_CLIP, "clipping should bite"
    # The first step starts from equal weights; after it half precision drifts apart.
    assert found[1]["loss"] == pytest.approx(wanted[0].loss, rel=1e-3)
    assert found[1]["grad_norm"] == pytest.approx(wanted[0].grad_norm, rel=1e-2)
    drift = 1e-5 if FP32 in row.flags else 1e-2
    for number, step in enumerate(wanted, 1):
        assert found[number]["loss"] == pytest.approx(step.loss, rel=drift), number


@by_name
def test_checkpoint_loads_in_transformers(runs: World, row: Row) -> None:
    directory = _last(runs.out / row.name) / "modeling"
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    source = AutoModelForCausalLM.from_pretrained(runs.model)
    assert model.config.vocab_size == source.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) <= model.config.vocab_size
    # With it transformers may put another space before a text than the tokenizer's files do.
    assert "add_prefix_space" not in (directory / "tokenizer_config.json").read_text()
    assert (tokenizer.chat_template is not None) == _is_sft(row)
    frozen = FROZEN in row.flags
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, source.state_dict()[name])
        assert moved == (not frozen or "embed_tokens" in name or "lm_head" in name), name


def test_another_layout_goes_on_with_the_same_weights_and_rows(runs: World) -> None:
    wanted, found = _metrics(runs.out / "zero2"), _metrics(runs.out / "zero2-as-3d-tp")
    assert found.keys() == {step for step in wanted if step > MIDDLE}
    assert found[MIDDLE + 1]["loss"] == pytest.approx(wanted[MIDDLE + 1]["loss"], rel=2e-3)
    for step in found:
        assert found[step]["tokens"] == wanted[step]["tokens"]
        assert found[step]["learning_rate"] == wanted[step]["learning_rate"]
    said = (runs.out / "said").read_text(encoding="utf-8")
    assert said.count("moments start anew") == 1
