"""Opens the data of a run with all its processes, and puts it in the order that the flags name."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from colossal_llama.dataset.loader import VERIFY_FULL, VERIFY_SIZE, TrainingRows, open_parts
from colossal_llama.dataset.sampler import GlobalSampler
from colossal_llama.errors import DataError
from colossal_llama.training.arguments import TrainOptions

# A terabyte from a slow disk takes hours. Who waits for it must not be taken for hung.
_LONGEST_VERIFICATION = datetime.timedelta(days=2)


def open_rows(options: TrainOptions) -> TrainingRows:
    """Opens the data on every process. Needs a process group.

    With ``--verify_data full`` one process of each machine reads every byte, and all of them
    wait for the outcome: whoever went on would load a model for nothing.

    Raises:
        DataError: on all processes, if one of them cannot use the data.
    """
    if options.verify_data != VERIFY_FULL:
        return _open(options, options.verify_data)
    group = dist.new_group(backend="gloo", timeout=_LONGEST_VERIFICATION)
    rows, mistake = None, None
    try:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        rows = _open(options, VERIFY_FULL if first else VERIFY_SIZE)
    except (DataError, OSError) as error:
        mistake = str(error)
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake, group)
    dist.destroy_process_group(group)
    for found in filter(None, mistakes):
        raise DataError(found)
    assert rows is not None
    return rows


def build_sampler(options: TrainOptions, rows: TrainingRows, batch_size: int) -> GlobalSampler:
    """The order of samples that the flags name."""
    return GlobalSampler(
        rows.datasets, options.seed, batch_size, options.data_order, options.dataset_weights
    )


def describe_mixture(options: TrainOptions, rows: TrainingRows, samples: int) -> list[str]:
    """A line for each weighted dataset: its share, and how often the run goes through it.

    Args:
        samples: of the whole run.
    """
    if options.dataset_weights is None:
        return []
    datasets = zip(options.dataset, options.dataset_weights, rows.datasets, strict=True)
    return [
        f"{path}: {weight:.1%} of the samples, {samples * weight / sum(parts):.2f} epochs of "
        f"{sum(parts):,} rows"
        for path, weight, parts in datasets
    ]


def _open(options: TrainOptions, verify: str) -> TrainingRows:
    rows = open_parts(options.dataset, options.pretrained, options.max_length, verify)
    for path, parts in zip(options.dataset, rows.datasets, strict=True):
        if options.dataset_weights is not None and not parts:
            raise DataError(f"{path} has no rows, but a share in --dataset_weights; leave both out")
    return rows
