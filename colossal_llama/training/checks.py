"""Which flags of training do not go together: all of it said at once, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.durations import seconds_of
from colossal_llama.errors import DataError
from colossal_llama.runtime.distributed import world_size
from colossal_llama.storage import read_json
from colossal_llama.training.parameters import old_rows
from colossal_llama.training.reporting import check_reporters
from colossal_llama.training.save_dir import run_directory
from colossal_llama.training.schedule import schedule_problems
from colossal_llama.training.state import is_checkpoint

if TYPE_CHECKING:
    from colossal_llama.training.arguments import TrainOptions

_AT_LEAST_ONE = ("num_epochs", "micro_batch_size", "max_length", "tp", "pp", "sp", "eval_interval")
_NOT_NEGATIVE = (
    *("save_interval", "keep_last", "weight_decay", "grad_clip", "neftune_noise_alpha"),
    *("max_bad_steps", "loss_spike_sigma", "lora_rank", "lora_alpha"),
)


def problems(options: TrainOptions) -> list[str]:
    """Everything that can be said without loading anything."""
    found = [
        *conflicts(options, world_size()),
        *_weights(options),
        *check_reporters(options.report_to),
        *_paths(options),
    ]
    if (options.pretrained / "config.json").is_file():
        found += _model(options)
    return found


def conflicts(options: TrainOptions, processes: int) -> list[str]:
    """What a job of this many processes cannot honour of the flags, whatever model and data."""
    return [
        *_numbers(options),
        *schedule_problems(options, options.max_steps),
        *_layout(options, processes),
        *_what_a_plugin_cannot(options, processes),
        *_what_is_trained(options),
        *_without_effect(options),
    ]


def _numbers(options: TrainOptions) -> Iterator[str]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"--{field.name} must be a finite number"
    for name in _AT_LEAST_ONE:
        if getattr(options, name) < 1:
            yield f"--{name} must be at least 1"
    for name in _NOT_NEGATIVE:
        if getattr(options, name) < 0:
            yield f"--{name} must not be negative"
    for name in ("accumulation_steps", "max_steps", "num_old_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            yield f"--{name} must be at least 1"
    if not 0 <= options.seed < 1 << 32:
        yield f"--seed must be from 0 to {(1 << 32) - 1}"
    if options.overwrite and options.load_checkpoint == "auto":
        yield "--overwrite begins anew, --load_checkpoint auto goes on: leave one out"
    if not 0 <= options.lora_dropout < 1:
        yield "--lora_dropout must be at least 0 and below 1"
    for name in ("max_time", "hang_timeout"):
        text = getattr(options, name)
        if text is not None and seconds_of(text) is None:
            yield f"--{name} {text}: expected a time such as 23h30m, 45m, 90s or 3600"


def _weights(options: TrainOptions) -> Iterator[str]:
    weights = options.dataset_weights
    if weights is None:
        return
    if len(weights) != len(options.dataset):
        yield (
            f"--dataset_weights has {len(weights)} weights for {len(options.dataset)} datasets: "
            "give one for each path of --dataset"
        )
    if not all(weight > 0 for weight in weights):
        yield "--dataset_weights must be positive; leave out a dataset without weight"
    elif not math.isclose(sum(weights), 1, abs_tol=1e-3):
        yield f"--dataset_weights must add up to 1, not {sum(weights):g}"


def _layout(options: TrainOptions, processes: int) -> Iterator[str]:
    """Sizes of the parallel groups, and what cannot be combined within plugin 3d."""
    if options.plugin != "3d":
        for name in ("tp", "pp", "sp"):
            if getattr(options, name) > 1:
                yield f"--{name} needs --plugin 3d, not {options.plugin}"
        if options.zero_stage != type(options).zero_stage:
            yield f"--zero needs --plugin 3d, not {options.plugin}"
    model_parallel = options.tp * options.pp * options.sp
    if model_parallel > 0 and processes % model_parallel:
        yield (
            f"--tp {options.tp} x --pp {options.pp} x --sp {options.sp} = {model_parallel} does "
            f"not divide the {processes} processes"
        )
    if options.zero_stage not in (0, 1, 2):
        yield "--zero must be 0, 1 or 2"
    if options.pp > 1 and options.zero_stage == 2:
        yield "--pp works with --zero 0 or 1: stage 2 would reduce every micro-batch"
    if options.pp > 1 and options.sp > 1:
        yield "--pp and --sp cannot be combined"
    if options.accumulation_steps is not None and 0 < options.accumulation_steps < options.pp:
        yield (
            f"--accumulation_steps must be at least --pp ({options.pp}): every stage of the "
            "pipeline works on its own micro-batch"
        )


def _what_a_plugin_cannot(options: TrainOptions, processes: int) -> Iterator[str]:
    """Flags that the chosen plugin cannot honour, with the reason."""
    gemini = options.plugin.startswith("gemini")
    plugin = f"--plugin {options.plugin}"
    if options.mixed_precision == "fp32" and gemini:
        yield f"{plugin} needs --mixed_precision fp16 or bf16"
    # Among which ZeRO would divide the optimizer.
    ranks = processes // (options.tp * options.pp) if options.tp * options.pp > 0 else 1
    divides = options.plugin == "3d" and options.zero_stage > 0 and ranks > 1
    if options.mixed_precision == "fp32" and divides:
        yield "--plugin 3d shards fp16 and bf16 only: with fp32 give --zero 0"
    if options.fused_loss:
        if gemini:
            yield f"--fused_loss needs the whole output embedding, which {plugin} divides"
        if options.tp > 1:
            yield "--fused_loss needs the whole output embedding, which --tp divides"
    if not options.attention_across_documents:
        for name in ("pp", "sp"):
            if getattr(options, name) > 1:
                yield (
                    f"--attention_across_documents false does not work with --{name}: "
                    "ColossalAI makes the attention mask itself there"
                )
        if options.use_flash_attn:
            yield (
                "--attention_across_documents false does not work with --use_flash_attn: "
                "ColossalAI's attention takes no mask of documents"
            )
    if options.torch_compile:
        if gemini or options.plugin == "3d":
            yield (
                f"--torch_compile does not work with {plugin}, which hooks into every layer; "
                "use zero2"
            )
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            yield "--torch_compile needs a C++ compiler (g++), and there is none on the PATH"


def _what_is_trained(options: TrainOptions) -> Iterator[str]:
    lora = options.lora_rank > 0
    if lora and (options.plugin.startswith("gemini") or options.tp > 1 or options.pp > 1):
        where = "--tp" if options.tp > 1 else "--pp" if options.pp > 1 else options.plugin
        yield (
            f"--lora_rank does not work with {where}, which divides the layers that an adapter "
            "is added to; use zero2, or 3d without --tp and --pp"
        )
    if lora and options.freeze_non_embeds_params:
        yield "--freeze_non_embeds_params freezes the layers that --lora_rank adapts: leave one out"
    if lora and options.lora_alpha == 0:
        yield "--lora_alpha must be above 0: it is the scale of what --lora_rank adds"
    if options.train_new_rows_only and lora and not options.lora_train_embeddings:
        yield "--train_new_rows_only with --lora_rank needs --lora_train_embeddings"


def _without_effect(options: TrainOptions) -> Iterator[str]:
    """Flags that say more of what another one, which is absent, would begin."""
    lora, schedule = options.lora_rank > 0, options.lr_schedule
    needs = {
        "lora_train_embeddings": ("--lora_rank", lora),
        "lora_modules": ("--lora_rank", lora),
        "lora_dropout": ("--lora_rank", lora),
        "lora_alpha": ("--lora_rank", lora),
        "num_old_rows": ("--train_new_rows_only", options.train_new_rows_only),
        "neftune_noise_alpha": ("--use_neft", options.use_neft),
        "eval_interval": ("--eval_dataset", bool(options.eval_dataset)),
        "min_lr_ratio": ("an --lr_schedule that falls", schedule != "constant"),
        "decay_ratio": ("--lr_schedule wsd or infinite", schedule in ("wsd", "infinite")),
        "cooldown_ratio": ("--lr_schedule infinite", schedule == "infinite"),
        "constant_lr_ratio": ("--lr_schedule infinite", schedule == "infinite"),
    }
    for name, (what, is_there) in needs.items():
        if not is_there and getattr(options, name) != getattr(type(options), name):
            yield f"--{name} needs {what}"


def _paths(options: TrainOptions) -> Iterator[str]:
    if hint := run_directory(options.pretrained):
        yield f"--pretrained: {hint}"
    elif not (options.pretrained / "config.json").is_file():
        yield f"--pretrained {options.pretrained}: not a model directory (no config.json)"
    for name in ("dataset", "eval_dataset"):
        for path in getattr(options, name) or []:
            if not path.is_dir():
                yield f"--{name} {path}: {_not_a_directory(path)}"
    if options.load_checkpoint is None or options.load_checkpoint == "auto":
        return
    load = Path(options.load_checkpoint)
    if not load.is_dir():
        yield f"--load_checkpoint {load}: {_not_a_directory(load)}"
    elif not is_checkpoint(load) and (hint := run_directory(load)):
        yield f"--load_checkpoint: {hint}; auto resumes the run of --save_dir"
    elif not is_checkpoint(load) and not (load / "config.json").is_file():
        yield (
            f"--load_checkpoint {load}: neither a checkpoint (no running_states.json) nor a "
            "model directory (no config.json)"
        )


def _not_a_directory(path: Path) -> str:
    return "a file; expected a directory" if path.exists() else "not found"


def _model(options: TrainOptions) -> Iterator[str]:
    """What of the layout the model's own sizes do not allow."""
    path = options.pretrained / "config.json"
    try:
        config: dict[str, Any] = read_json(path)
    except DataError as error:
        yield str(error)
        return
    if not isinstance(config, dict):
        yield f"{path}: not a model's configuration"
        return
    heads = config.get("num_attention_heads", 1)
    sizes = {"heads": heads, "key-value heads": config.get("num_key_value_heads") or heads}
    split = options.tp * options.sp
    for name, size in sizes.items():
        if split > 0 and size % split:
            yield (
                f"--tp {options.tp} x --sp {options.sp} does not divide the model's {size} {name}"
            )
    if options.train_new_rows_only:
        yield from _new_rows(options, config.get("vocab_size", 0))
    layers = config.get("num_hidden_layers", 1)
    if options.pp > layers:
        yield f"--pp {options.pp} is more than the model's {layers} layers"


def _new_rows(options: TrainOptions, vocabulary: int) -> Iterator[str]:
    try:
        old = old_rows(options)
    except DataError as error:
        yield str(error)
        return
    if old >= vocabulary:
        yield (
            f"--train_new_rows_only: all {vocabulary:,} embedding rows of {options.pretrained} are "
            f"old ones ({old:,}): extend the model with init_model.py, or give --num_old_rows"
        )
