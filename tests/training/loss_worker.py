"""One of several processes that divide the vocabulary, or the tokens of a row, among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from colossal_llama.training.loss import TokenLoss, next_tokens
from tests.training.stand_ins import in_process

BATCH, LENGTH, VOCABULARY = 2, 6, 11
# By number of processes: how many logits each has.
SHARDS = {
    "uneven": {2: [8, 3], 3: [4, 1, 6]},
    "last is empty": {2: [11, 0], 3: [6, 5, 0]},
    "first is empty": {2: [0, 11], 3: [0, 7, 4]},
}


def some_labels() -> torch.Tensor:
    torch.manual_seed(1)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels[0, 2] = labels[0, 3] = -100
    return labels


def exact(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The losses in float64."""
    flat = logits.double().flatten(0, 1)
    losses = F.cross_entropy(flat, next_tokens(labels).flatten(), reduction="none")
    return losses.view_as(labels)


def largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max()) if difference.numel() else 0.0


def own_slice(sizes: list[int]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def divided_vocabulary(sizes: list[int], dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """Largest errors of the losses and of this process's part of the gradient."""
    torch.manual_seed(2)
    labels = some_labels()
    logits = (torch.randn(BATCH, LENGTH, VOCABULARY) * scale).to(dtype)
    weights = torch.rand(BATCH, LENGTH)
    whole = logits.double().requires_grad_()
    wanted = exact(whole, labels)
    (wanted * weights).sum().backward()
    here = own_slice(sizes)
    own = logits[:, :, here].clone().requires_grad_()
    loss = TokenLoss(VOCABULARY, tensor_group=dist.group.WORLD, first_logit=here.start)
    losses = loss(own, labels)
    (losses * weights).sum().backward()
    assert own.grad is not None
    assert own.grad.dtype == dtype
    assert whole.grad is not None
    return largest(losses - wanted), largest(own.grad - whole.grad[:, :, here])


class OwnPart(torch.autograd.Function):
    """A process's part of logits that all have; backward, the sum of all parts' gradients."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, here: slice) -> torch.Tensor:
        ctx.shape, ctx.here = logits.shape, here
        return logits[:, :, here].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = torch.zeros(ctx.shape, dtype=gradients[0].dtype)
        whole[:, :, ctx.here] = gradients[0]
        dist.all_reduce(whole)
        return whole, None


def gradcheck(sizes: list[int]) -> bool:
    """Of the loss as a function of all logits: every process takes the same differences."""
    torch.manual_seed(5)
    labels, here = some_labels(), own_slice(sizes)
    loss = TokenLoss(VOCABULARY, tensor_group=dist.group.WORLD, first_logit=here.start)
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(
        lambda logits: loss(OwnPart.apply(logits, here), labels), logits,
        eps=1e-2, atol=1e-3, rtol=1e-2, fast_mode=True,
    )  # fmt: skip


def run(directory: Path) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, by_size in SHARDS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            errors = divided_vocabulary(by_size[size], dtype, scale=3)
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            found[f"{key} loss"], found[f"{key} gradient"] = errors
    found["huge"], _ = divided_vocabulary(SHARDS["uneven"][size], torch.float32, scale=1e4)
    found["huge"] /= 1e4
    found["gradcheck"] = gradcheck(SHARDS["uneven"][size])

    labels, here = some_labels(), own_slice(SHARDS["uneven"][size])
    torch.manual_seed(2)
    logits = torch.randn(BATCH, LENGTH, VOCABULARY)
    loss = TokenLoss(VOCABULARY, tensor_group=dist.group.WORLD, first_logit=here.start)
    found["losses"] = loss(logits[:, :, here], labels).tolist()

    part = slice(rank * LENGTH // size, (rank + 1) * LENGTH // size)
    wanted = TokenLoss(VOCABULARY)(logits, labels)[:, part]
    divided = TokenLoss(VOCABULARY, sequence_group=dist.group.WORLD)
    found["sequence"] = largest(divided(logits[:, part], labels) - wanted)
    head = nn.Linear(4, VOCABULARY, bias=False)
    torch.manual_seed(6)
    nn.init.normal_(head.weight)
    hidden = torch.randn(BATCH, LENGTH, 4)
    fused = TokenLoss(VOCABULARY, sequence_group=dist.group.WORLD, head=head)
    wanted = TokenLoss(VOCABULARY)(head(hidden), labels)[:, part]
    found["sequence fused"] = largest(fused(hidden[:, part], labels) - wanted)
    return found


if __name__ == "__main__":
    in_process(run)
