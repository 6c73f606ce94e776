"""Turns a checkpoint of another program into a clean Hugging Face model directory.

    python colossal_llama/model/convert_checkpoint.py --source_checkpoint iter-080000-ckpt.pth \
        --model_config tinyllama-1.1b --tokenizer_path llama2 --target_model_path tinyllama
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.model import conversion
from colossal_llama.model.checkpoint_layouts import Heads, recognise
from colossal_llama.model.configuration import (
    DTYPES,
    empty_model,
    preset_names,
    preset_path,
    read_fields,
    token_fields,
    write_settings,
)
from colossal_llama.model.foreign_checkpoint import locate, read_checkpoint
from colossal_llama.storage import atomic_directory, refuse_existing


@dataclass
class ConvertCheckpointOptions:
    """Turn a checkpoint of lit-gpt, TinyLlama, llama2.c, Meta, ColossalAI, torch.compile, DDP or
    FSDP into a Hugging Face model directory."""

    source_checkpoint: Path = option(
        help="file (.safetensors, .bin, .pt, .pth, .ckpt) or directory of weights; a directory "
        "that train.py saved to means its newest checkpoint"
    )
    target_model_path: Path = option(help="directory to write the model to")
    model_config: str | None = option(
        None,
        help="config.json of the model, or a preset: "
        f"{', '.join(preset_names())}; without it the config.json beside the weights",
    )
    tokenizer_path: Path | None = option(
        None,
        help="directory of the model's tokenizer, to be copied too; without it the tokenizer "
        "beside the weights, where there is one",
    )
    dtype: str | None = option(
        None, help="type of the weights written; without it they keep theirs", choices=DTYPES
    )
    trim_vocab_padding: bool = option(
        False, help="drop embedding rows beyond the configuration's vocab_size"
    )
    overwrite: bool = option(False, help="replace target_model_path if it exists")

    def problems(self) -> list[str]:
        found = []
        target = self.target_model_path.resolve()
        for name in ("source_checkpoint", "tokenizer_path"):
            path = getattr(self, name)
            if path is not None and path.resolve() == target:
                found.append(f"--target_model_path must not be --{name}")
        if self.model_config is not None and not preset_path(self.model_config).is_file():
            found.append(
                f"--model_config {self.model_config}: not a file that ends in .json, and not one "
                f"of {', '.join(preset_names())}"
            )
        return found


def convert_checkpoint(options: ConvertCheckpointOptions) -> None:
    """Writes safetensors shards, configuration and tokenizer files.

    Raises:
        DataError: the checkpoint cannot be read, or is not of this configuration.
    """
    refuse_existing(options.target_model_path, overwrite=options.overwrite)
    place = locate(options.source_checkpoint)
    beside = place if place.is_dir() else place.parent
    stored = read_checkpoint(place)
    layout, parts = recognise(stored, str(place))
    origins = conversion.find_origins(stored, parts, str(place))
    tokenizer = _tokenizer(options.tokenizer_path, beside)
    config_path = _config_path(options.model_config, beside)
    fields = _fields(config_path, tokenizer)
    may_trim = options.trim_vocab_padding or tokenizer is not None
    padding = conversion.vocabulary(origins, fields["vocab_size"], str(place), may_trim=may_trim)
    config, model = empty_model(fields, config_path)
    with atomic_directory(options.target_model_path, overwrite=options.overwrite) as target:
        origins = conversion.without_shared_head(origins, config, str(place))
        origins = conversion.trimmed(origins, padding)
        _write(origins, config, model, f"{place} for {config_path}", options.dtype, target)
        _copy_files(beside, tokenizer, target)
    print(
        f"{options.target_model_path}: {model.num_parameters():,} parameters for "
        f"{config.vocab_size} ids, from the {layout.title} layout"
        + (f"; {padding} rows of padding left out" if padding else "")
    )


def _tokenizer(given: Path | None, beside: Path) -> Path | None:
    """The directory of the tokenizer, if there is one."""
    if given is not None:
        return given
    has_one = any((beside / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return beside if has_one else None


def _config_path(given: str | None, beside: Path) -> Path:
    path = preset_path(given) if given is not None else beside / "config.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; say with --model_config what model this is")
    return path


def _fields(config_path: Path, tokenizer: Path | None) -> dict[str, Any]:
    """The model's settings; the tokenizer gives what a preset leaves to it."""
    from colossal_llama.tokenizer.fingerprint import vocabulary_size

    fields = read_fields(config_path)
    if "vocab_size" not in fields:
        if tokenizer is None:
            raise DataError(
                f"{config_path}: leaves vocab_size, bos and eos to the tokenizer; name it with "
                "--tokenizer_path"
            )
        fields |= token_fields(tokenizer)
    if tokenizer is not None and vocabulary_size(tokenizer) > fields["vocab_size"]:
        raise DataError(
            f"{tokenizer}: the tokenizer has {vocabulary_size(tokenizer)} ids, but {config_path} "
            f"says vocab_size {fields['vocab_size']}; they belong to different models"
        )
    return fields


def _write(
    origins: dict[str, conversion.Origin],
    config: Any,
    model: Any,
    where: str,
    dtype: str | None,
    target: Path,
) -> None:
    import torch

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    conversion.check(origins, shapes, heads, where)
    kind = getattr(torch, dtype) if dtype is not None else None
    conversion.write_weights(origins, shapes, heads, kind, target)
    write_settings(config, kind or origins[conversion.INPUT].tensor.dtype, target)


def _copy_files(beside: Path, tokenizer: Path | None, target: Path) -> None:
    from colossal_llama.tokenizer.directory import TOKENIZER_FILES

    files = [beside / "generation_config.json"]
    if tokenizer is not None:
        files += [tokenizer / name for name in TOKENIZER_FILES]
    for path in files:
        if path.is_file():
            shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    sys.exit(run(ConvertCheckpointOptions, convert_checkpoint))
