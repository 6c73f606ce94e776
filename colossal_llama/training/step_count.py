"""How many rows a step takes, and how many steps a run."""

from __future__ import annotations

import math

from colossal_llama.dataset.manifest import Manifest
from colossal_llama.errors import DataError
from colossal_llama.training.arguments import TrainOptions


def accumulation_steps(options: TrainOptions, manifest: Manifest) -> int:
    """What was asked for; otherwise 8 for SFT data, 1 for others, and at least ``--pp``."""
    if options.accumulation_steps is not None:
        return options.accumulation_steps
    return max(8 if manifest.kind == "sft" else 1, options.pp)


def rows_of_a_step(options: TrainOptions, manifest: Manifest, processes: int) -> int:
    """The global batch: that of all data parallel ranks, with all its micro-batches."""
    data_ranks = processes // (options.tp * options.pp * options.sp)
    return data_ranks * options.micro_batch_size * accumulation_steps(options, manifest)


def check_enough(options: TrainOptions, rows: int, batch_size: int) -> None:
    """Refuses a run whose first step would need rows twice.

    Raises:
        DataError: the data is not enough for one step.
    """
    epochs = options.num_epochs if options.max_steps is None else 1
    if rows * epochs < batch_size:
        raise DataError(
            f"--dataset has {rows:,} rows, fewer than the {batch_size:,} of one step: prepare more "
            "data, or lower --micro_batch_size or --accumulation_steps"
        )


def last_step(options: TrainOptions, step: int, samples: int, rows: int, batch_size: int) -> int:
    """The last step of a run that has taken ``step`` steps over ``samples`` samples."""
    if options.max_steps is not None:
        return options.max_steps
    samples_left = max(0, options.num_epochs * rows - samples)
    return step + math.ceil(samples_left / batch_size)
