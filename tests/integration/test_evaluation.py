"""Evaluation gives the same figures on every plugin, and changes nothing of the training.

The rows of the table share one process group; each is trained with and without evaluation.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from colossal_llama.dataset.loader import TrainingRows, open_parts
from colossal_llama.evaluation.perplexity import evaluate_model, read_texts
from colossal_llama.inference.loading import load_model_and_tokenizer
from tests.integration.conftest import World, call, train_group
from tests.integration.seeded_text import code, prose


class Row(NamedTuple):
    name: str
    flags: str


STEPS, INTERVAL = 3, 2
EVALUATED = [2, 3]
BF16, FP32 = "--mixed_precision bf16", "--mixed_precision fp32"
TWICE_1 = "--micro_batch_size 1 --accumulation_steps 2"
TWICE_2 = "--micro_batch_size 2 --accumulation_steps 2"
APART = "--attention_across_documents false"
TABLE = [
    Row("gemini", f"--plugin gemini {BF16} --micro_batch_size 2"),
    Row("gemini-twice", f"--plugin gemini {BF16} {TWICE_1}"),
    Row("zero2", f"--plugin zero2 {BF16} --micro_batch_size 2"),
    Row("zero2-fp32", f"--plugin zero2 {FP32} --micro_batch_size 2"),
    Row("zero2-apart", f"--plugin zero2 {FP32} --micro_batch_size 2 {APART} --use_neft"),
    Row("3d-tp", f"--plugin 3d --tp 2 {BF16} --micro_batch_size 4"),
    Row("3d-pp", f"--plugin 3d --pp 2 {BF16} {TWICE_2}"),
    Row("3d-pp-tied", f"--plugin 3d --pp 2 {BF16} {TWICE_2} --use_neft"),
    Row("3d-sp", f"--plugin 3d --sp 2 {BF16} --micro_batch_size 4"),
]
by_name = pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])


@pytest.fixture(scope="module")
def held_out(world: World) -> Path:
    """Short documents with a row each, 23 of them: no batch size of the table divides that."""
    root = world.out.parent / "held_out"
    root.mkdir()
    texts = [("en", prose(20 + 11 * n, 900 + n)) for n in range(13)]
    texts += [("code", code(60, 900 + n)) for n in range(5)]
    texts += [("zh", text) for text in ("中文，没有空格", " 空格", "第三\n\n行 ", "🙂", "naïve")]
    lines = (json.dumps({"source": "", "target": t, "category": c}) + "\n" for c, t in texts)
    (root / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = ["--data_input_dirs", root / "text.jsonl", "--tokenizer_dir", world.model]
    flags += ["--data_arrow_output_dir", root / "data", "--max_length", 512, "--packing", "none"]
    call([sys.executable, "prepare_pretrain_dataset.py", *map(str, flags)])
    return root


def _model(world: World, row: Row) -> Path:
    return world.tied if "tied" in row.name else world.model


def _evaluated_on(world: World, held_out: Path, row: Row) -> Path:
    # Rows of several documents, where it matters what attends to what.
    return world.pretrain / "part-00001" if APART in row.flags else held_out / "data"


@pytest.fixture(scope="module")
def runs(world: World, held_out: Path) -> Path:
    """Where each row's run is, and what all of them said."""
    out = world.out / "evaluation"
    jobs = []
    for row in TABLE:
        flags = [
            *["--pretrained", str(_model(world, row)), "--max_steps", str(STEPS)],
            *["--dataset", str(world.pretrain / "part-00000"), "--max_length", "512"],
            *["--lr", "0.01", "--warmup_steps", "1", *row.flags.split()],
        ]
        data = str(_evaluated_on(world, held_out, row))
        evaluated = ["--eval_dataset", data, "--eval_interval", str(INTERVAL)]
        jobs.append([*flags, "--save_dir", str(out / row.name / "with"), *evaluated])
        jobs.append([*flags, "--save_dir", str(out / row.name / "without")])
    said = train_group(jobs, out)
    (out / "said").write_text(said, encoding="utf-8")
    return out


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _evaluations(runs: Path, row: Row) -> list[dict[str, Any]]:
    return _lines(runs / row.name / "with" / "evaluation.jsonl")


def _last(save_dir: Path) -> Path:
    return save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()


