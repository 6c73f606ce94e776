"""The loss of every token, in float32, the same for every plugin.

The model is asked for logits, and the cross-entropy is taken here: ColossalAI's own is taken in
the working dtype, counts the padding of a vocabulary that does not divide, and knows only means.
With a loss for each token, sums over ranks and categories are exact however rows are spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from colossal_llama.dataset.writer import IGNORE_INDEX

# Logits that the fused loss holds at a time: 128 MiB in float32.
CHUNK_LOGITS = 2**25


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of the next token, for each token.

    Args:
        vocab_size: of the model; a plugin may add rows to make it divide.
        tensor_group: the processes among which the logits of a token are divided, if they are.
        first_logit: token id of the first logit that this process has.
        sequence_group: the processes among which the tokens of a row are divided, if they are.
        head: the output embedding, if the model returns hidden states in place of logits, which
            are then never held as a whole.
    """

    vocab_size: int
    tensor_group: Any = None
    first_logit: int = 0
    sequence_group: Any = None
    head: Any = None

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses in nats; 0 where the next token carries none.

        Args:
            output: logits [batch, own sequence, own vocabulary], or hidden states.
            labels: int64 [batch, sequence], -100 where there is no loss.

        Returns:
            float32 [batch, own sequence].
        """
        # Gemini's tensors are of a class of its own, which reimplements some operations.
        output = output.as_subclass(torch.Tensor)
        targets = self.own_part(next_tokens(labels), output.shape[1])
        flat, wanted = output.flatten(0, 1), targets.flatten()
        if self.head is not None:
            weight = self.head.weight[: self.vocab_size]
            losses = _chunked_cross_entropy(flat, weight, wanted)
        elif self.tensor_group is not None:
            losses = _DividedCrossEntropy.apply(flat, wanted, self.first_logit, self.tensor_group)
        else:
            losses = F.cross_entropy(
                flat.float(), wanted, reduction="none", ignore_index=IGNORE_INDEX
            )
        return losses.float().view_as(targets)

    def own_part(self, targets: torch.Tensor, width: int) -> torch.Tensor:
        """Of ``targets``, [batch, sequence], the ``width`` columns that this process has."""
        if self.sequence_group is None:
            return targets
        assert width * dist.get_world_size(self.sequence_group) == targets.shape[1]
        start = dist.get_rank(self.sequence_group) * width
        return targets[:, start : start + width].contiguous()


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """For each place the label that follows it, -100 after the last; int64 [batch, sequence]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _chunked_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Head and cross-entropy in one, a chunk of tokens at a time; float32 [tokens].

    A chunk's logits are computed again in the backward pass: never held, at the price of one
    more product with the head. (torch's own ``linear_cross_entropy`` does the same, but returns
    losses in the working dtype.)
    """

    def of_chunk(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, head).float()
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)

    size = max(1, CHUNK_LOGITS // head.shape[0])
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(of_chunk, part, head, wanted, use_reentrant=False) for part, wanted in chunks]
    )


class _DividedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits whose vocabulary is divided among processes.

    Each process contributes the maximum, the sum of exponentials and, if it holds it, the logit
    of the wanted token (Shoeybi et al. 2019, "Megatron-LM", section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, first: int, group: Any
    ) -> torch.Tensor:
        """Logits [tokens, own vocabulary], targets int64 [tokens]; float32 [tokens]."""
        ctx.dtype, ctx.width = logits.dtype, logits.shape[1]
        if not ctx.width:  # a process may have nothing but padding
            logits = F.pad(logits, (0, 1), value=-torch.inf)
        scores, width = logits.float(), logits.shape[1]
        largest = scores.amax(dim=1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scores = scores - largest[:, None]
        places = targets - first
        here = (places >= 0) & (places < ctx.width)
        places = places.clamp(0, width - 1)
        sums = torch.zeros(2, len(targets), device=scores.device)
        sums[1] = torch.where(here, scores.gather(1, places[:, None])[:, 0], 0.0)
        probabilities = scores.exp_()
        sums[0] = probabilities.sum(dim=1)
        dist.all_reduce(sums, group=group)
        probabilities /= sums[0][:, None]
        counted = targets != IGNORE_INDEX
        ctx.save_for_backward(probabilities, places, here, counted)
        return torch.where(counted, sums[0].log() - sums[1], 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, places, here, counted = ctx.saved_tensors
        gradient = probabilities.scatter_add(1, places[:, None], -here.float()[:, None])
        gradient *= torch.where(counted, gradients[0], 0.0)[:, None]
        return gradient[:, : ctx.width].to(ctx.dtype), None, None, None
