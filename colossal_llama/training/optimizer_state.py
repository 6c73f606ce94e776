"""Exact optimizer state: fp32 master weights, moments and loss scale, a file per process.

Booster saves working weights in half precision and moments, and rebuilds the master weights
from the former, so a resumed run drifts from the uninterrupted one. Every plugin keeps its
masters as the parameters of the inner optimizer, though; saving what each process holds, as it
holds it, restores all plugins bit for bit, in safetensors and without communication. The
price: the files fit only the layout that wrote them; for others ``optimizer_shares.py`` puts them
together anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from colossal_llama.errors import DataError

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """This process's share of the optimizer: masters, moments, step and loss scale.

    The tensors are the optimizer's own, not copies.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, (parameter, master) in enumerate(masters(optimizer)):
        tensors[f"{index}.master"] = master
        for name, value in optimizer.optim.state[parameter].items():
            tensors[f"{index}.{name}"] = value if torch.is_tensor(value) else torch.tensor(value)
    scaler = loss_scaler(optimizer)
    if scaler is not None:
        tensors["loss_scale"] = scaler._scale
        tensors["loss_scale_counters"] = torch.tensor(
            [scaler._growth_step, scaler._hysteresis_step]
        )
    return tensors


@torch.no_grad()
def load_optimizer_state(optimizer: Any, path: Path) -> None:
    """Restores what ``optimizer_tensors`` gave for this process, from a file.

    Raises:
        DataError: the file belongs to another layout or model.
    """
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        for index, (parameter, master) in enumerate(masters(optimizer)):
            if f"{index}.master" not in names:
                raise DataError(f"{path}: no state for parameter {index}: another model or layout")
            value = stored.get_tensor(f"{index}.master")
            if value.shape != master.shape:
                raise DataError(
                    f"{path}: parameter {index} has shape {list(value.shape)}, "
                    f"here it is {list(master.shape)}: another model or layout"
                )
            master.copy_(value)
            state = optimizer.optim.state[parameter]
            for key in MOMENTS:
                if f"{index}.{key}" in names:
                    state[key] = stored.get_tensor(f"{index}.{key}").to(master.device)
            if f"{index}.step" in names:
                state["step"] = int(stored.get_tensor(f"{index}.step"))
        load_loss_scale(optimizer, stored)


def load_loss_scale(optimizer: Any, stored: Any) -> None:
    """Restores the loss scale from an open file of optimizer state, if both have one."""
    scaler = loss_scaler(optimizer)
    if scaler is not None and "loss_scale" in set(stored.keys()):
        scaler._scale = stored.get_tensor("loss_scale").to(scaler._scale.device)
        counters = stored.get_tensor("loss_scale_counters").tolist()
        scaler._growth_step, scaler._hysteresis_step = counters


def loss_scaler(optimizer: Any) -> Any | None:
    """The fp16 loss scaler of a boosted optimizer; None in bf16."""
    # ZeRO, hybrid-parallel and Gemini optimizers each have their own name for it.
    for name in ("mixed_precision_mixin", "mixed_precision", "mix_precision_mixin"):
        mixin = getattr(optimizer, name, None)
        if mixin is not None:
            return getattr(mixin, "grad_scaler", None)
    return None


def masters(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inner optimizer's parameter, its fp32 master weights), in a fixed order."""
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            if hasattr(optimizer, "param_to_chunk16"):
                # Gemini's parameters are empty between steps; the fp32 weights are in chunks.
                begin, end = optimizer.param_to_range[parameter]
                chunk = optimizer.param_to_chunk16[parameter].paired_chunk
                yield parameter, chunk.payload[begin:end]
            else:
                yield parameter, parameter.data
