"""Gives a model the embedding rows of an extended tokenizer, or makes a new model for one.

    python colossal_llama/model/init_model.py --source_model_and_tokenizer_path llama2 \
        --target_tokenizer_path llama2-zh --target_model_path llama2-zh-init
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.model import new_model
from colossal_llama.model.configuration import preset_names, preset_path
from colossal_llama.storage import atomic_directory, read_json, refuse_existing, write_json

_INPUT, _OUTPUT = "embed_tokens.weight", "lm_head.weight"


@dataclass
class InitModelOptions:
    """Start a model for a tokenizer: from a source model, or at random from a preset."""

    target_tokenizer_path: Path = option(help="directory of the tokenizer the model is for")
    target_model_path: Path = option(help="directory to write model and tokenizer to")
    source_model_and_tokenizer_path: Path | None = option(
        None, help="directory of the model to start from, with its own tokenizer in it"
    )
    preset: str | None = option(
        None,
        help="instead of a source: the configuration of a new, random model; one of "
        f"{', '.join(preset_names())}, or a JSON file like a Hugging Face config.json",
    )
    seed: int = option(42, help="seed of a preset's random weights")
    dtype: str = option(
        "bfloat16",
        help="type of a preset's weights; a source keeps its own",
        choices=("float32", "bfloat16", "float16"),
    )
    overwrite: bool = option(False, help="replace target_model_path if it exists")

    def problems(self) -> list[str]:
        found = []
        if (self.source_model_and_tokenizer_path is None) == (self.preset is None):
            found.append("give either --source_model_and_tokenizer_path or --preset")
        target = self.target_model_path.resolve()
        for name in ("source_model_and_tokenizer_path", "target_tokenizer_path"):
            path = getattr(self, name)
            if path is not None and path.resolve() == target:
                found.append(f"--target_model_path must not be --{name}")
        if self.preset is not None and not preset_path(self.preset).is_file():
            found.append(
                f"--preset {self.preset}: not a file, and not one of {', '.join(preset_names())}"
            )
        return found


def init_model(options: InitModelOptions) -> None:
    """Writes a model directory: safetensors, configuration, and the tokenizer's files.

    Raises:
        DataError: source, its tokenizer and the target tokenizer do not belong together.
    """
    refuse_existing(options.target_model_path, overwrite=options.overwrite)
    with atomic_directory(options.target_model_path, overwrite=options.overwrite) as target:
        if options.source_model_and_tokenizer_path is not None:
            summary = _from_source(
                options.source_model_and_tokenizer_path, options.target_tokenizer_path, target
            )
        else:
            summary = new_model.write(
                preset_path(str(options.preset)),
                options.target_tokenizer_path,
                target,
                seed=options.seed,
                dtype=options.dtype,
            )
        _copy_tokenizer(options.target_tokenizer_path, target)
    print(f"{options.target_model_path}: {summary}")


def _from_source(source: Path, tokenizer: Path, target: Path) -> str:
    from tqdm import tqdm

    from colossal_llama.model import embeddings, safetensors_files
    from colossal_llama.tokenizer.fingerprint import vocabulary_size

    if not source.is_dir():
        raise DataError(f"{source}: no such model directory")
    config = _read_config(source / "config.json")
    weights = safetensors_files.find_weights(source)
    old_size = vocabulary_size(source)
    names = _embedding_names(source, config, weights, old_size)
    segmentations = embeddings.old_segmentations(source, tokenizer)
    with tqdm(total=len(names) + len(weights.files), unit=" steps", delay=1) as progress:
        changed = {}
        for name in names:
            progress.set_description(f"new rows of {name}")
            changed[name] = embeddings.extended(weights.tensor(name), old_size, segmentations)
            progress.update()
        progress.set_description("writing")
        safetensors_files.rewrite(weights, target, changed, progress.update)
    new_size = old_size + len(segmentations)
    write_json(target / "config.json", {**config, "vocab_size": new_size})
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    else:
        _write_generation_config(target)
    return f"{old_size} -> {new_size} rows in {' and '.join(names)}"


def _embedding_names(source: Path, config: dict[str, Any], weights: Any, size: int) -> list[str]:
    """Names of the tensors with a row per id, checked against configuration and tokenizer."""
    names = [name for name in weights.file_of if name.endswith(_INPUT) or name == _OUTPUT]
    if not any(name.endswith(_INPUT) for name in names):
        raise DataError(
            f"{source}: no tensor named *{_INPUT}; only Llama-like models are supported"
        )
    if _OUTPUT not in names and not config.get("tie_word_embeddings", False):
        raise DataError(
            f"{source}: {_OUTPUT} is missing, but config.json does not set tie_word_embeddings"
        )
    for name in names:
        rows, *_ = weights.shape(name)
        if rows != config["vocab_size"]:
            raise DataError(
                f"{source}: {name} has {rows} rows, but config.json says vocab_size "
                f"{config['vocab_size']}"
            )
        if rows < size:
            raise DataError(
                f"{source}: its tokenizer has {size} ids, but {name} only {rows} rows; the "
                "tokenizer beside the model is not the one that it was trained with"
            )
    return sorted(names)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise DataError(f"{path}: not a model's configuration: it has no vocab_size")
    return config


def _write_generation_config(target: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(str(target), local_files_only=True)
    GenerationConfig.from_model_config(config).save_pretrained(target)


def _copy_tokenizer(tokenizer: Path, target: Path) -> None:
    from colossal_llama.tokenizer.directory import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, target / name)


if __name__ == "__main__":
    sys.exit(run(InitModelOptions, init_model))
