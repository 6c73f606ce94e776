"""From row numbers to the micro-batches of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.loader import TrainingRows
from colossal_llama.dataset.writer import IGNORE_INDEX
from colossal_llama.training.plugins import Layout

# labels: int64 [batch, sequence], category and length: int64 [batch], and what MODEL_INPUTS names.
Batch = dict[str, torch.Tensor]

# What the model itself takes; the rest is for the loss and for the noise.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class BatchMaker:
    """Reads rows and collates this process's share of them.

    Args:
        rows: of all datasets.
        layout: which share is this process's.
        micro_batch_size: rows of a forward pass.
        pad_id: any id of the vocabulary.
        across_documents: whether tokens attend to other documents in their row; otherwise
            positions restart and the attention mask is [batch, 1, sequence, sequence].
        dtype: of such a mask.
    """

    rows: TrainingRows
    layout: Layout
    micro_batch_size: int
    pad_id: int
    across_documents: bool = True
    dtype: torch.dtype = torch.float32

    def own_share(self, numbers: Sequence[int]) -> Sequence[int]:
        """The rows of a global batch that this process's data rank takes."""
        share = len(numbers) // self.layout.data_size
        return numbers[self.layout.data_rank * share : (self.layout.data_rank + 1) * share]

    def make(self, numbers: Sequence[int]) -> list[Batch]:
        """This process's micro-batches of the global batch with the rows ``numbers``.

        Raises:
            DataError: a file is damaged where the rows are.
        """
        rows = self.rows.take(self.own_share(numbers))
        whole = self.collate(rows)
        batches = [
            {name: tensor[start : start + self.micro_batch_size] for name, tensor in whole.items()}
            for start in range(0, len(rows), self.micro_batch_size)
        ]
        if self.layout.pipeline:  # its stages expect one shape
            return batches
        return [_trim(batch, self.layout.sequence_multiple) for batch in batches]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """All of ``rows`` as one batch."""
        batch = collate(
            rows,
            self.pad_id,
            pad_to_multiple_of=self.layout.sequence_multiple,
            restart_positions=not self.across_documents,
        )
        categories = self.rows.categories
        batch["category"] = torch.tensor([categories.index(row["category"]) for row in rows])
        batch["length"] = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch

    def model_inputs(self, batch: Batch, device: torch.device) -> Batch:
        """What the model takes of ``batch``, on ``device``."""
        inputs = {name: batch[name].to(device) for name in MODEL_INPUTS}
        if not self.across_documents:
            inputs["attention_mask"] = document_mask(inputs["position_ids"], self.dtype)
        return inputs


def document_mask(positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A causal mask that keeps documents apart, to be added to attention scores.

    Args:
        positions: int64 [batch, sequence], 0 where a document, or the padding, begins.
        dtype: of the result.

    Returns:
        [batch, 1, sequence, sequence], 0 where row i may attend to column j, otherwise the
        lowest number. Padding attends to padding: a row without any attention would be NaN.
    """
    document = (positions == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    mask = torch.zeros(same.shape, dtype=dtype, device=positions.device)
    mask.masked_fill_(~same.tril(), torch.finfo(dtype).min)
    return mask[:, None]


def loss_tokens(batch: Batch) -> int:
    """Number of tokens that are predicted: a row's first label has nothing before it."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def tokens(batch: Batch) -> int:
    """Number of tokens, padding excluded."""
    return int(batch["length"].sum())


def loss_tokens_by_category(batches: Sequence[Batch], categories: int) -> np.ndarray:
    """Loss-carrying tokens of each category, int64 [categories]."""
    counts = np.zeros(categories, dtype=np.int64)
    for batch in batches:
        own = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).numpy()
        np.add.at(counts, batch["category"].numpy(), own)
    return counts


def _trim(batch: Batch, multiple: int) -> Batch:
    """Cuts padding that no row of this micro-batch needs."""
    width = -(-int(batch["length"].max()) // multiple) * multiple
    return {name: t[:, :width] if t.dim() > 1 else t for name, t in batch.items()}
