"""Goes on where a checkpoint ends, and says what cannot be carried over."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from colossal_llama import storage
from colossal_llama.errors import DataError, agreed
from colossal_llama.training import parameters
from colossal_llama.training.arguments import AUTO, TrainOptions
from colossal_llama.training.boosting import Boosted
from colossal_llama.training.checkpoint import restore, restore_from_shares, verify
from colossal_llama.training.loading import check_same_model, say
from colossal_llama.training.lora import base_directory
from colossal_llama.training.optimizer_shares import named_shares
from colossal_llama.training.save_dir import changed_settings, config_file
from colossal_llama.training.state import (
    RunningState,
    goes_on_in,
    is_checkpoint,
    newest_checkpoint,
    read_running_state,
)


class Beginning(NamedTuple):
    """Where a run begins or goes on.

    Args:
        options: the flags as they are meant.
        checkpoint: that is resumed; None for a new run.
        start: what the run begins from, or began from if this goes on with it: weights, or a
            checkpoint of another run; None for ``--pretrained``.
    """

    options: TrainOptions
    checkpoint: Path | None
    start: str | None


def find_beginning(options: TrainOptions) -> Beginning:
    """What ``--load_checkpoint`` stands for.

    With ``auto`` a run that has not saved yet begins from the same weights as before. One that has
    says which settings are others now.

    Raises:
        DataError: the weights are gone.
    """
    checkpoint, start = _checkpoint_to_load(options), _begun_from(options)
    if options.load_checkpoint == AUTO and checkpoint is not None:
        _say_changes(options)
    elif options.load_checkpoint == AUTO and start is not None:
        if not Path(start).is_dir():
            raise agreed(
                DataError(f"{start}, from which the run in {options.save_dir} began, is gone")
            )
        say(f"{options.save_dir} has no checkpoint yet; its run began from {start}")
        options = dataclasses.replace(options, load_checkpoint=start)
        checkpoint = _checkpoint_to_load(options)
    return Beginning(options, checkpoint, start)


def _checkpoint_to_load(options: TrainOptions) -> Path | None:
    """The checkpoint of the run that is resumed; None for a new run."""
    load = options.load_checkpoint
    if load == AUTO:
        # Another machine may see an older state of a shared file system.
        newest = [newest_checkpoint(options.save_dir) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(newest, src=0)
        return newest[0]
    return Path(load) if load is not None and is_checkpoint(Path(load)) else None


def _begun_from(options: TrainOptions) -> str | None:
    """As the flags say, or for a run that goes on, those that were written when it began."""
    if not goes_on_in(options.save_dir, options.load_checkpoint):
        return options.load_checkpoint
    found = [_recorded_start(options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _recorded_start(options: TrainOptions) -> str | None:
    path = config_file(options)
    if not path.is_file():
        return None
    try:
        flags = storage.read_json(path)
    except DataError:
        return None  # it will be written anew
    if not isinstance(flags, dict) or flags.get("pretrained") != str(options.pretrained):
        return None
    start: str | None = flags.get("load_checkpoint")
    return None if goes_on_in(options.save_dir, start) else start


def _say_changes(options: TrainOptions) -> None:
    if dist.get_rank() == 0:
        with suppress(DataError):  # a damaged file is written anew
            if changes := changed_settings(options):
                say(f"warning: goes on with changed settings: {', '.join(changes)}")


def weights_directory(options: TrainOptions, resumed: Path | None) -> Path:
    """Where the weights to start from are."""
    if resumed is not None:
        return base_directory(options, resumed) if options.lora_rank else resumed / "modeling"
    load = options.load_checkpoint
    return options.pretrained if load in (None, AUTO) else Path(load)


def initial_state(
    options: TrainOptions, fingerprints: list[str], resumed: Path | None
) -> RunningState:
    """The state of the checkpoint that is resumed, or that of a new run.

    Raises:
        DataError: the checkpoint is damaged, of another model, or was made with other data.
    """
    state = new_state(options, fingerprints)
    if resumed is None:
        weights = weights_directory(options, resumed)
        if weights.name == "modeling" and is_checkpoint(weights.parent):
            verify(weights.parent, "modeling/")
        return state
    saved = read_running_state(resumed)
    if saved.config_fingerprint != state.config_fingerprint:
        check_same_model(resumed, options.pretrained)
    verify(resumed)
    if saved.dataset_fingerprints != state.dataset_fingerprints:
        raise DataError(
            f"{resumed} was trained on other data than --dataset names; resume with the same parts "
            f"in the same order, or start a new stage with --load_checkpoint {resumed / 'modeling'}"
        )
    state.epoch, state.step = saved.epoch, saved.step
    state.samples, state.tokens = saved.samples, saved.tokens
    state.callbacks = saved.callbacks
    return state


def new_state(options: TrainOptions, fingerprints: list[str]) -> RunningState:
    """The state of a run that has not begun."""
    return RunningState(
        world_size=dist.get_world_size(),
        plugin=options.plugin,
        layout={
            "tp": options.tp,
            "pp": options.pp,
            "sp": options.sp,
            "zero_stage": options.zero_stage,
        },
        mixed_precision=options.mixed_precision,
        trained=parameters.describe(options),
        order={
            "seed": options.seed,
            "data_order": options.data_order,
            "dataset_weights": options.dataset_weights,
        },
        config_fingerprint=storage.sha256_file(options.pretrained / "config.json"),
        dataset_fingerprints=fingerprints,
    )


def resume(checkpoint: Path, state: RunningState, boosted: Boosted) -> None:
    """Restores optimizer and random states, and says what cannot be carried over."""
    saved = read_running_state(checkpoint)
    changed = [
        f"--{name} was {saved.order.get(name)}, now {value}"
        for name, value in state.order.items()
        if saved.order.get(name) != value
    ]
    if changed:
        say(
            f"warning: {'; '.join(changed)}: the order of the data is another one, of which the "
            f"first {state.samples:,} samples are left out"
        )
    if saved.identity() == state.identity():
        restore(checkpoint, boosted.optimizer, boosted.layout)
        return
    shares = named_shares(boosted.model, boosted.optimizer, boosted.layout.tensor_group)
    if saved.can_become(state) and restore_from_shares(checkpoint, boosted.optimizer, shares):
        kept = "weights, the optimizer's moments and the data position are carried over; sums are "
        kept += "added up in another order, so that losses differ in late digits"
    else:
        kept = "weights (as modeling/ has them) and data position are carried over, the "
        kept += "optimizer's moments start anew"
    say(
        f"warning: {checkpoint} was written by {saved.identity()}, this is {state.identity()}: "
        f"{kept}"
    )
