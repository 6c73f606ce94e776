"""Puts a trainer together: data, model, plugin, optimizer, and the state of a resumed run."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.nn.optimizer import HybridAdam
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from colossal_llama import command, storage
from colossal_llama.dataset.manifest import Manifest
from colossal_llama.errors import DataError
from colossal_llama.runtime.cpu import bf16_is_fast
from colossal_llama.runtime.rope import restore_rope_frequencies
from colossal_llama.training.arguments import TrainOptions, is_checkpoint
from colossal_llama.training.checkpoint import (
    RunningState,
    read_running_state,
    restore,
    save_checkpoint,
)
from colossal_llama.training.data import build_sampler, describe_mixture, open_rows
from colossal_llama.training.freeze import freeze_non_embeddings
from colossal_llama.training.metrics import MetricsWriter
from colossal_llama.training.neftune import NoisyEmbeddings
from colossal_llama.training.plugins import Layout, build_layout, build_plugin
from colossal_llama.training.schedule import CosineSchedule, default_warmup
from colossal_llama.training.trainer import Trainer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# AdamW's decay rates in Llama (Touvron et al. 2023, section 2.3).
ADAM_BETAS = (0.9, 0.95)


def build_trainer(options: TrainOptions) -> Trainer:
    """Loads and checks everything ``options`` name. Needs a process group.

    Raises:
        DataError: data, tokenizer, model or checkpoint do not fit each other.
    """
    warn_of_slow_precision(options.mixed_precision)
    rows = open_rows(options)
    accumulation = accumulation_steps(options, rows.manifest)
    tokenizer = load_tokenizer(options, rows.manifest)
    model = load_model(options, len(tokenizer))
    plugin = build_plugin(options, accumulation)
    layout = build_layout(options, plugin)
    batch_size = layout.data_size * options.micro_batch_size * accumulation
    sampler = build_sampler(options, rows, batch_size)
    state = initial_state(options, rows.fingerprints)
    samples_left = max(0, options.num_epochs * len(rows) - state.samples)
    total_steps = state.step + math.ceil(samples_left / batch_size)
    schedule = build_schedule(options, total_steps)
    booster = Booster(plugin=plugin)
    model, optimizer = boost(options, booster, model)
    noise = None
    if options.use_neft and (not layout.pipeline or plugin.stage_manager.is_first_stage()):
        noise = NoisyEmbeddings(model.unwrap(), options.neftune_noise_alpha, options.seed)
    if state.step:
        resume(options, state, optimizer, layout)

    save = functools.partial(
        save_checkpoint,
        options.save_dir,
        booster=booster,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        tokenizer=tokenizer,
        layout=layout,
    )
    metrics = open_metrics(options, state, schedule)
    metrics.say(
        f"{options.plugin} on {dist.get_world_size()} processes: {len(rows):,} rows, "
        f"{batch_size} rows a step, {total_steps:,} steps"
    )
    for line in describe_mixture(options, rows):
        metrics.say(line)
    return Trainer(
        booster=booster,
        model=model,
        optimizer=optimizer,
        rows=rows,
        sampler=sampler,
        schedule=schedule,
        layout=layout,
        state=state,
        metrics=metrics,
        noise=noise,
        save=save,
        micro_batch_size=options.micro_batch_size,
        num_epochs=options.num_epochs,
        save_interval=options.save_interval,
        pad_id=tokenizer.pad_token_id or 0,
        device=torch.device(get_accelerator().get_current_device()),
    )


def accumulation_steps(options: TrainOptions, manifest: Manifest) -> int:
    """What was asked for; otherwise 8 for SFT data, 1 for others, and at least ``--pp``."""
    if options.accumulation_steps is not None:
        return options.accumulation_steps
    return max(8 if manifest.kind == "sft" else 1, options.pp)


def load_tokenizer(options: TrainOptions, manifest: Manifest) -> Any:
    """The tokenizer of the model, with the chat template of the data if that has one."""
    tokenizer = AutoTokenizer.from_pretrained(options.pretrained, local_files_only=True)
    if manifest.chat_template:
        tokenizer.chat_template = manifest.chat_template
    return tokenizer


def load_model(options: TrainOptions, vocabulary: int) -> Any:
    """The model in the working dtype, with the weights to start from.

    Raises:
        DataError: the weights are incomplete, or of another vocabulary.
    """
    directory = weights_directory(options)
    say(f"loading {directory}")
    # One bar a process would be drawn over the others'.
    disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            torch_dtype=DTYPES[options.mixed_precision],
            attn_implementation=attention_implementation(options),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{directory}: cannot load the model: {_first_line(error)}") from None
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = [*report["missing_keys"], *report["mismatched_keys"]]
        raise DataError(f"{directory}: weights are missing or misshapen: {lacking[:3]}")
    if model.config.vocab_size < vocabulary:
        raise DataError(
            f"{directory} has {model.config.vocab_size} embedding rows, but the tokenizer in "
            f"{options.pretrained} has {vocabulary} pieces; extend the model with init_model.py"
        )
    model.config.use_cache = False
    return model


def attention_implementation(options: TrainOptions) -> str:
    """The name of transformers' attention."""
    if options.sp > 1:
        # ColossalAI's attention for sequence parallelism applies the mask that it is given;
        # for "sdpa" transformers gives none where no row is padded, and means "causal" by it.
        # "eager" always gives the causal mask. (Without it tokens see their successors.)
        return "eager"
    if options.use_flash_attn and torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def weights_directory(options: TrainOptions) -> Path:
    """Where the weights to start from are."""
    load = options.load_checkpoint
    if load is None:
        return options.pretrained
    return load / "modeling" if is_checkpoint(load) else load


