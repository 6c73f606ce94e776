"""Training written down once more, in plain PyTorch and transformers, without ColossalAI.

One process takes the micro-batches of all ranks one after the other. In half precision it keeps
float32 masters, and adds gradients up in the working dtype and in the same order as the plugins
do: what is left of a difference is a mistake, or the order of sums inside a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.loader import open_parts
from colossal_llama.dataset.sampler import GlobalSampler
from colossal_llama.training.neftune import NoisyEmbeddings


class Order(Enum):
    """Of adding micro-batches up and taking the mean over ranks."""

    REDUCED = "means are added up"
    RUNNING = "each rank adds to the mean so far, of which the mean is taken"


Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained and how; all that a plugin should not change."""

    model: Path
    part: Path
    seed: int
    batch_size: int  # of a step
    ranks: int  # that share a step's rows
    passes: int  # micro-batches of a rank
    dtype: torch.dtype
    grad_clip: float
    frozen: bool = False  # all but the embeddings
    noise_alpha: float | None = None
    apart: bool = False  # each document for itself
    # How gradients of several micro-batches come together, and whether rows are as wide as the
    # widest of the step: both matter to rounding alone.
    order: Order = Order.REDUCED
    one_width: bool = False


class Plan(NamedTuple):
    """What a run decides about a step by rules that are tested elsewhere."""

    rate: float  # of learning
    scale: float | None  # of the loss; None but in fp16
    skipped: bool  # too large a scale: how large depends on where gradients are added up


class Step(NamedTuple):
    loss: float
    loss_by_category: dict[str, float]
    grad_norm: float | None  # None where no update was made
    tokens: int  # since the beginning


class Run(NamedTuple):
    steps: list[Step]
    before: Tensors  # float32 weights
    after: Tensors


class PlainLoop:
    """Trains in the ``setting``."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rows = open_parts([setting.part], setting.model, 512)
        self.sampler = GlobalSampler(self.rows.datasets, setting.seed, setting.batch_size)
        self.model = AutoModelForCausalLM.from_pretrained(setting.model, torch_dtype=setting.dtype)
        self.model.train()
        self.noise = None
        if setting.noise_alpha:
            self.noise = NoisyEmbeddings(self.model, setting.noise_alpha, setting.seed)
        self.trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not setting.frozen or "embed_tokens" in name or "lm_head" in name
        }
        self.masters = {n: p.detach().float().clone() for n, p in self.trained.items()}
        groups = [
            {"params": [m for m in self.masters.values() if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters.values() if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,  # its default differs in the last bit
        )

    def run(self, plans: Sequence[Plan]) -> Run:
        """Takes the steps of ``plans``."""
        before = {name: master.clone() for name, master in self.masters.items()}
        steps: list[Step] = []
        for number, plan in enumerate(plans):
            numbers = self.sampler.batch(number * self.setting.batch_size)
            rows = self.rows.take(numbers)
            sums, norm = self._step(rows, number, plan)
            counts = _by_category((row["category"], len(_targets(row))) for row in rows)
            tokens = sum(len(row["input_ids"]) for row in rows)
            steps.append(
                Step(
                    sum(sums.values()) / sum(counts.values()),
                    {name: sums[name] / counts[name] for name in sums},
                    norm,
                    tokens + (steps[-1].tokens if steps else 0),
                )
            )
        return Run(steps, before, self.masters)

    def _step(
        self, rows: list[Row], number: int, plan: Plan
    ) -> tuple[dict[str, float], float | None]:
        """The sum of losses by category and the gradient's norm; updates the weights."""
        setting = self.setting
        share = len(rows) // setting.ranks
        micro = share // setting.passes
        width = max(len(row["input_ids"]) for row in rows) if setting.one_width else 1
        scale = plan.scale or 1.0
        factor = setting.ranks * scale / sum(len(_targets(row)) for row in rows)
        losses: list[tuple[str, float]] = []
        total = [torch.zeros_like(parameter) for parameter in self.trained.values()]
        for start in range(0, share, micro):
            parts = []
            for first in range(start, len(rows), share):
                own = rows[first : first + micro]
                if self.noise is not None:
                    self.noise.start_step(number * setting.batch_size + first)
                sums = self._row_losses(own, width)
                names = (row["category"] for row in own)
                losses += zip(names, sums.tolist(), strict=True)
                parts.append(torch.autograd.grad(sums.sum() * factor, [*self.trained.values()]))
            total = [
                self._added(*sum_and_parts) for sum_and_parts in zip(total, *parts, strict=True)
            ]
        norm = None
        if not plan.skipped:
            norm = self._update([gradient.float() / scale for gradient in total], plan.rate)
        return _by_category(losses), norm

    def _added(self, total: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        """``total`` and the mean of ``parts``, which are the gradients of each rank."""
        if self.setting.order is Order.REDUCED:
            return total + torch.stack([part / len(parts) for part in parts]).sum(0)
        return torch.stack([(total + part) / len(parts) for part in parts]).sum(0)

    def _update(self, gradients: list[torch.Tensor], rate: float) -> float:
        norm = float(torch.stack([g.double().norm() for g in gradients]).norm())
        assert math.isfinite(norm)
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            master.grad = gradient * min(1.0, self.setting.grad_clip / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                self.trained[name].copy_(master)
        return norm

    def _row_losses(self, rows: list[Row], width: int) -> torch.Tensor:
        """The sum of losses of each row, float32 [rows]; rows are padded to ``width``."""
        batch = collate(rows, pad_id=0, pad_to_multiple_of=width)
        labels = batch.pop("labels")
        if self.setting.apart:
            logits = pad_sequence([self._document_logits(row) for row in rows], batch_first=True)
        else:
            if self.noise is not None:
                self.noise.expect(batch["attention_mask"].sum(dim=1))
            logits = self.model(**batch).logits
        flat = logits[:, :-1].float().flatten(0, 1)
        losses = cross_entropy(flat, labels[:, 1:].flatten(), reduction="none")
        return losses.view(len(rows), -1).sum(dim=1)

    def _document_logits(self, row: Row) -> torch.Tensor:
        """The logits of a row whose documents the model sees one at a time."""
        ids = torch.tensor(row["input_ids"]).split(list(row["document_lengths"]))
        return torch.cat([self.model(input_ids=part[None]).logits[0] for part in ids])


def _targets(row: Row) -> list[int]:
    """The labels of a row that carry a loss: nothing predicts the first."""
    return [label for label in row["labels"][1:] if label != -100]


def _by_category(values: Any) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for name, value in values:
        sums[name] = sums.get(name, 0) + value
    return sums
