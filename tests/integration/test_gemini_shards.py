"""Gemini with a model that is divided over the ranks: it learns, saves and resumes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.conftest import World
from tests.nursery import run_group

STEPS_SAVED = 2


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings in one process group: sharded, resumed, and with a plugin to agree with."""
    out = tmp_path_factory.mktemp("shards")

    def flags(name: str, plugin: str, *more: str) -> list[str]:
        return [
            *["--pretrained", str(world.model), "--dataset", str(world.pretrain / "part-00000")],
            *["--save_dir", str(out / name), "--save_interval", str(STEPS_SAVED)],
            *["--lr", "0.01", "--warmup_steps", "1", "--grad_clip", "0.5", "--plugin", plugin],
            *["--mixed_precision", "bf16", "--accumulation_steps", "2", *more],
        ]

    def middle_of(name: str) -> list[str]:
        return ["--load_checkpoint", str(out / name / f"epoch-0_step-{STEPS_SAVED}")]

    jobs = [
        flags("sharded", "gemini"),
        flags("resumed", "gemini", *middle_of("sharded")),
        flags("zero2", "zero2"),
        flags("from-sharded", "zero2", *middle_of("sharded")),
        flags("to-sharded", "gemini", *middle_of("zero2")),
    ]
    listing = out / "jobs.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    run_group("tests/integration/shard_worker.py", str(listing))
    return out


def metrics(save_dir: Path) -> dict[int, dict[str, float]]:
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def last(save_dir: Path) -> Path:
    return save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()


def test_the_model_really_is_divided(runs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(last(runs / "sharded") / "modeling")
    ranks = [
        sum(tensor.numel() for name, tensor in load_file(path).items() if name.endswith("master"))
        for path in sorted((last(runs / "sharded") / "optimizer").glob("*.safetensors"))
    ]
    assert sum(ranks) == sum(parameter.numel() for parameter in model.parameters())
    assert min(ranks) > 0


def test_it_learns_what_another_plugin_learns(runs: Path) -> None:
    found, wanted = metrics(runs / "sharded"), metrics(runs / "zero2")
    assert found.keys() == wanted.keys()
    assert len(found) > STEPS_SAVED + 1
    # The first step starts from equal weights. Gradients are added up in another order in bf16.
    assert found[1]["loss"] == pytest.approx(wanted[1]["loss"], rel=1e-6)
    assert found[1]["grad_norm"] == pytest.approx(wanted[1]["grad_norm"], rel=1e-4)
    for step in wanted:
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-3)
        assert found[step]["grad_norm"] == pytest.approx(wanted[step]["grad_norm"], rel=1e-2)


def test_resumed_run_equals_uninterrupted_one(runs: Path) -> None:
    wanted, found = metrics(runs / "sharded"), metrics(runs / "resumed")
    assert min(found) == STEPS_SAVED + 1
    for step in found:
        for name in ("loss", "grad_norm"):
            assert found[step][name] == wanted[step][name], (step, name)


@pytest.mark.parametrize(
    ("before", "after"), [("sharded", "from-sharded"), ("zero2", "to-sharded")]
)
def test_moments_go_from_one_plugin_to_the_other(runs: Path, before: str, after: str) -> None:
    wanted, found = metrics(runs / before), metrics(runs / after)
    assert min(found) == STEPS_SAVED + 1
    for step in found:  # with new moments they would differ by percents
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-3)


def test_transformers_loads_what_was_saved(runs: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        last(runs / "sharded") / "modeling", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(
        runs / "sharded" / f"epoch-0_step-{STEPS_SAVED}" / "modeling"
    )
    for name, tensor in before.state_dict().items():
        assert not tensor.equal(model.state_dict()[name]), name
