"""The gradients that an optimizer holds before its update: are they finite, and a way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from colossal_llama.training.optimizer_state import loss_scaler


def are_finite(optimizer: Any) -> bool:
    """Whether all gradients that this process holds, after their reduction, are finite.

    With a loss scale infinite gradients are how the scale is found: the optimizer itself leaves
    out such updates. They count here once the scale cannot get any lower.
    """
    scaler = loss_scaler(optimizer)
    if scaler is not None and float(scaler.scale) > float(scaler._min_scale or 1):
        return True
    if _is_gemini(optimizer):
        return not bool(optimizer.chunk_manager.overflow_counter.item() > 0)
    held = [gradient for gradient in _held(optimizer) if gradient.numel()]
    # Squares may overflow where no number does. Only then the largest magnitudes, which cannot,
    # have to decide: on a CPU they take ten times as long.
    return not held or _norms_are_finite(held, 2) or _norms_are_finite(held, torch.inf)


def discard(optimizer: Any) -> None:
    """Drops the gradients of this step; no weight and no moment changes."""
    if not _is_gemini(optimizer):
        optimizer.zero_grad()
        return
    # Gemini keeps them in chunks, which its own way of leaving out an update knows to clear.
    mixin = optimizer.mix_precision_mixin
    mixin.should_skip_step = lambda: True
    try:
        optimizer.step()
    finally:
        del mixin.should_skip_step
        optimizer.chunk_manager.overflow_counter.zero_()


def overflows(optimizer: Any) -> int:
    """Updates that an optimizer left out for its loss scale, since that last grew."""
    scaler = loss_scaler(optimizer)
    return 0 if scaler is None else int(scaler._hysteresis_step)


def _held(optimizer: Any) -> Iterator[torch.Tensor]:
    if hasattr(optimizer, "pg_to_grad_store"):  # ZeRO
        for store in optimizer.pg_to_grad_store.values():
            for group in range(optimizer.num_param_groups):
                yield from store.get_working_grads_by_group_id(group)
        return
    working = getattr(optimizer, "working_to_master_map", None)  # half precision without ZeRO
    parameters = working or [p for group in optimizer.optim.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad


def _norms_are_finite(gradients: list[torch.Tensor], order: float) -> bool:
    norms = torch.stack(torch._foreach_norm(gradients, ord=order))
    return bool(torch.isfinite(norms).all())  # the one moment that waits for the device


def _is_gemini(optimizer: Any) -> bool:
    return hasattr(optimizer, "chunk_manager")
