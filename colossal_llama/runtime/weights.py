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
    that writes, would leave the others waiting in the collective that gathers the next shard, or
    in the barrier after which the first stage of a pipeline puts the indices of all together.
    Where an index cannot be written, the block ends with the error.

    May go when Booster takes a function that writes.
    """
    from colossalai.checkpoint_io import utils
    from colossalai.checkpoint_io.index_file import CheckpointIndexFile

    original, original_index = utils.save_state_dict, CheckpointIndexFile.write_index_file
    failed: list[OSError] = []

    def save(
        state_dict: dict[str, torch.Tensor], checkpoint_file_path: str, use_safetensors: bool
    ) -> None:
        assert use_safetensors
        write(dict(state_dict), Path(checkpoint_file_path))

    def save_index(index: CheckpointIndexFile, name: str) -> None:
        try:
            original_index(index, name)
        except OSError as error:
            failed.append(error)
            Path(index.root_path, name).unlink(missing_ok=True)  # others would read half of it

    utils.save_state_dict, CheckpointIndexFile.write_index_file = save, save_index
    try:
        yield
    finally:
        utils.save_state_dict, CheckpointIndexFile.write_index_file = original, original_index
    if failed:
        raise failed[0]
