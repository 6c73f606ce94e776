"""Which flags do not go together: each rule with its reason, and what is just allowed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from colossal_llama import command
from colossal_llama.errors import UsageError
from colossal_llama.training.arguments import PLUGINS, TrainOptions
from colossal_llama.training.state import is_checkpoint
from tests.training.conftest import SIZES

Paths = dict[str, Path]


def parse(paths: Paths, *flags: str) -> TrainOptions:
    argv = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"]), *flags]
    return command.parse(TrainOptions, argv)


def problems(paths: Paths, *flags: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse(paths, *flags)
    return caught.value.problems


class Rule(NamedTuple):
    """Flags that are refused, words of the one problem, and flags near them that are not."""

    flags: str
    words: str
    near: str
    processes: int = 1


RULES = [
    *(
        Rule(f"--{name} 0", f"--{name} must be at least 1", f"--{name} 1")
        for name in (
            *("num_epochs", "micro_batch_size", "max_length", "tp", "sp"),
            *("accumulation_steps", "max_steps"),
        )
    ),
    Rule(
        "--eval_dataset . --eval_interval 0",
        "--eval_interval must be at least 1",
        "--eval_dataset . --eval_interval 1",
    ),
    Rule(
        "--use_neft --neftune_noise_alpha -1",
        "--neftune_noise_alpha must not be negative",
        "--use_neft --neftune_noise_alpha 0",
    ),
    Rule("--pp 0", "--pp must be at least 1", "--pp 1"),
    *(
        Rule(f"--{name} -1", f"--{name} must not be negative", f"--{name} 0")
        for name in (
            *("save_interval", "keep_last", "weight_decay", "grad_clip"),
            *("max_bad_steps", "loss_spike_sigma", "lora_rank", "lr"),
            "warmup_steps",
        )
    ),
    *(
        Rule(f"--{name} {value}", f"--{name} must be a finite number", f"--{name} 1")
        for name in ("grad_clip", "loss_spike_sigma", "weight_decay", "lr")
        for value in ("nan", "inf")
    ),
    Rule("--plugin 3d --zero 3", "--zero must be 0, 1 or 2", "--plugin 3d --zero 2"),
    Rule("--plugin zero2 --zero 2", "--zero needs --plugin 3d", "--plugin 3d --zero 2"),
    *(
        Rule(f"--seed {seed}", "--seed must be from 0 to 4294967295", "--seed 4294967295")
        for seed in (-1, 1 << 32)
    ),
    Rule(
        "--load_checkpoint auto --overwrite",
        "--overwrite begins anew, --load_checkpoint auto goes on",
        "--load_checkpoint auto",
    ),
    Rule(
        "--plugin zero2 --lora_rank 4 --lora_alpha -1",
        "--lora_alpha must not be negative",
        "--plugin zero2 --lora_rank 4 --lora_alpha 1",
    ),
    Rule(
        "--plugin zero2 --lora_alpha 8",
        "--lora_alpha needs --lora_rank",
        "--plugin zero2 --lora_rank 4 --lora_alpha 8",
    ),
    Rule(
        "--plugin zero2 --lora_rank 4 --lora_dropout 1",
        "--lora_dropout must be at least 0 and below 1",
        "--plugin zero2 --lora_rank 4 --lora_dropout 0.99",
    ),
    Rule("--max_time soon", "--max_time soon: expected a time such as 23h30m", "--max_time 1h"),
    Rule("--hang_timeout never", "--hang_timeout never: expected a time", "--hang_timeout 0"),
    Rule("--report_to nobody", "--report_to nobody: unknown", "--report_to jsonl"),
    Rule("--plugin 3d --pp 2 --zero 2", "--pp works with --zero 0 or 1", "--plugin 3d --pp 2", 2),
    Rule("--plugin 3d --pp 2 --sp 2", "--pp and --sp cannot be combined", "--plugin 3d --sp 4", 4),
    Rule(
        "--plugin 3d --pp 4 --accumulation_steps 3",
        "--accumulation_steps must be at least --pp (4): every stage",
        "--plugin 3d --pp 4 --accumulation_steps 4",
        4,
    ),
    Rule(
        "--plugin gemini --mixed_precision fp32",
        "--plugin gemini needs --mixed_precision fp16 or bf16",
        "--plugin zero2 --mixed_precision fp32",
    ),
    Rule(
        "--plugin 3d --zero 1 --mixed_precision fp32",
        "with fp32 give --zero 0",
        "--plugin 3d --zero 0 --mixed_precision fp32",
        2,
    ),
    Rule(
        "--plugin 3d --zero 2 --mixed_precision fp32 --sp 2",
        "with fp32 give --zero 0",
        "--plugin 3d --zero 1 --mixed_precision fp32 --tp 2",  # one rank: nothing to shard
        2,
    ),
    *(
        Rule(
            f"--fused_loss --plugin {plugin}",
            f"--fused_loss needs the whole output embedding, which --plugin {plugin} divides",
            "--fused_loss --plugin zero2",
        )
        for plugin in ("gemini", "gemini_auto")
    ),
    Rule(
        "--fused_loss --plugin 3d --tp 2",
        "--fused_loss needs the whole output embedding, which --tp divides",
        "--fused_loss --plugin 3d --pp 2",
        2,
    ),
    *(
        Rule(
            f"--attention_across_documents false --plugin 3d --{name} 2",
            f"--attention_across_documents false does not work with --{name}: ColossalAI makes",
            "--attention_across_documents false --plugin 3d --tp 2",
            2,
        )
        for name in ("pp", "sp")
    ),
    Rule(
        "--attention_across_documents false --use_flash_attn",
        "--attention_across_documents false does not work with --use_flash_attn",
        "--attention_across_documents true --use_flash_attn",
    ),
    *(
        Rule(
            f"--torch_compile --plugin {plugin}",
            f"--torch_compile does not work with --plugin {plugin}, which hooks into every layer",
            "--torch_compile --plugin zero2",
        )
        for plugin in ("gemini", "gemini_auto", "3d")
    ),
    Rule(
        "--lora_rank 8 --plugin gemini",
        "--lora_rank does not work with gemini, which divides the layers",
        "--lora_rank 8 --plugin zero2_cpu",
    ),
    *(
        Rule(
            f"--lora_rank 8 --plugin 3d --{name} 2",
            f"--lora_rank does not work with --{name}, which divides the layers",
            "--lora_rank 8 --plugin 3d",
            2,
        )
        for name in ("tp", "pp")
    ),
    Rule(
        "--lora_rank 8 --plugin zero2 --freeze_non_embeds_params",
        "--freeze_non_embeds_params freezes the layers that --lora_rank adapts",
        "--freeze_non_embeds_params --plugin zero2",
    ),
    Rule(
        "--lora_rank 8 --plugin zero2 --lora_alpha 0",
        "--lora_alpha must be above 0",
        "--lora_rank 8 --plugin zero2 --lora_alpha 0.1",
    ),
    *(
        Rule(
            f"--plugin zero2 {flag}",
            f"{flag.split()[0]} needs --lora_rank",
            f"--plugin zero2 {flag} --lora_rank 4",
        )
        for flag in ("--lora_train_embeddings", "--lora_modules q_proj", "--lora_dropout 0.1")
    ),
    Rule(
        "--train_new_rows_only --num_old_rows 40 --lora_rank 8 --plugin zero2",
        "--train_new_rows_only with --lora_rank needs --lora_train_embeddings",
        "--train_new_rows_only --num_old_rows 40 --lora_rank 8 --plugin zero2 "
        "--lora_train_embeddings",
    ),
    *(
        Rule(flag, f"{flag.split()[0]} needs {what}", f"{flag} {there}")
        for flag, what, there in (
            ("--num_old_rows 40", "--train_new_rows_only", "--train_new_rows_only"),
            ("--neftune_noise_alpha 10", "--use_neft", "--use_neft"),
            ("--eval_interval 100", "--eval_dataset", "--eval_dataset ."),
            ("--decay_ratio 0.2", "--lr_schedule wsd or infinite", "--lr_schedule wsd"),
            ("--cooldown_ratio 0.2", "--lr_schedule infinite", "--lr_schedule infinite"),
            ("--constant_lr_ratio 0.2", "--lr_schedule infinite", "--lr_schedule infinite"),
        )
    ),
    Rule(
        "--lr_schedule constant --min_lr_ratio 0",
        "--min_lr_ratio needs an --lr_schedule that falls",
        "--lr_schedule linear --min_lr_ratio 0",
    ),
    Rule(
        "--num_old_rows 0 --train_new_rows_only",
        "--num_old_rows must be at least 1",
        "--num_old_rows 1 --train_new_rows_only",
    ),
    Rule(
        "--num_old_rows 50 --train_new_rows_only",
        "--train_new_rows_only: all 50 embedding rows",
        "--num_old_rows 49 --train_new_rows_only",
    ),
    Rule(
        "--plugin 3d --tp 16",
        "--tp 16 x --sp 1 does not divide the model's 24 key-value heads",
        "--plugin 3d --tp 8",
        16,
    ),
    Rule(
        "--plugin 3d --sp 16",
        "--tp 1 x --sp 16 does not divide the model's 24 key-value heads",
        "--plugin 3d --sp 8",
        16,
    ),
    Rule(
        "--plugin 3d --pp 9", "--pp 9 is more than the model's 8 layers", "--plugin 3d --pp 8", 72
    ),
]


@pytest.fixture
def model(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Its vocabulary has 50 rows; there is a compiler."""
    config = json.dumps({**SIZES, "vocab_size": 50})
    (paths["model"] / "config.json").write_text(config, encoding="utf-8")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return paths


