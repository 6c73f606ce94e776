"""Turns rows into a batch: padded on the right, with a mask that comes from their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.writer import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np
    import torch


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_id: int,
    pad_to_multiple_of: int = 1,
    *,
    restart_positions: bool = False,
) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest of them.

    The mask comes from the lengths: where pad and eos are one id, an eos in a row stays seen.

    Args:
        rows: mappings with ``input_ids`` and ``labels``, integers [length].
        pad_id: any id of the vocabulary; the mask hides it.
        pad_to_multiple_of: rounds the width up.
        restart_positions: positions begin at 0 with every document of a row, and with its
            padding; the rows have ``document_lengths`` then, integers [documents] that add up
            to the row's length.

    Returns:
        int64 [batch, sequence] each: ``input_ids``, ``labels`` (-100 on padding),
        ``attention_mask`` (1 on tokens), ``position_ids`` (0, 1, 2, ...).
    """
    import numpy as np
    import torch

    lengths = np.array([len(row["input_ids"]) for row in rows])
    width = -(-int(lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.tile(np.arange(width), (len(rows), 1))
    for index, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        input_ids[index, :length] = row["input_ids"]
        labels[index, :length] = row["labels"]
        if restart_positions:
            position_ids[index] -= _starts([*row["document_lengths"], width - length], width)
    arrays = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
        "position_ids": position_ids,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _starts(lengths: Sequence[int], width: int) -> np.ndarray:
    """For each of ``width`` places the first place of its document, int64 [width]."""
    import numpy as np

    assert sum(lengths) == width
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(ends - lengths, lengths)
