"""Runs the commands that prepare datasets, in this process or in one of their own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from colossal_llama import command
from colossal_llama.dataset.prepare_pretrain import (
    PretrainDatasetOptions,
    prepare_pretrain_dataset,
)
from colossal_llama.dataset.prepare_sft import SftDatasetOptions, prepare_sft_dataset

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "pretrain": (PretrainDatasetOptions, prepare_pretrain_dataset),
    "sft": (SftDatasetOptions, prepare_sft_dataset),
}


def flags_of(inputs: Any, tokenizer_dir: Path, output: Path, **flags: Any) -> list[str]:
    """Flags as on the command line; True stands for a flag without a value."""
    arguments = {
        "data_input_dirs": inputs,
        "tokenizer_dir": tokenizer_dir,
        "data_arrow_output_dir": output,
        "max_length": 256,
        **flags,
    }
    return [f"--{name}" if v is True else f"--{name}={v}" for name, v in arguments.items()]


def prepare(inputs: Any, tokenizer_dir: Path, output: Path, kind: str = "pretrain", **flags) -> int:
    """Runs a command in this process and returns its exit code."""
    return command.run(*COMMANDS[kind], flags_of(inputs, tokenizer_dir, output, **flags))


def script(kind: str, *arguments: str) -> list[str]:
    """The command line of a command."""
    return [sys.executable, str(ROOT / f"prepare_{kind}_dataset.py"), *map(str, arguments)]


def run_script(*arguments: Any, kind: str = "pretrain", **settings) -> subprocess.CompletedProcess:
    """Runs a command as a user does."""
    return subprocess.run(
        script(kind, *arguments), capture_output=True, text=True, check=False, **settings
    )


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def training_parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*"))


def stretches_of(parts: list[Path]) -> Counter:
    """How often each (category, tokens of a document's stretch in a row) is in the parts."""
    found: Counter = Counter()
    for part in parts:
        for row in datasets.load_from_disk(str(part)):
            ends = list(itertools.accumulate(row["document_lengths"]))
            assert ends[-1] == len(row["input_ids"]) == len(row["labels"])
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                found[row["category"], tuple(row["input_ids"][start:end])] += 1
    return found


def tokens_of(parts: list[Path]) -> Counter:
    """How often each (category, token) is in the parts."""
    found: Counter = Counter()
    for (category, stretch), times in stretches_of(parts).items():
        for token in stretch:
            found[category, token] += times
    return found


def leftovers(directory: Path) -> list[str]:
    """Names in a directory that an interrupted run has left."""
    return sorted(name for name in os.listdir(directory) if name.endswith((".work", ".staging")))
