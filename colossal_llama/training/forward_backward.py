"""One pass forward and backward over a global batch, with or without a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.training.batches import Batch, BatchMaker
from colossal_llama.training.loss import TokenLoss
from colossal_llama.training.neftune import NoisyEmbeddings
from colossal_llama.training.plugins import Layout

# Takes the losses of a micro-batch, float32 [batch, own sequence], and the micro-batch.
Receiver = Callable[[torch.Tensor, Batch], None]


@dataclass
class Passes:
    """Runs the model over micro-batches; the plugin's ways of doing so end here."""

    booster: Any
    model: Any
    optimizer: Any
    batches: BatchMaker
    token_loss: TokenLoss
    layout: Layout
    noise: NoisyEmbeddings | None
    device: torch.device

    def __post_init__(self) -> None:
        self._finite: list[torch.Tensor] = []
        self._progress: Callable[[], None] | None = None
        self.model.unwrap().register_forward_pre_hook(self._tell)
        if not self.layout.pipeline or self._holds_embeddings():
            self.model.unwrap().get_input_embeddings().register_forward_hook(self._watch)

    def start_step(self, consumed: int, batch_size: int) -> None:
        """Before a step: how many samples came before it, and how many it has."""
        self._finite.clear()
        if self.noise is not None:
            share = batch_size // self.layout.data_size
            self.noise.start_step(consumed + self.layout.data_rank * share)

    def backward_was_finite(self) -> bool:
        """Whether all that flowed back to the embeddings in this step was finite.

        On this process, before gradients are summed over processes. True where nothing flows
        back: frozen embeddings, later stages of a pipeline.
        """
        return all(bool(finite) for finite in self._finite)

    def _tell(self, module: Any, args: Any) -> None:
        if self._progress is not None:
            self._progress()

    def _watch(self, module: Any, args: Any, embedded: torch.Tensor) -> None:
        if embedded.requires_grad:
            finite = self._finite  # a hook that held the model could keep it alive
            # Kept on the device: reading it would wait.
            embedded.register_hook(lambda g: finite.append(torch.isfinite(g).all()))

    def _holds_embeddings(self) -> bool:
        return bool(self.booster.plugin.stage_manager.is_first_stage())

    def forward_backward(
        self,
        micro_batches: Sequence[Batch],
        per_token: float,
        progress: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Adds the gradients of the sum of all losses times ``per_token``.

        Plugins average gradients over the data and sequence parallel ranks, which is undone here.

        Args:
            progress: is called when a micro-batch begins.

        Returns:
            float64 [categories], this process's sum of losses (without the factor).
        """
        self._progress = progress
        try:
            return self._forward_backward(micro_batches, per_token)
        finally:
            self._progress = None

    def _forward_backward(self, micro_batches: Sequence[Batch], per_token: float) -> torch.Tensor:
        sums = self._no_sums()
        factor = per_token * self.layout.gradient_ranks
        if self.layout.pipeline:
            # The schedule divides by the number of micro-batches, so multiply by it first.
            add = functools.partial(self._add, sums)
            self._pipeline(micro_batches, add, factor * len(micro_batches), self.optimizer)
            return sums
        for batch in micro_batches:
            if self.noise is not None:
                self.noise.expect(batch["length"])
            losses = self._losses(batch)
            self._add(sums, losses, batch)
            self.booster.backward(losses.sum() * factor, self.optimizer)
        return sums

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch], receive: Receiver) -> None:
        """Runs the model without gradients; the next step finds everything as it was.

        Args:
            receive: is handed the losses of each micro-batch, where this process has them.
        """
        with self._unchanged():
            if not self.layout.pipeline:
                for batch in micro_batches:
                    receive(self._losses(batch), batch)
                return
            # Otherwise the plugin would reduce gradients afterwards, and there are none.
            with self.model.no_sync():
                self._pipeline(micro_batches, receive, 1.0, None)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Keeps what plugins remember from one training step to the next.

        A pipeline's schedule takes the size of what was evaluated for that of the training, and
        refuses the next step (``pipeline/schedule/one_f_one_b.py``, ``load_batch``). Gemini's
        automatic placement counts operations to know how much memory comes next, and passes
        without a backward one would shift its count (``memory_tracer/memstats_collector.py``).
        """
        manager = getattr(self.model, "gemini_manager", None)
        kept = [getattr(manager, "_mem_stats_collector", None)]
        if self.layout.pipeline:
            kept.append(self.booster.plugin.scheduler)
        before = [(one, dict(vars(one))) for one in kept if one is not None]
        try:
            yield
        finally:
            for one, values in before:
                vars(one).update(values)

    def _losses(self, batch: Batch) -> torch.Tensor:
        inputs = self.batches.model_inputs(batch, self.device)
        output = self.model(**inputs, use_cache=False)
        return self.token_loss(output.logits, batch["labels"].to(self.device))

    def _pipeline(
        self, micro_batches: Sequence[Batch], receive: Receiver, factor: float, optimizer: Any
    ) -> None:
        def criterion(output: Any, batch: Batch) -> torch.Tensor:
            losses = self.token_loss(output.logits, batch["targets"])
            receive(losses, batch)
            return losses.sum() * factor

        whole = {name: torch.cat([b[name] for b in micro_batches]) for name in micro_batches[0]}
        # Under its own name the model would compute a loss of its own. It ignores other names.
        whole["targets"] = whole.pop("labels")
        self.booster.execute_pipeline(
            iter([whole]), self.model, criterion, optimizer, return_loss=False
        )

    def _no_sums(self) -> torch.Tensor:
        categories = len(self.batches.rows.categories)
        return torch.zeros(categories, dtype=torch.float64, device=self.device)

    @staticmethod
    def _add(sums: torch.Tensor, losses: torch.Tensor, batch: Batch) -> None:
        rows = losses.detach().sum(dim=1).double()
        # Added on the device: reading a number would wait for it at every micro-batch.
        sums.index_add_(0, batch["category"].to(sums.device), rows)


def sum_over_ranks(values: torch.Tensor, contributes: bool) -> torch.Tensor:
    """The sum of ``values``, float64, over the processes that contribute; on the CPU."""
    total = values.clone() if contributes else torch.zeros_like(values)
    dist.all_reduce(total)
    return total.cpu()
