"""NEFTune: uniform noise on the embeddings while fine-tuning.

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", algorithm 1:
the noise is uniform in (-1, 1) scaled by alpha / sqrt(L d), L being the length of the sequence
and d the embedding's width. L is each row's own length here, not the padded one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NoisyEmbeddings:
    """Hooks that add the noise to a model's embeddings in training mode.

    The noise comes from a generator of its own, seeded by (seed, step, data parallel rank):
    ranks that share a micro-batch by tensor or sequence parallelism add the same noise, a
    resumed run adds what the uninterrupted one would have, and no weight is touched.
    """

    def __init__(self, model: Any, alpha: float, seed: int, data_rank: int) -> None:
        # ColossalAI counts ranks in numpy integers, which would overflow below.
        self.alpha, self.seed, self.data_rank = alpha, seed, int(data_rank)
        self._generator = torch.Generator()
        self._lengths: torch.Tensor | None = None
        model.register_forward_pre_hook(self._remember_lengths, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add_noise)

    def start_step(self, step: int) -> None:
        """Makes the noise of update ``step`` a function of its number alone."""
        # Distinct odd multipliers keep (seed, step, rank) triples apart.
        mixed = self.seed * 1_000_003 + step * 8_191 + self.data_rank * 131_071
        self._generator.manual_seed(mixed % 2**63)

    def _remember_lengths(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._lengths = kwargs["attention_mask"].sum(dim=1)

    def _add_noise(self, module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        assert self._lengths is not None, "the model was called without an attention mask"
        return embedded + self.noise(embedded, self._lengths)

    def noise(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Noise for ``embedded`` [batch, sequence, width], ``lengths`` int64 [batch]."""
        # Drawn on the CPU, so that every device gets the same numbers.
        uniform = torch.rand(embedded.shape, generator=self._generator) * 2 - 1
        scale = self.alpha / (lengths.float() * embedded.shape[-1]).sqrt()
        return (uniform.to(embedded.device) * scale.view(-1, 1, 1)).to(embedded.dtype)
