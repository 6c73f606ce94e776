"""Loads the tokenizer and the model to start from, strictly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from colossal_llama.dataset.manifest import Manifest
from colossal_llama.errors import DataError
from colossal_llama.runtime.cpu import bf16_is_fast
from colossal_llama.storage import read_json
from colossal_llama.training.arguments import TrainOptions

# Settings of config.json that make two models different: in their shapes or in what they compute.
# Others (dtype, cache, versions) change when a model is saved again.
_MAKES_A_MODEL = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"),
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_tokenizer(options: TrainOptions, manifest: Manifest) -> Any:
    """The tokenizer of the model, with the chat template of the data if that has one."""
    tokenizer = AutoTokenizer.from_pretrained(
        options.pretrained,
        local_files_only=True,
        trust_remote_code=options.trust_remote_code,
    )
    if manifest.chat_template:
        tokenizer.chat_template = manifest.chat_template
    return tokenizer


def load_model(options: TrainOptions, directory: Path, vocabulary: int) -> Any:
    """The model in the working dtype, with the weights of ``directory``.

    Raises:
        DataError: the weights are incomplete, have tensors that the model does not know, or are
            of another vocabulary.
    """
    rows = read_json(directory / "config.json").get("vocab_size", vocabulary)
    if rows < vocabulary:
        raise DataError(
            f"{directory} has {rows} embedding rows, but the tokenizer in "
            f"{options.pretrained} has {vocabulary} pieces; extend the model with init_model.py"
        )
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
            trust_remote_code=options.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{directory}: cannot load the model: {_first_line(error)}") from None
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = [*report["missing_keys"], *report["mismatched_keys"]]
        raise DataError(f"{directory}: weights are missing or misshapen: {lacking[:3]}")
    if report["unexpected_keys"]:
        raise DataError(
            f"{directory}: has weights that the model of its config.json does not know: "
            f"{list(report['unexpected_keys'])[:3]}"
        )
    model.config.use_cache = False
    return model


def check_same_model(checkpoint: Path, pretrained: Path) -> None:
    """Compares the configurations of a checkpoint and of the model that a run is given.

    Raises:
        DataError: they are of different models.
    """
    theirs = read_json(checkpoint / "modeling" / "config.json")
    ours = read_json(pretrained / "config.json")
    different = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in _MAKES_A_MODEL
        if name in theirs and name in ours and theirs[name] != ours[name]
    ]
    if different:
        raise DataError(
            f"{checkpoint} is of another model than --pretrained {pretrained}: "
            f"{'; '.join(different)}"
        )


def attention_implementation(options: TrainOptions) -> str:
    """The name of transformers' attention."""
    if options.sp > 1:
        # ColossalAI's attention for sequence parallelism applies the mask that it is given;
        # for "sdpa" transformers gives none where no row is padded, and means "causal" by it.
        # "eager" always gives the causal mask. (Without it tokens see their successors.)
        return "eager"
    takes_it = options.mixed_precision != "fp32" and torch.cuda.is_available()
    if options.use_flash_attn and takes_it and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


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
