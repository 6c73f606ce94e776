"""Training written down once more, in plain PyTorch and transformers, without ColossalAI."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from colossal_llama.dataset.collator import collate
from colossal_llama.dataset.loader import open_parts
from colossal_llama.dataset.sampler import GlobalSampler
from colossal_llama.training.neftune import NoisyEmbeddings


class Step(NamedTuple):
    loss: float
    grad_norm: float


def train_plainly(
    model_dir: Path,
    part: Path,
    rates: list[float],
    *,
    batch_size: int,
    grad_clip: float,
    frozen: bool,
    dtype: torch.dtype,
    noise_alpha: float | None,
    seed: int,
) -> list[Step]:
    """A step for each of ``rates``: weights of ``dtype``, fp32 masters, AdamW, one process."""
    rows = open_parts([part], model_dir, 512)
    sampler = GlobalSampler(rows.datasets, seed, batch_size)
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=dtype)
    model.train()
    noise = NoisyEmbeddings(model, noise_alpha, seed) if noise_alpha else None
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if not frozen or "embed_tokens" in name or "lm_head" in name
    ]
    masters = [parameter.detach().float().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    steps = []
    for number, rate in enumerate(rates):
        batch = collate(rows.take(sampler.batch(number * batch_size)), pad_id=0)
        labels = batch.pop("labels")
        if noise is not None:
            noise.start_step(number * batch_size)
        logits = model(**batch).logits.float()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.linalg.vector_norm(
            torch.stack([gradient.float().norm() for gradient in gradients])
        )
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float() * min(1.0, grad_clip / float(norm))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)
        steps.append(Step(float(loss), float(norm)))
    return steps
