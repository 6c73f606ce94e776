"""Opens prepared parts and turns their rows into batches, in an order that any run can resume."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.bins import seeded_order
from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    Manifest,
    Part,
    check_files,
    check_tokenizer,
    read_manifest,
    tokenizer_identity,
)
from colossal_llama.dataset.writer import ARROW_FILE, IGNORE_INDEX
from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass
class TrainingRows:
    """The rows of one or several parts, part after part.

    ``rows_per_part`` and ``fingerprints`` (SHA-256 of its rows) have an entry for each part
    that has rows. Kind, tokenizer and chat template of ``manifest`` are those of all parts.
    """

    dataset: Any
    manifest: Manifest
    rows_per_part: list[int]
    fingerprints: list[str]

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The rows ``indices``: ``input_ids`` and ``labels``, integers [length] each."""
        columns = self.dataset[list(indices)]
        return [
            {"input_ids": input_ids, "labels": labels}
            for input_ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]


def open_parts(paths: Sequence[Path], tokenizer_dir: Path, max_length: int) -> TrainingRows:
    """Opens parts for training, after checking them at the door.

    Args:
        paths: ``part-*`` directories, or output directories, which stand for all their parts.
        tokenizer_dir: the tokenizer of the model that is trained.
        max_length: longest row in tokens that the run takes.

    Raises:
        DataError: a part is missing or incomplete, was made with another tokenizer, has longer
            rows, or the parts do not belong together; names both sides.
    """
    import datasets

    parts = part_directories(paths)
    manifests = {part.parent: read_manifest(part.parent) for part in parts}
    tokenizer = tokenizer_identity(tokenizer_dir)
    for directory, manifest in manifests.items():
        check_tokenizer(manifest, directory, tokenizer, tokenizer_dir)
    _check_alike(manifests)
    loaded, fingerprints = [], []
    for part in parts:
        entry = _check_part(part, manifests[part.parent], max_length)
        if entry.rows:
            loaded.append(datasets.load_from_disk(str(part)))
            fingerprints.append(entry.files[ARROW_FILE].sha256)
    if not loaded:
        raise DataError(f"{', '.join(map(str, paths))}: no part has any row")
    dataset = datasets.concatenate_datasets(loaded).with_format("numpy")
    first = manifests[parts[0].parent]
    return TrainingRows(dataset, first, [len(part) for part in loaded], fingerprints)


def part_directories(paths: Sequence[Path]) -> list[Path]:
    """``paths`` with every directory of parts replaced by its parts, in order.

    Raises:
        DataError: a path is neither, or a part is named twice.
    """
    parts: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: no such directory; expected a part-* directory")
        if (path / MANIFEST_FILE).is_file():
            parts += [path / name for name in sorted(read_manifest(path).parts)]
        else:
            parts.append(path.resolve())  # "." too has a parent with a manifest
    for index, part in enumerate(parts):
        if part.resolve() in (other.resolve() for other in parts[:index]):
            raise DataError(f"{part} is given twice; its rows would count double")
    return parts


def collate(
    rows: Sequence[Mapping[str, Any]], pad_id: int, pad_to_multiple_of: int = 1
) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest of them.

    The mask comes from the lengths: where pad and eos are one id, an eos in a row stays seen.

    Args:
        rows: mappings with ``input_ids`` and ``labels``, integers [length].
        pad_id: any id of the vocabulary; the mask hides it.
        pad_to_multiple_of: rounds the width up.

    Returns:
        int64 [batch, sequence] each: ``input_ids``, ``labels`` (-100 on padding),
        ``attention_mask`` (1 on tokens), ``position_ids`` (0, 1, 2, ...).
    """
    import torch

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = -(-int(lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = int(lengths[index])
        input_ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
    positions = torch.arange(width).expand(len(rows), width)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": (positions < lengths[:, None]).to(torch.int64),
        "position_ids": positions.contiguous(),
    }


class GlobalSampler:
    """The order of samples of a run: one endless stream of rows, cut into global batches.

    An epoch takes the parts in the order given and shuffles the rows inside each; the stream is
    epoch after epoch. It is a pure function of (``rows_per_part``, ``seed``): all that a run
    has to remember is how many samples it has consumed, and after a restart with another number
    of processes or another batch size the stream goes on at that very sample. The last batch of
    the last epoch is full: it runs on into the epoch that would follow.
    """

    def __init__(self, rows_per_part: Sequence[int], seed: int, batch_size: int) -> None:
        self.num_rows = sum(rows_per_part)
        self.batch_size = batch_size
        assert self.num_rows > 0
        assert batch_size > 0
        self._rows_per_part = list(rows_per_part)
        self._seed = seed
        # Two epochs suffice: a batch seldom touches more than the end of one and the next.
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def batch(self, consumed: int) -> list[int]:
        """Row numbers of the global batch that follows the first ``consumed`` samples."""
        found: list[int] = []
        while len(found) < self.batch_size:
            epoch, offset = divmod(consumed + len(found), self.num_rows)
            missing = self.batch_size - len(found)
            found += self._order(epoch)[offset : offset + missing].tolist()
        return found

    def _shuffle(self, epoch: int) -> np.ndarray:
        import numpy as np

        order, first = [], 0
        for part, rows in enumerate(self._rows_per_part):
            order.append(first + seeded_order(rows, self._seed, "epoch", epoch, "part", part))
            first += rows
        return np.concatenate(order)


def _check_part(part: Path, manifest: Manifest, max_length: int) -> Part:
    check_files(manifest, part)
    entry = manifest.parts[part.name]
    if entry.longest_row > max_length:
        raise DataError(
            f"{part} has rows of {entry.longest_row} tokens, --max_length is {max_length}; "
            f"raise it, or prepare the dataset with --max_length {max_length}"
        )
    return entry


def _check_alike(manifests: dict[Path, Manifest]) -> None:
    """Raises DataError if parts of different kinds or chat formats are to be mixed."""
    (first_path, first), *others = manifests.items()
    for path, manifest in others:
        if manifest.kind != first.kind:
            raise DataError(
                f"{path} is a {manifest.kind} dataset, {first_path} a {first.kind} dataset; "
                "train on one kind at a time"
            )
        if manifest.chat_template != first.chat_template:
            raise DataError(
                f"{path} and {first_path} were formatted with different chat templates; "
                "prepare them with the same tokenizer_config.json"
            )