def boost(options: TrainOptions, booster: Any, model: Any) -> tuple[Any, Any]:
    """Freezes, builds the optimizer, and hands both to the plugin."""
    if options.freeze_non_embeds_params:
        freeze_non_embeddings(model)
    if options.use_grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = HybridAdam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.lr,
        betas=ADAM_BETAS,
        weight_decay=options.weight_decay,
        adamw_mode=True,
    )
    model, optimizer, *_ = booster.boost(model, optimizer)
    restore_rope_frequencies(model.unwrap())
    return model, optimizer


def build_schedule(options: TrainOptions, total_steps: int) -> CosineSchedule:
    """Warm-up and cosine over the whole run."""
    warmup = options.warmup_steps
    return CosineSchedule(
        peak=options.lr,
        warmup_steps=default_warmup(total_steps) if warmup is None else warmup,
        total_steps=total_steps,
    )


def initial_state(options: TrainOptions, fingerprints: list[str]) -> RunningState:
    """The state of the checkpoint that is resumed, or that of a new run.

    Raises:
        DataError: the checkpoint was made with other data.
    """
    state = RunningState(
        world_size=dist.get_world_size(),
        plugin=options.plugin,
        layout={
            "tp": options.tp,
            "pp": options.pp,
            "sp": options.sp,
            "zero_stage": options.zero_stage,
        },
        mixed_precision=options.mixed_precision,
        config_fingerprint=storage.sha256_file(options.pretrained / "config.json"),
        dataset_fingerprints=fingerprints,
    )
    load = options.load_checkpoint
    if load is None or not is_checkpoint(load):
        return state
    saved = read_running_state(load)
    if saved.dataset_fingerprints != state.dataset_fingerprints:
        raise DataError(
            f"{load} was trained on other data than --dataset names; resume with the same parts "
            f"in the same order, or start a new stage with --load_checkpoint {load / 'modeling'}"
        )
    state.epoch, state.step = saved.epoch, saved.step
    state.samples, state.tokens = saved.samples, saved.tokens
    return state


def resume(options: TrainOptions, state: RunningState, optimizer: Any, layout: Layout) -> None:
    """Restores optimizer and random states, or says what cannot be carried over."""
    assert options.load_checkpoint is not None
    saved = read_running_state(options.load_checkpoint)
    if saved.identity() == state.identity():
        restore(options.load_checkpoint, optimizer, layout)
    else:
        say(
            f"warning: {options.load_checkpoint} was written by {saved.identity()}, this is "
            f"{state.identity()}: weights (in half precision) and data position are carried "
            "over, the optimizer's moments start anew"
        )


def open_metrics(
    options: TrainOptions, state: RunningState, schedule: CosineSchedule
) -> MetricsWriter:
    """Opens the run's logs, and writes the resolved flags beside them."""
    main = dist.get_rank() == 0
    if main:
        options.save_dir.mkdir(parents=True, exist_ok=True)
        target = options.config_file or options.save_dir / "config.json"
        storage.write_json(target, command.as_dict(options))
    return MetricsWriter(
        options.save_dir,
        options.tensorboard_dir or options.save_dir / "tensorboard",
        state.step + 1,
        schedule.total_steps,
        main,
    )


def warn_of_slow_precision(precision: str) -> None:
    """Says it before a user waits for a CPU that emulates its arithmetic."""
    if torch.cuda.is_available():
        return
    best = "bf16" if bf16_is_fast() else "fp32"
    if precision == "fp16" or (precision == "bf16" and best == "fp32"):
        say(f"warning: {precision} is very slow on this CPU; --mixed_precision {best} is not")


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
