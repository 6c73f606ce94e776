"""Embedding rows for new pieces, from the rows of what spelled them before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.fast_tokenizer import load_bare
from colossal_llama.tokenizer.fingerprint import id_to_piece, read_fast_json

if TYPE_CHECKING:
    import torch


def old_segmentations(source: Path, target: Path) -> list[list[int]]:
    """Ids in the ``source`` tokenizer of every piece that ``target`` has on top of it.

    The piece's own text is segmented, without the dummy prefix and without special tokens; what
    the source has no piece for, it spells in bytes.

    Raises:
        DataError: ``target`` is not an extension of ``source``: some old id has another piece.
    """
    old, new = id_to_piece(source), id_to_piece(target)
    for key, piece in enumerate(old):
        if key >= len(new):
            raise DataError(
                f"{target}: not an extension of {source}: it has {len(new)} ids and the source "
                f"{len(old)}"
            )
        if new[key] != piece:
            raise DataError(
                f"{target}: not an extension of {source}: id {key} is {new[key]!r} here and "
                f"{piece!r} there"
            )
    added = [piece or "" for piece in new[len(old) :]]
    encodings = load_bare(read_fast_json(source)).encode_batch(added, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def extended(
    rows: torch.Tensor, old_size: int, segmentations: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The embedding with a row for every new piece.

    Args:
        rows: [rows, hidden], at least ``old_size`` of them; rows beyond it are padding that no
            id uses, and are left out.
        old_size: number of ids of the old tokenizer.
        segmentations: old ids of each new piece.

    Returns:
        [old_size + new, hidden] in the dtype of ``rows``: the old rows bit by bit, then for each
        new piece the mean, taken in float32, of the rows of its old segmentation. (Mean of the
        subword embeddings: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
        Models", and Colossal-LLaMA-2.) A piece without segmentation gets the mean of all rows.
    """
    import torch

    old = rows[:old_size]
    if not segmentations:
        return old.clone()
    everything = range(old_size)
    bags = [list(bag) or list(everything) for bag in segmentations]
    lengths = torch.tensor([0, *map(len, bags[:-1])])
    ids = torch.tensor([key for bag in bags for key in bag])
    means = torch.nn.functional.embedding_bag(ids, old.float(), lengths.cumsum(0), mode="mean")
    return torch.cat([old, means.to(rows.dtype)])
