"""Trains the embedding rows of new pieces only; the old rows stay as they are, bit for bit.

An optimizer knows whole matrices, so three things keep the old rows out of it:

- Their gradient is set to zero before anything sees it: a gradient norm is that of what trains,
  and Adam's moments of old rows stay zero.
- Its weight decay is off for the embeddings, because it would shrink old rows, too.
- The new rows are decayed here, in the same place of the update: before the step of Adam.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.training.optimizer_shares import share_of
from colossal_llama.training.parameters import embedding_weights


@dataclass
class NewRows:
    """Keeps all but the new rows of a model's embeddings as they are.

    Args:
        old: rows that are not new; they come first.
        weight_decay: of the new rows.
    """

    old: int
    weight_decay: float
    # Embedding, and the index of the first element of its new rows in it.
    _first: list[tuple[torch.nn.Parameter, int]] = field(default_factory=list)
    # Optimizer's share of an embedding, and the index of the first new element in that.
    _shares: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def mask(self, model: Any, tensor_group: Any = None) -> None:
        """Hides the old rows' gradients.

        Hooks run in the order in which they were added: with Gemini, whose own hook takes the
        gradient away, this has to come before the model is boosted. Elsewhere it comes after, when
        every process has the embeddings that it will train.

        Args:
            tensor_group: the processes among which the rows are divided, if they are.
        """
        for weight in embedding_weights(model):
            rows, width = weight.shape
            above = 0 if tensor_group is None else dist.get_rank(tensor_group) * rows
            own_old = min(max(self.old - above, 0), rows)
            self._first.append((weight, own_old * width))
            if weight.requires_grad:
                weight.register_hook(partial(_without_first_rows, own_old))

    def decay_in(self, optimizer: Any) -> None:
        """Decays the new rows before each step of a boosted optimizer."""
        for weight, first in self._first:
            share = share_of(optimizer, weight) if weight.requires_grad else None
            if share is not None:
                master, begin = share
                self._shares.append((master, max(first - begin, 0)))
        optimizer.optim.register_step_pre_hook(self._decay)

    @torch.no_grad()
    def _decay(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        for master, first in self._shares:
            master.data.view(-1)[first:].mul_(1 - rate * self.weight_decay)


def _without_first_rows(rows: int, gradient: torch.Tensor) -> torch.Tensor:
    # A copy: autograd's own must not be changed.
    gradient = gradient.clone()
    gradient[:rows] = 0
    return gradient
