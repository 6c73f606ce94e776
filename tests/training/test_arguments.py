"""The flags of training: every problem at once, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_llama import command
from colossal_llama.errors import UsageError
from colossal_llama.training.arguments import PLUGINS, TrainOptions, is_checkpoint

Paths = dict[str, Path]


def parse(paths: Paths, *flags: str) -> TrainOptions:
    argv = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"]), *flags]
    return command.parse(TrainOptions, argv)


def problems(paths: Paths, *flags: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse(paths, *flags)
    return caught.value.problems


def test_defaults_have_no_problem(paths: Paths) -> None:
    options = parse(paths)
    assert options.plugin == "gemini"
    assert options.mixed_precision == "fp16"
    assert options.neftune_noise_alpha == 5, "the paper's value"


def test_missing_inputs_are_reported_together(tmp_path: Path) -> None:
    argv = ["--pretrained", "no-model", "--dataset", "no-data", str(tmp_path / "none"), "--tp", "0"]
    with pytest.raises(UsageError) as caught:
        command.parse(TrainOptions, argv)
    for name in ("no-model", "no-data", str(tmp_path / "none"), "--tp"):
        assert sum(name in problem for problem in caught.value.problems) == 1, name
    assert len(caught.value.problems) == 4


def test_every_number_out_of_range_is_reported(paths: Paths) -> None:
    at_least_one = ["num_epochs", "micro_batch_size", "max_length", "accumulation_steps"]
    not_negative = [
        *("save_interval", "weight_decay", "grad_clip", "neftune_noise_alpha", "lr"),
        "warmup_steps",
    ]
    flags = [text for name in at_least_one for text in (f"--{name}", "0")]
    flags += [text for name in not_negative for text in (f"--{name}", "-1")]
    found = problems(paths, *flags, "--zero", "3")
    for name in (*at_least_one, *not_negative, "zero"):
        assert any(problem.startswith(f"--{name} ") for problem in found), name
    parse(paths, *[text for name in at_least_one for text in (f"--{name}", "1")])
    parse(paths, *[text for name in not_negative for text in (f"--{name}", "0")])


def test_weights_fit_the_datasets(paths: Paths) -> None:
    data, weights = str(paths["data"]), str(paths["weights"])
    for flags, words in (
        (["--dataset", data, "--dataset_weights", "0.5,0.5"], "2 weights for 1 datasets"),
        (["--dataset", data, weights, "--dataset_weights", "1"], "1 weights for 2 datasets"),
        (["--dataset", data, weights, "--dataset_weights", "1,0"], "must be positive"),
        (["--dataset", data, weights, "--dataset_weights=-0.5,1.5"], "must be positive"),
        (["--dataset", data, weights, "--dataset_weights", "nan,1"], "must be positive"),
        (["--dataset", data, weights, "--dataset_weights", "0.7,0.298"], "add up to 1, not 0.998"),
        (["--dataset", data, weights, "--dataset_weights", "inf,1"], "add up to 1, not inf"),
    ):
        (problem,) = problems(paths, *flags)
        assert problem.startswith("--dataset_weights ")
        assert words in problem
    flags = ["--dataset", data, weights, data, "--dataset_weights", "0.333,0.333,0.3335"]
    assert parse(paths, *flags).dataset_weights == [0.333, 0.333, 0.3335]


def test_order_of_the_data(paths: Paths) -> None:
    options = parse(paths)
    assert (options.data_order, options.dataset_weights) == ("buckets", None)
    assert options.verify_data == "size"
    options = parse(paths, "--data_order", "shuffled", "--verify_data", "full")
    assert (options.data_order, options.verify_data) == ("shuffled", "full")
    for flag in ("--data_order", "--verify_data"):
        (problem,) = problems(paths, flag, "sorted")
        assert flag in problem


@pytest.mark.parametrize("flag", ["--tp", "--pp", "--sp"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_only_plugin_3d_divides_the_model(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, plugin: str, flag: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--plugin", plugin, flag, "2", "--accumulation_steps", "2"]
    if plugin == "3d":
        parse(paths, *flags)
    else:
        assert problems(paths, *flags) == [f"{flag} needs --plugin 3d, not {plugin}"]


@pytest.mark.parametrize(
    ("processes", "tp", "pp", "sp", "fits"),
    [
        *((8, 2, 2, 1, True), (8, 2, 1, 4, True), (8, 8, 1, 1, True), (6, 3, 2, 1, True)),
        *((6, 4, 1, 1, False), (8, 3, 1, 1, False), (4, 4, 2, 1, False), (1, 2, 1, 1, False)),
    ],
)
def test_layout_has_to_divide_the_processes(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, processes: int, tp: int, pp: int, sp: int,
    fits: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags = ["--plugin", "3d", "--tp", str(tp), "--pp", str(pp), "--sp", str(sp)]
    if fits:
        parse(paths, *flags)
    else:
        (problem,) = problems(paths, *flags)
        assert f"does not divide the {processes} processes" in problem
        assert f"= {tp * pp * sp} " in problem


def test_combinations_that_cannot_work_are_refused(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for flags, word in (
        (["--pp", "2", "--zero", "2"], "--zero"),
        (["--pp", "2", "--sp", "2"], "--sp"),
        (["--pp", "4", "--accumulation_steps", "3"], "--accumulation_steps"),
    ):
        (problem,) = problems(paths, "--plugin", "3d", *flags)
        assert word in problem
    for flags in (
        ["--pp", "2", "--zero", "1"],
        ["--pp", "4", "--accumulation_steps", "4"],
        ["--tp", "2", "--zero", "2"],
    ):
        parse(paths, "--plugin", "3d", *flags)


def test_content_decides_what_is_loaded(paths: Paths, tmp_path: Path) -> None:
    """A checkpoint may be called anything, and so may a model directory."""
    misleading = tmp_path / "epoch-0_step-10" / "modeling"
    misleading.parent.mkdir()
    paths["weights"].rename(misleading)
    for path, expected in ((paths["checkpoint"], True), (misleading, False)):
        options = parse(paths, "--load_checkpoint", str(path))
        assert options.load_checkpoint is not None
        assert is_checkpoint(options.load_checkpoint) is expected
    for path in (misleading.parent, tmp_path / "absent"):
        (problem,) = problems(paths, "--load_checkpoint", str(path))
        assert str(path) in problem


def test_other_spellings(paths: Paths) -> None:
    options = parse(paths, "--gradient_clipping", "0.5", "-w", "0.01", "-s", "7", "--zero", "0")
    assert (options.grad_clip, options.weight_decay) == (0.5, 0.01)
    assert (options.warmup_steps, options.zero_stage) == (7, 0)


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
    ],
)
def test_saved_config_reruns_the_same(paths: Paths, tmp_path: Path, flags: list[str]) -> None:
    options = parse(paths, *flags)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(command.as_dict(options)), encoding="utf-8")
    assert command.parse(TrainOptions, ["--config", str(saved)]) == options
