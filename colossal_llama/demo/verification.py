"""Proves that a stage began with the weights it was given, and that its models load.

    python -m colossal_llama.demo.verification --save_dir demo_out/stage-b --processes 2 \\
        --model_paths demo_out/stage-b/epoch-1_step-100/modeling --output verification.json

The trainer reports the loss of its first step before the first update. Plain transformers must
find the same loss for the same rows with the weights that the stage was started from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.inference.loading import load_model_and_tokenizer
from colossal_llama.storage import read_json, read_jsonl, write_json


@dataclass
class VerificationOptions:
    """Recomputes the first loss of a run, and loads models with plain transformers."""

    save_dir: Path = option(help="the run's directory: config.json and metrics.jsonl")
    processes: int = option(help="how many data-parallel processes the run had")
    model_paths: list[Path] = option(help="model directories that must load", comma=True)
    output: Path = option(help="the JSON file to write")


def verify(options: VerificationOptions) -> None:
    """Writes the two losses and per model its parameters.

    Raises:
        DataError: a model does not load, or the run left no metrics.
    """
    parameters: dict[str, int] = {}
    for path in options.model_paths:
        model, _ = load_model_and_tokenizer(path, "cpu")
        parameters[str(path)] = model.num_parameters()
        print(f"{path} loads: {parameters[str(path)]:,} parameters")
    run_options = read_json(options.save_dir / "config.json")
    reported = next(read_jsonl(options.save_dir / "metrics.jsonl"), None)
    if reported is None:
        raise DataError(f"{options.save_dir / 'metrics.jsonl'} has no step")
    loss = first_loss(run_options, options.processes)
    print(f"first loss: {reported[1]['loss']:.4f} in training, {loss:.4f} by plain transformers")
    figures = {"first_loss": {"training": reported[1]["loss"], "transformers": loss}}
    write_json(options.output, {**figures, "parameters": parameters})


def first_loss(run_options: dict[str, Any], data_processes: int) -> float:
    """Mean loss per predicted token, in nats, of the run's first global batch.

    In float32, one row at a time, with the weights of ``load_checkpoint`` or ``pretrained``.
    """
    import torch

    from colossal_llama.dataset.collator import collate
    from colossal_llama.dataset.loader import open_parts
    from colossal_llama.dataset.sampler import GlobalSampler
    from colossal_llama.dataset.writer import IGNORE_INDEX

    weights = Path(run_options["load_checkpoint"] or run_options["pretrained"])
    model, _ = load_model_and_tokenizer(weights, "cpu", "float32")
    rows = open_parts(
        [Path(path) for path in run_options["dataset"]], weights, run_options["max_length"]
    )
    accumulation = run_options["accumulation_steps"] or 1
    batch_size = run_options["micro_batch_size"] * accumulation * data_processes
    sampler = GlobalSampler(
        rows.datasets,
        run_options["seed"],
        batch_size,
        run_options["data_order"],
        run_options["dataset_weights"],
    )
    total, count = 0.0, 0
    for row in rows.take(sampler.batch(0)):
        batch = collate([row], pad_id=0)
        predicted = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        with torch.inference_mode():
            total += model(**batch).loss.item() * predicted
        count += predicted
    return total / count


if __name__ == "__main__":
    sys.exit(run(VerificationOptions, verify, prog="python -m colossal_llama.demo.verification"))
