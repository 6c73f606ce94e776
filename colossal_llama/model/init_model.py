"""Gives a model the embedding rows of an extended tokenizer, or makes a new model for one.

    python colossal_llama/model/init_model.py --source_model_and_tokenizer_path llama2 \
        --target_tokenizer_path llama2-zh --target_model_path llama2-zh-init
"""

from __future__ import annotations

import functools
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.model import new_model, verification
from colossal_llama.model.configuration import preset_names, preset_path
from colossal_llama.model.strategies import STRATEGIES, new_rows
from colossal_llama.storage import atomic_directory, read_json, refuse_existing, write_json

if TYPE_CHECKING:
    from colossal_llama.model.new_pieces import NewPieces
    from colossal_llama.model.safetensors_files import Weights

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
    init_strategy: str = option(
        "mean",
        help="where new rows come from: the mean of the rows that spelled the piece; that mean "
        "with the norm of old rows of its script; samples around the mean of all rows; or noise "
        "around zero, to compare with",
        choices=tuple(STRATEGIES),
    )
    seed: int = option(42, help="seed of random weights: a preset's, multivariate's and random's")
    dtype: str | None = option(
        None,
        help="type of the weights written; without it a source keeps its own and a preset has "
        "bfloat16",
        choices=("float32", "bfloat16", "float16"),
    )
    verify: str | None = option(
        None,
        help="text, or a .txt or .jsonl file of it (or .gz of one), on which to print the source's "
        "and the result's bits per byte; loads one after the other into memory as they are stored",
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
        if self.verify is not None and (problem := verification.problem_of(self.verify)):
            found.append(f"--verify {problem}")
        if self.preset is not None:
            found += [
                f"--{name} goes with --source_model_and_tokenizer_path, not with --preset"
                for name, default in (("init_strategy", "mean"), ("verify", None))
                if getattr(self, name) != default
            ]
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
    texts = verification.read_texts(options.verify) if options.verify is not None else []
    with atomic_directory(options.target_model_path, overwrite=options.overwrite) as target:
        if options.source_model_and_tokenizer_path is not None:
            summary = _from_source(options, options.source_model_and_tokenizer_path, target)
        else:
            summary = new_model.write(
                preset_path(str(options.preset)),
                options.target_tokenizer_path,
                target,
                seed=options.seed,
                dtype=options.dtype or "bfloat16",
            )
        _copy_tokenizer(options.target_tokenizer_path, target)
        if options.source_model_and_tokenizer_path is not None and texts:
            summary += "\n" + verification.report(
                options.source_model_and_tokenizer_path,
                target,
                texts,
                same_weights=options.dtype is None,
            )
    print(f"{options.target_model_path}: {summary}")


def _from_source(options: InitModelOptions, source: Path, target: Path) -> str:
    """Writes weights and configuration into ``target``; returns a summary for the user."""
    from tqdm import tqdm

    from colossal_llama.model import safetensors_files
    from colossal_llama.model.new_pieces import find_new_pieces
    from colossal_llama.tokenizer.fingerprint import vocabulary_size

    if not source.is_dir():
        raise DataError(f"{source}: no such model directory")
    config = _read_config(source / "config.json")
    weights = safetensors_files.find_weights(source)
    names = _embedding_names(source, config, weights, vocabulary_size(source))
    pieces = find_new_pieces(source, options.target_tokenizer_path)
    grown = _grown(options, config, names, pieces)
    total = safetensors_files.size_after(weights, grown, options.dtype)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=1) as progress:
        safetensors_files.rewrite(weights, target, grown, options.dtype, progress.update)
    new_size = pieces.old_size + len(pieces.bags)
    write_json(target / "config.json", _changed(config, new_size, options.dtype))
    _note_extension(options.target_tokenizer_path, target, pieces.old_size, new_size)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    else:
        _write_generation_config(target)
    return (
        f"{pieces.old_size} -> {new_size} rows in {' and '.join(names)}, "
        f"new ones by {options.init_strategy}"
    )


def _grown(
    options: InitModelOptions, config: dict[str, Any], names: list[str], pieces: NewPieces
) -> dict[str, Any]:
    """Tensor name -> its new rows.

    Random strategies draw other numbers for input and output, unless both are one.
    """
    from colossal_llama.model.safetensors_files import NewRows

    deviation = config.get("initializer_range", 0.02)
    tied = config.get("tie_word_embeddings", False)
    return {
        name: NewRows(
            pieces.old_size,
            len(pieces.bags),
            functools.partial(
                new_rows,
                options.init_strategy,
                pieces,
                deviation,
                f"{options.seed} {_INPUT if tied or name != _OUTPUT else _OUTPUT}",
            ),
        )
        for name in names
    }


def _note_extension(tokenizer: Path, target: Path, before: int, after: int) -> None:
    """Leaves the tokenizer's report beside the model, with the sizes that the model had and has.

    Training reads there which embedding rows are new.
    """
    from colossal_llama.tokenizer.extension_report import REPORT

    path = tokenizer / REPORT
    report = read_json(path) if path.is_file() else {}
    sizes = {"size_before": before, "size_after": after}
    write_json(target / REPORT, {**report, **sizes})


def _changed(config: dict[str, Any], vocab_size: int, dtype: str | None) -> dict[str, Any]:
    """The result's configuration; newer ones say ``dtype`` where older say ``torch_dtype``."""
    changed = {**config, "vocab_size": vocab_size}
    if dtype is not None:
        changed["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return changed


def _embedding_names(
    source: Path, config: dict[str, Any], weights: Weights, size: int
) -> list[str]:
    """Names of the tensors with a row per id, checked against configuration and tokenizer."""
    from colossal_llama.model.safetensors_files import FLOATS

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
        entry = weights.entries[name]
        if entry.dtype not in FLOATS or len(entry.shape) != 2:
            raise DataError(
                f"{source}: {name} is a {entry.dtype} tensor of shape {entry.shape}; rows can only "
                "be added to a matrix that is not quantised"
            )
        rows = entry.shape[0]
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
    deviation = config.get("initializer_range", 0.02)
    if not isinstance(deviation, int | float) or not 0 <= deviation < math.inf:
        raise DataError(f"{path}: initializer_range is {deviation!r}, expected a deviation")
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
