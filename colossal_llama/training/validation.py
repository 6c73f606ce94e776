"""Opens the rows that a run is evaluated on, and counts once what never changes about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from colossal_llama.dataset.loader import TrainingRows, check_apart
from colossal_llama.dataset.manifest import VALIDATION_PART
from colossal_llama.dataset.tokenization import text_tokenizer
from colossal_llama.dataset.writer import IGNORE_INDEX
from colossal_llama.errors import DataError
from colossal_llama.tokenizer.piece_bytes import EVERY, FIRST, NONE, PieceBytes, piece_bytes
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.data import open_rows
from colossal_llama.training.loading import say


@dataclass(frozen=True)
class Validation:
    """The rows to evaluate on.

    Args:
        rows: of all validation parts.
        order: the rows' numbers, longest row first, int64 [rows]: rows of like length share a
            batch, and one that does not fit into memory is met at once.
        pieces: what the token ids spell.
        tokens: loss-carrying tokens of each category, int64 [categories].
        bytes: of the text that these tokens spell, int64 [categories].
    """

    rows: TrainingRows
    order: np.ndarray
    pieces: PieceBytes
    tokens: np.ndarray
    bytes: np.ndarray


def open_validation(options: TrainOptions, training: TrainingRows) -> Validation | None:
    """Opens ``--eval_dataset``, if there is one, on every process. Needs a process group.

    Raises:
        DataError: the parts do not fit the model's tokenizer or ``--max_length``, are trained on
            as well, or have nothing to predict.
    """
    if not options.eval_dataset:
        return None
    rows = open_rows(
        dataclasses.replace(options, dataset=options.eval_dataset, dataset_weights=None)
    )
    check_held_out(rows, training)
    fast = json.loads(text_tokenizer(options.pretrained).json)
    found = count(rows, piece_bytes(fast))
    if not found.tokens.any():
        raise DataError(
            f"--eval_dataset {' '.join(map(str, options.eval_dataset))}: no token carries loss"
        )
    return found


def check_held_out(rows: TrainingRows, training: TrainingRows) -> None:
    """Refuses rows that are trained on; warns of parts that may share documents with those."""
    check_apart(rows, training)
    parts = [file.path.parent for file in rows.files]
    directories = {file.path.parent.resolve().parent for file in training.files}
    for part in parts:
        if part.name != VALIDATION_PART and part.resolve().parent in directories:
            say(
                f"warning: --eval_dataset {part} may share documents with the parts beside it in "
                f"--dataset; only the part {VALIDATION_PART} shares none"
            )


def count(rows: TrainingRows, pieces: PieceBytes) -> Validation:
    """Reads all rows once.

    Raises:
        DataError: a file is damaged; now rather than in the middle of the run.
    """
    lengths = np.zeros(len(rows), dtype=np.int64)
    tokens = np.zeros(len(rows.categories), dtype=np.int64)
    sizes = np.zeros_like(tokens)
    for number in range(len(rows)):
        (row,) = rows.take([number])
        category = rows.categories.index(row["category"])
        lengths[number] = len(row["input_ids"])
        tokens[category] += np.count_nonzero(predicted(row))
        sizes[category] += text_bytes(row, pieces, rows.manifest.kind)
    return Validation(rows, np.argsort(-lengths, kind="stable"), pieces, tokens, sizes)


def predicted(row: Mapping[str, Any]) -> np.ndarray:
    """Which tokens of a row carry loss, bool [length]; the first has nothing before it."""
    found: np.ndarray = row["labels"] != IGNORE_INDEX
    found[:1] = False
    return found


def text_bytes(row: Mapping[str, Any], pieces: PieceBytes, kind: str) -> int:
    """UTF-8 bytes of the text that the loss-carrying tokens of a row spell.

    The space that a tokenizer puts before a text is not in it, and does not count.

    Args:
        row: with ``input_ids`` and ``labels``, int32 [length], and ``document_lengths``.
        pieces: of the row's tokenizer.
        kind: "pretrain" or "sft".
    """
    ids, carries = row["input_ids"], predicted(row)
    put_there = pieces.spaced[ids] & _text_starts(row, pieces, kind)
    return int(pieces.sizes[ids][carries].sum() - np.count_nonzero(put_there & carries))


def _text_starts(row: Mapping[str, Any], pieces: PieceBytes, kind: str) -> np.ndarray:
    """Where a text begins that the tokenizer put its space before, bool [length].

    Texts are tokenised one by one: what stands between bos and eos, source and target apart, and
    in a conversation what stands between two special tokens. A document that is cut goes on in
    another row without bos, and without such a space.
    """
    ids, labels = row["input_ids"], row["labels"]
    starts = np.zeros(len(ids), dtype=np.bool_)
    if pieces.prefix == NONE or (pieces.prefix == FIRST and kind == "sft"):
        return starts
    apart = pieces.is_added if pieces.prefix == EVERY else ~pieces.is_text
    starts[1:] = apart[ids[:-1]]
    if kind == "pretrain":
        starts[1:] |= (labels[:-1] == IGNORE_INDEX) & (labels[1:] != IGNORE_INDEX)
    starts[np.cumsum(row["document_lengths"])[:-1]] = False
    return starts
