"""What the estimate is made of, without training; ``test_estimate_measured.py`` trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_llama import cli, command
from colossal_llama.model.configuration import read_fields
from colossal_llama.training.estimate import EstimateOptions, configuration_path
from colossal_llama.training.estimation.advice import suggest
from colossal_llama.training.estimation.estimate import (
    Estimate,
    complete_fields,
    make_estimate,
)
from colossal_llama.training.estimation.gemini import SMALLEST_CHUNK, Gemini, best_size, pack
from colossal_llama.training.estimation.rank_model import EMBEDDING, HEAD, Weight, pipeline_stages
from colossal_llama.training.estimation.report import GIB
from colossal_llama.training.estimation.sharing import BUCKET, Replicated, Zero

LLAMA2_7B = 6_738_415_616  # weights with 32,000 ids, as its preset says


def options(flags: str) -> EstimateOptions:
    return command.parse(EstimateOptions, flags.split())


def estimate(flags: str) -> Estimate:
    parsed = options(flags)
    path = configuration_path(parsed)
    fields = complete_fields(read_fields(path), path)
    return make_estimate(parsed, fields, parsed.processes, cuda=True)


def run(flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["estimate", *flags.split()])
    said = capsys.readouterr()
    return code, said.out, said.err


def weights(sizes: list[int], *, trained: bool = True) -> list[Weight]:
    return [Weight(f"w{number}", size, trained) for number, size in enumerate(sizes)]


def test_a_7b_model_takes_what_the_papers_say() -> None:
    found = estimate("--pretrained llama2-7b --plugin 3d --zero 0 --pp 1 --max_length 128")
    assert found.parameters == found.trained == LLAMA2_7B
    held = found.stages[0]["forward and loss"]
    assert held.weights == 2 * LLAMA2_7B
    # Masters and moments, and the buckets of DistributedDataParallel.
    assert held.optimizer == (12 + 2) * LLAMA2_7B
    assert found.checkpoint.modeling == 2 * LLAMA2_7B
    assert found.checkpoint.optimizer == 12 * LLAMA2_7B


def test_zero2_divides_the_optimizer_and_gemini_the_weights_too() -> None:
    flags = "--pretrained llama2-7b --mixed_precision bf16 --max_length 128 --world_size 8"
    zero = estimate(f"{flags} --plugin zero2").stages[0]["forward and loss"]
    gemini = estimate(f"{flags} --plugin gemini").stages[0]["forward and loss"]
    assert zero.weights == 2 * LLAMA2_7B
    assert zero.optimizer == pytest.approx(12 * LLAMA2_7B / 8, rel=1e-3)
    # A few percent of the chunks stay unused.
    assert gemini.weights == pytest.approx(2 * LLAMA2_7B / 8, rel=0.15)
    assert gemini.optimizer == pytest.approx(12 * LLAMA2_7B / 8, rel=0.05)


def test_recomputation_keeps_a_layers_input_only() -> None:
    flags = "--pretrained tinyllama-1.1b --plugin zero2 --mixed_precision bf16 --max_length 2048"
    kept = estimate(f"{flags} --use_grad_checkpoint").stages[0]["forward and loss"].activations
    inputs = 22 * 2048 * 2048 * 2
    assert inputs < kept < 1.2 * inputs
    assert kept < estimate(flags).stages[0]["forward and loss"].activations / 10


def test_fused_loss_holds_no_logits() -> None:
    flags = (
        "--pretrained tiny --plugin zero2 --mixed_precision bf16 --max_length 4096 "
        "--micro_batch_size 8 --use_grad_checkpoint"
    )
    logits = 8 * 4096 * 32_000
    assert estimate(flags).peak > 12 * logits
    assert estimate(f"{flags} --fused_loss").peak < 4 * logits


def test_only_trained_weights_have_gradients_and_states() -> None:
    flags = "--pretrained tiny --plugin zero2 --mixed_precision bf16 --max_length 64"
    found = estimate(f"{flags} --freeze_non_embeds_params")
    assert found.trained == 2 * 32_000 * 64
    assert found.checkpoint.optimizer == 12 * found.trained
    adapted = estimate(f"{flags} --lora_rank 8")
    assert 0 < adapted.trained < found.trained
    assert adapted.checkpoint.modeling == found.checkpoint.modeling


def test_first_stage_holds_more_micro_batches() -> None:
    flags = "--pretrained llama2-7b --plugin 3d --pp 4 --accumulation_steps 8 --max_length 1024"
    found = estimate(flags)
    kept = [stage["forward and loss"].activations for stage in found.stages]
    assert kept[0] == pytest.approx(4 * kept[3], rel=0.01)
    assert found.worst_stage == 0


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_on_a_stage(tied: bool) -> None:
    layers = 5
    every = [Weight(EMBEDDING, 10, True)]
    every += [Weight(f"layer{n}", 1, True, layer=n) for n in range(layers)]
    every += [Weight("model.norm.weight", 1, True), *([] if tied else [Weight(HEAD, 10, True)])]
    stages = pipeline_stages(every, layers, options("--pretrained tiny --plugin 3d --pp 2"))
    assert [len(stage.layers) for stage in stages] == [2, 3]  # the rest in the middle
    held = [weight for stage in stages for weight in stage.weights]
    assert set(held) == set(every)
    # A tied head is the embedding once more.
    assert len(held) == len(every) + tied


def test_gemini_keeps_a_small_model_in_one_chunk() -> None:
    small = Gemini(weights([1000, 2000]), 4, accumulates=False, offload=False, cuda=True)
    assert small.working() == 2 * 3000
    assert small.optimizer() == 12 * 3000
    # Every process writes all of it.
    assert small.stored() == 4 * 12 * 3000


def test_gemini_packs_a_large_model_in_order() -> None:
    sizes = [SMALLEST_CHUNK // 2] * 5
    assert best_size(sizes) == SMALLEST_CHUNK  # the last is half empty
    assert [chunk.size for chunk in pack(weights(sizes), 4)] == [SMALLEST_CHUNK] * 3
    # One that is out of the ordinary has a chunk of its own.
    large = pack(weights([*[2**20] * 40, 2**27]), 4)
    assert [chunk.size for chunk in large][-1] == 2**27


def test_zero_reduces_a_bucket_when_it_is_full() -> None:
    half_bucket = BUCKET // 2
    zero = Zero(weights([half_bucket] * 5), 2, 2, 2, False, hooked=True, late=False, gloo=False)
    kept = [held.kept for weight, held in zero.backward(accumulated=False) if weight]
    # Never more than a bucket of gradients beside the shares of those that were reduced.
    assert max(kept) <= 2 * (BUCKET + 4 * half_bucket // 2)
    whole = Replicated(weights([half_bucket] * 5), 2, ddp=False)
    assert max(held.kept for _, held in whole.backward(accumulated=False)) == 2 * 5 * half_bucket


def test_takes_the_configuration_of_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "pretrained: tiny\ndataset: [nowhere]\nplugin: zero2\nmixed_precision: bf16\n"
        "max_length: 64\nkeep_last: 2\n"
    )
    output = tmp_path / "estimate.json"
    code, out, _ = run(f"--config {config} --world_size 2 --output {output}", capsys)
    assert code == 0
    assert "zero2, bf16, processes on cuda: 2" in out
    found = json.loads(output.read_text())
    assert found["peak_per_device"] == max(m["total"] for m in found["stages"][0].values())
    assert found["disk"] == 3 * found["checkpoint"]["total"]
    assert found["fits"] is None


@pytest.mark.parametrize(
    ("flags", "mistake"),
    [
        ("--pretrained nowhere", "neither a model directory"),
        ("--pretrained tiny --plugin 3d --tp 3", "does not divide the model's 4 heads"),
        ("--pretrained tiny --plugin 3d --pp 3", "more than 2 layers"),
        ("--pretrained tiny --plugin 3d --tp 2 --world_size 3", "does not divide the 3 processes"),
        ("--pretrained tiny --world_size 0", "--world_size must be at least 1"),
        ("--pretrained tiny --plugin gemini --fused_loss", "--fused_loss needs"),
        ("--pretrained tiny --device_memory_gib -1", "must be positive"),
        ("--plugin zero2", "--pretrained is required"),
    ],
)
def test_mistakes_are_one_line(
    flags: str, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(flags, capsys)
    assert code == 2
    assert mistake in err
    assert err.count("\n") == 1


def test_a_configuration_that_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    code, _, err = run(f"--pretrained {tmp_path}", capsys)
    assert code == 2
    assert "config.json" in err


def test_says_what_to_change_first(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--pretrained tinyllama-1.1b --plugin zero2 --mixed_precision bf16 --max_length 2048 "
        "--micro_batch_size 8 --world_size 8"
    )
    _, out, _ = run(f"{flags} --device_memory_gib 80", capsys)
    assert "It fits" in out
    parsed = options(f"{flags} --device_memory_gib 4")
    path = configuration_path(parsed)
    fields = complete_fields(read_fields(path), path)
    changes = suggest(parsed, fields, make_estimate(parsed, fields, 8, cuda=True))
    names = [change.flags.split()[0] for change in changes]
    assert names[:3] == ["--use_grad_checkpoint", "--micro_batch_size", "--plugin"]
    peaks = [change.peak for change in changes]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[-1] + GIB <= 4 * GIB


RECIPE = """
variables: {chinese: null}
plugin: zero2
mixed_precision: bf16
stages:
  - {name: embeddings, dataset: [$chinese/part-00000], freeze_non_embeds_params: true}
  - {name: knowledge, dataset: [$chinese]}
