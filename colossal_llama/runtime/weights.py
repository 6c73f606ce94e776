"""Who writes the weights that ColossalAI gathers when a model is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def weights_written_by(write: Callable[[dict[str, torch.Tensor], Path], None]) -> Iterator[None]:
    """Inside the block ``Booster.save_model`` hands each shard to ``write`` (tensors, path).

    ColossalAI would write it itself, at once. An error in the midst of that, on the one process
    that writes, would leave the others waiting in the collective that gathers the next shard.

    May go when Booster takes a function that writes.
    """
    from colossalai.checkpoint_io import utils

    original = utils.save_state_dict

    def save(
        state_dict: dict[str, torch.Tensor], checkpoint_file_path: str, use_safetensors: bool
    ) -> None:
        assert use_safetensors
        write(dict(state_dict), Path(checkpoint_file_path))

    utils.save_state_dict = save
    try:
        yield
    finally:
        utils.save_state_dict = original