@by_name
def test_training_does_not_notice(runs: Path, row: Row) -> None:
    with_, without = runs / row.name / "with", runs / row.name / "without"
    assert not (without / "evaluation.jsonl").exists()
    names = ("step", "loss", "loss_by_category", "grad_norm", "learning_rate", "tokens")
    found, wanted = (
        [{name: line[name] for name in names} for line in _lines(run / "metrics.jsonl")]
        for run in (with_, without)
    )
    assert len(found) == STEPS
    assert found == wanted
    paths = sorted(_last(without).rglob("*.safetensors"))
    assert {"modeling", "optimizer", "rng"} <= {path.parent.name for path in paths}
    for path in paths:
        ours = load_file(_last(with_) / path.relative_to(_last(without)))
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, ours[name]), (path.name, name)


def _plain(
    model_dir: Path, rows: TrainingRows, dtype: torch.dtype, *, apart: bool
) -> tuple[float, dict[str, float]]:
    """The mean loss over all tokens that carry one, and that of each category."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=dtype).eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in rows.take(range(len(rows))):
        ids = torch.tensor(row["input_ids"]).long()
        parts = ids.split(row["document_lengths"].tolist()) if apart else [ids]
        with torch.inference_mode():
            logits = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
        labels = torch.tensor(row["labels"]).long()[1:]
        loss = cross_entropy(logits[:-1].float(), labels, reduction="sum")
        name = row["category"]
        sums[name] = sums.get(name, 0.0) + float(loss)
        counts[name] = counts.get(name, 0) + int((labels != -100).sum())
    by_category = {name: sums[name] / counts[name] for name in sums if counts[name]}
    return sum(sums.values()) / sum(counts.values()), by_category


@by_name
def test_agrees_with_plain_transformers(runs: Path, world: World, held_out: Path, row: Row) -> None:
    evaluations = _evaluations(runs, row)
    assert [record["step"] for record in evaluations] == EVALUATED
    data, apart = _evaluated_on(world, held_out, row), APART in row.flags
    rows = open_parts([data], world.model, 512)
    exact = FP32 in row.flags
    dtype = torch.float32 if exact else torch.bfloat16
    last = _last(runs / row.name / "with") / "modeling"
    loss, by_category = _plain(last, rows, dtype, apart=apart)
    tolerance = 1e-6 if exact else 1e-3
    assert evaluations[-1]["loss"] == pytest.approx(loss, rel=tolerance)
    assert evaluations[-1]["loss_by_category"] == pytest.approx(by_category, rel=tolerance)
    assert evaluations[-1]["rows"] == len(rows)
    if apart:
        assert loss != pytest.approx(_plain(last, rows, dtype, apart=False)[0], rel=1e-4)


def test_plugins_agree(runs: Path) -> None:
    # Not those of another model, or with another mask.
    alike = [row for row in TABLE if "tied" not in row.name and "apart" not in row.name]
    wanted = _evaluations(runs, TABLE[2])
    for row in alike:
        for found, expected in zip(_evaluations(runs, row), wanted, strict=True):
            assert found["tokens"] == expected["tokens"]
            # The weights themselves drift apart in half precision.
            for name in ("loss", "bits_per_byte"):
                assert found[name] == pytest.approx(expected[name], rel=5e-3), (row.name, name)


def test_bits_per_byte_are_those_of_the_command_that_reads_text(runs: Path, held_out: Path) -> None:
    (row,) = (row for row in TABLE if row.name == "zero2-fp32")
    last = _last(runs / row.name / "with") / "modeling"
    model, tokenizer = load_model_and_tokenizer(last, "cpu", "float32")
    texts = read_texts([held_out / "text.jsonl"])
    wanted = evaluate_model(model, tokenizer, texts, max_length=512)["categories"]
    found = _evaluations(runs, row)[-1]
    for name, score in wanted.items():
        assert not score["windowed"]
        assert found["bits_per_byte_by_category"][name] == pytest.approx(
            score["bits_per_byte"], rel=1e-6
        )
    bits = sum(score["bits_per_byte"] * score["bytes"] for score in wanted.values())
    size = sum(score["bytes"] for score in wanted.values())
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)


def test_it_is_said(runs: Path) -> None:
    said = (runs / "said").read_text(encoding="utf-8")
    first = _evaluations(runs, TABLE[0])[0]
    loss, bits = f"{first['loss']:.4f}", f"{first['bits_per_byte']:.4f}"
    assert re.search(rf"step 2: evaluation loss {loss} \(.*\), {bits} bits per byte \(.*\)", said)
    assert said.count("may share documents with the parts beside it") == 1
