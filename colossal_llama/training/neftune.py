"""NEFTune: uniform noise on the embeddings while fine-tuning.

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", algorithm 1:
the noise is uniform in (-1, 1) scaled by alpha / sqrt(L d), L being the length of the sequence
and d the embedding's width. L is each row's own length here, not the padded one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


class NoisyEmbeddings:
    """Hooks that add the noise to a model's embeddings in training mode.

    The noise of a row is a function of the seed and the row's number in the order of samples:
    processes that share a row by tensor or sequence parallelism add the same noise, and so
    does a resumed run, on any number of processes. No weight is touched.
    """

    def __init__(self, model: Any, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._next_sample = 0
        self._lengths: list[int] = []
        model.register_forward_pre_hook(self._look_for_lengths, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add_noise)

    def start_step(self, first_sample: int) -> None:
        """Tells which sample the first row of this process's next micro-batch is."""
        self._next_sample = first_sample

    def expect(self, lengths: torch.Tensor) -> None:
        """Tells the lengths of the rows of the next micro-batch, int64 [batch]."""
        self._lengths = lengths.tolist()

    def _look_for_lengths(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A pipeline hands out micro-batches itself; its models ignore what they do not know.
        if "length" in kwargs:
            self.expect(kwargs["length"])

    def _add_noise(self, module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        noise = torch.zeros_like(embedded)
        for row, length in enumerate(self._lengths):
            sample, width = self._next_sample + row, embedded.shape[-1]
            noise[row, :length] = self.row_noise(sample, length, width, embedded.device)
        self._next_sample += len(self._lengths)
        return embedded + noise

    def row_noise(
        self, sample: int, length: int, width: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Noise for a row of ``length`` tokens, float32 [length, width].

        The numbers depend on the kind of device: drawing them where they are added spares a
        transfer as large as the embeddings.
        """
        # A digest, because a CPU's generator looks at the low 32 bits of its seed only.
        digest = hashlib.sha256(f"{self.seed} {sample}".encode()).digest()
        generator = torch.Generator(device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        uniform = torch.rand(length, width, generator=generator, device=device) * 2 - 1
        return uniform * (self.alpha / (length * width) ** 0.5)