@pytest.mark.parametrize("rule", RULES, ids=[rule.flags for rule in RULES])
def test_rule(model: Paths, monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(rule.processes))
    (problem,) = problems(model, *rule.flags.split())
    assert rule.words in problem
    parse(model, *rule.near.split())


def test_every_float_has_to_be_a_number(model: Paths) -> None:
    options = parse(model)
    for field in dataclasses.fields(options):
        if isinstance(getattr(options, field.name), float):
            found = problems(model, f"--{field.name}", "nan")
            assert f"--{field.name} must be a finite number" in found


def test_torch_compile_needs_a_compiler(model: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--torch_compile", "--plugin", "zero2"]
    for there in ("g++", "clang++"):
        monkeypatch.setattr(shutil, "which", lambda name, there=there: name == there or None)
        parse(model, *flags)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (problem,) = problems(model, *flags)
    assert problem.startswith("--torch_compile needs a C++ compiler")
    parse(model, "--plugin", "zero2")


@pytest.mark.parametrize("flag", ["--tp", "--pp", "--sp"])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_only_plugin_3d_divides_the_model(
    model: Paths, monkeypatch: pytest.MonkeyPatch, plugin: str, flag: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--plugin", plugin, flag, "2", "--accumulation_steps", "2"]
    if plugin == "3d":
        parse(model, *flags)
    else:
        assert problems(model, *flags) == [f"{flag} needs --plugin 3d, not {plugin}"]


@pytest.mark.parametrize(
    ("processes", "tp", "pp", "sp", "fits"),
    [
        *((8, 2, 2, 1, True), (8, 2, 1, 4, True), (8, 8, 1, 1, True), (6, 3, 2, 1, True)),
        *((6, 4, 1, 1, False), (8, 3, 1, 1, False), (4, 4, 2, 1, False), (1, 2, 1, 1, False)),
    ],
)
def test_layout_has_to_divide_the_processes(
    model: Paths, monkeypatch: pytest.MonkeyPatch, processes: int, tp: int, pp: int, sp: int,
    fits: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags = ["--plugin", "3d", "--tp", str(tp), "--pp", str(pp), "--sp", str(sp)]
    if fits:
        parse(model, *flags)
    else:
        (problem,) = problems(model, *flags)
        assert f"does not divide the {processes} processes" in problem
        assert f"= {tp * pp * sp} " in problem


def test_weights_fit_the_datasets(model: Paths) -> None:
    data, other = str(model["data"]), str(model["weights"])
    for flags, words in (
        (["--dataset", data, "--dataset_weights", "0.5,0.5"], "2 weights for 1 datasets"),
        (["--dataset", data, other, "--dataset_weights", "1"], "1 weights for 2 datasets"),
        (["--dataset", data, other, "--dataset_weights", "1,0"], "must be positive"),
        (["--dataset", data, other, "--dataset_weights=-0.5,1.5"], "must be positive"),
        (["--dataset", data, other, "--dataset_weights", "nan,1"], "must be positive"),
        (["--dataset", data, other, "--dataset_weights", "0.7,0.298"], "add up to 1, not 0.998"),
        (["--dataset", data, other, "--dataset_weights", "inf,1"], "add up to 1, not inf"),
    ):
        (problem,) = problems(model, *flags)
        assert problem.startswith("--dataset_weights ")
        assert words in problem
    flags = ["--dataset", data, other, data, "--dataset_weights", "0.333,0.333,0.3335"]
    assert parse(model, *flags).dataset_weights == [0.333, 0.333, 0.3335]


def test_missing_inputs_are_named(model: Paths, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for flag in ("--dataset", "--eval_dataset"):
        assert problems(model, flag, str(model["data"]), absent) == [f"{flag} {absent}: not found"]
    assert problems(model, "--pretrained", absent) == [
        f"--pretrained {absent}: not a model directory (no config.json)"
    ]
    parse(model, "--eval_dataset", str(model["data"]))


@pytest.mark.parametrize("content", ["{", "[]", "3", ""])
def test_configuration_that_is_none(model: Paths, content: str) -> None:
    path = model["model"] / "config.json"
    path.write_text(content, encoding="utf-8")
    (problem,) = problems(model)
    assert str(path) in problem


def test_content_decides_what_is_loaded(model: Paths, tmp_path: Path) -> None:
    """A checkpoint may be called anything, and so may a model directory."""
    misleading = tmp_path / "epoch-0_step-10" / "modeling"
    misleading.parent.mkdir()
    model["weights"].rename(misleading)
    for path, expected in ((model["checkpoint"], True), (misleading, False)):
        options = parse(model, "--load_checkpoint", str(path))
        assert options.load_checkpoint == str(path)
        assert is_checkpoint(options.load_checkpoint) is expected
    (problem,) = problems(model, "--load_checkpoint", str(misleading.parent))
    assert problem.startswith(f"--load_checkpoint {misleading.parent}: neither a checkpoint ")
    absent = tmp_path / "absent"
    assert problems(model, "--load_checkpoint", str(absent)) == [
        f"--load_checkpoint {absent}: not found"
    ]
    parse(model, "--load_checkpoint", "auto")


def test_all_problems_are_said_at_once(model: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of every kind of rule, those about the model's sizes among them."""
    monkeypatch.setenv("WORLD_SIZE", "5")
    said = problems(
        model, "--dataset", "absent", "--num_epochs", "0", "--lr", "-1", "--max_time", "x",
        "--dataset_weights", "0.5,0.5", "--report_to", "nobody", "--plugin", "3d", "--tp", "5",
        "--pp", "9", "--zero", "2", "--fused_loss", "--torch_compile", "--num_old_rows", "3",
        "--lora_modules", "q_proj", "--load_checkpoint", "nothing", "--accumulation_steps", "2",
    )  # fmt: skip
    for words in (
        *("--dataset absent: not found", "--num_epochs must", "--lr must not", "--max_time x"),
        *("2 weights for 1", "--report_to nobody", "does not divide the 5 processes", "--zero 0"),
        *("--accumulation_steps must", "--fused_loss needs", "--torch_compile does not"),
        *("--num_old_rows needs", "--lora_modules needs", "--load_checkpoint nothing"),
        *("48 heads", "24 key-value heads", "more than the model's 8 layers"),
    ):
        assert sum(words in problem for problem in said) == 1, words
    assert len(said) == len(set(said)) == 17