"""


def test_each_stage_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if each was asked for alone; its data, which are not looked at, need no path."""
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "estimate.json"
    recipe.write_text(RECIPE, encoding="utf-8")
    flags = "--pretrained tiny --world_size 4 --device_memory_gib 8"
    code, out, _ = run(f"--config {recipe} {flags} --output {output}", capsys)
    assert code == 0
    found = json.loads(output.read_text())
    assert list(found) == ["01-embeddings", "02-knowledge"]
    alone = tmp_path / "alone.json"
    settings = "--plugin zero2 --mixed_precision bf16"
    for name, own in (("01-embeddings", "--freeze_non_embeds_params"), ("02-knowledge", "")):
        _, text, _ = run(f"{flags} {settings} {own} --output {alone} --overwrite", capsys)
        assert found[name] == json.loads(alone.read_text())
        assert f"{name}\n{'-' * len(name)}\n{text}" in out
    peaks = [stage["peak_per_device"] for stage in found.values()]
    assert peaks[0] < peaks[1]
    assert out.endswith(f"The most on a device: {peaks[1] / GIB:,.2f} GiB, in 02-knowledge.\n")


@pytest.mark.parametrize(
    ("flags", "mistake"),
    [
        ("", "error: --pretrained is required"),
        ("--pretrained tiny --tp 2", "error: --tp needs --plugin 3d, not zero2"),
        ("--pretrained tiny --eval_interval 5 --output {}", "--eval_interval needs --eval_dataset"),
        ("--pretrained nowhere --output {}", "nowhere: neither a model directory"),
    ],
)
def test_mistakes_in_recipes_are_one_line(
    flags: str, mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "estimate.json"
    recipe.write_text(RECIPE, encoding="utf-8")
    code, out, err = run(f"--config {recipe} {flags.format(output)}", capsys)
    assert code == 2
    assert mistake in err
    assert err.count("\n") == 1
    assert not out
    assert not output.exists()
