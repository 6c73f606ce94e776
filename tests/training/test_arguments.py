"""The flags of training: their defaults and spellings, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama import command
from colossal_llama.errors import UsageError
from colossal_llama.training.arguments import TrainOptions
from tests.training.stand_ins import ROOT

Paths = dict[str, Path]


def parse(paths: Paths, *flags: str) -> TrainOptions:
    argv = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"]), *flags]
    return command.parse(TrainOptions, argv)


def test_defaults_have_no_problem(paths: Paths) -> None:
    options = parse(paths)
    assert options.plugin == "gemini"
    assert options.mixed_precision == "fp16"
    assert options.neftune_noise_alpha == 5, "the paper's value"
    assert (options.data_order, options.dataset_weights) == ("buckets", None)
    assert options.verify_data == "size"


def test_choices_are_refused_where_there_are_others(paths: Paths) -> None:
    options = parse(paths, "--data_order", "shuffled", "--verify_data", "full")
    assert (options.data_order, options.verify_data) == ("shuffled", "full")
    with_choices = [
        field.name for field in dataclasses.fields(TrainOptions) if field.metadata["choices"]
    ]
    assert {"plugin", "mixed_precision", "data_order", "on_save_error"} <= {*with_choices}
    for name in with_choices:
        with pytest.raises(UsageError) as caught:
            parse(paths, f"--{name}", "something-else")
        (problem,) = caught.value.problems
        assert name in problem


def test_other_spellings(paths: Paths) -> None:
    options = parse(paths, "--gradient_clipping", "0.5", "-w", "0.01", "-s", "7")
    assert (options.grad_clip, options.weight_decay) == (0.5, 0.01)
    assert options.warmup_steps == 7
    assert parse(paths, "--plugin", "3d", "--zero", "0").zero_stage == 0


def test_what_is_loaded_is_a_path_or_a_word(paths: Paths) -> None:
    assert parse(paths).load_checkpoint is None
    assert parse(paths, "--load_checkpoint", "auto").load_checkpoint == "auto"
    checkpoint = str(paths["checkpoint"])
    assert parse(paths, "--load_checkpoint", checkpoint).load_checkpoint == checkpoint


def test_flags_override_a_yaml_recipe(paths: Paths, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pretrained: {paths['model']}\ndataset: [{paths['data']}]\nlr: 1e-5\n"
        "plugin: zero2\nuse_neft: yes\nwarmup_steps: null\ngradient_clipping: 0.25\n",
        encoding="utf-8",
    )
    options = command.parse(TrainOptions, ["--config", str(recipe), "--lr", "2e-5"])
    assert options.lr == 2e-5
    assert (options.plugin, options.use_neft) == ("zero2", True)
    assert (options.warmup_steps, options.grad_clip) == (None, 0.25)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_neft", "--lr", "1e-05", "--mixed_precision", "bf16", "--plugin", "zero2_cpu"],
        ["--dataset_weights", "1.0", "--data_order", "shuffled", "--verify_data", "off"],
        ["--accumulation_steps", "4", "-s", "0", "--config_file", "x.json", "--grad_clip", "0"],
        ["--load_checkpoint", "auto", "--report_to", "jsonl,tensorboard", "--max_time", "90m"],
        ["--attention_across_documents", "false", "--hang_timeout", "0", "--freeze", "a.*", "b"],
    ],
)
def test_saved_config_reruns_the_same(paths: Paths, tmp_path: Path, flags: list[str]) -> None:
    options = parse(paths, *flags)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(command.as_dict(options)), encoding="utf-8")
    assert command.parse(TrainOptions, ["--config", str(saved)]) == options
    command.check_config(options)


def test_help_names_every_flag_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from colossal_llama.training.train import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', *sorted({'torch', 'transformers', 'colossalai', 'numpy', 'datasets'} "
        "& sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    text, _, heavy = done.stdout.rpartition("HEAVY")
    assert heavy.split() == []
    for field in dataclasses.fields(TrainOptions):
        assert f"--{field.name}" in text, field.name
