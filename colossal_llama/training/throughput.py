"""How fast a run is: tokens, FLOPs and memory."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

# Dense peak in FLOP/s by (pattern of the device's name, working dtype), from the vendors' data
# sheets: without sparsity, for tensor cores.
PEAK_FLOPS = (
    (r"H200|H100.*(SXM|HBM3)|H100 80GB|GH200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    (r"H100.*NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    (r"H100.*PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    (r"H800", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    (r"B200", {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12}),
    (r"A100|A800", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    (r"L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    (r"A10G", {"bf16": 70e12, "fp16": 70e12, "fp32": 35e12}),
    (r"A10\b", {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12}),
    (r"RTX 4090", {"bf16": 165.2e12, "fp16": 165.2e12, "fp32": 82.6e12}),
    (r"RTX 3090", {"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12}),
    (r"V100", {"fp16": 125e12, "fp32": 15.7e12}),
    (r"T4\b", {"fp16": 65e12, "fp32": 8.1e12}),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None where it is not known."""
    for pattern, peaks in PEAK_FLOPS:
        if re.search(pattern, device_name):
            return peaks.get(precision)
    return None


def flops_per_token(model: Any, sequence: int) -> float:
    """FLOPs of a forward and backward pass for each token of a row of ``sequence`` tokens.

    6 N + 12 L H Q T if everything trains (Chowdhery et al. 2022, "PaLM", appendix B): N are the
    weights that multiply a token (the input embedding does not), L the layers, H the heads, Q a
    head's width and T the tokens of the row. A third of it is the forward pass, a third gradients
    of activations, of which there are none below the first weight that trains, and a third
    gradients of weights; frozen ones have none. Recomputed activations do not count: this is the
    model's work, not ours.

    Args:
        model: a whole one of Llama's kind, in which what does not train is frozen.
    """
    config, base = model.config, model.base_model
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    total, flows = 0.0, _trains(model.get_input_embeddings())
    for layer in base.layers:
        total += _products(layer, flows)
        flows = flows or _trains(layer)
        total += heads * head * sequence * (12 if flows else 4)
    return total + _products(model.get_output_embeddings(), _trains(base))


def _products(module: Any, flows: bool) -> float:
    """FLOPs per token of the linear layers in ``module``.

    Args:
        flows: whether its input has a gradient.
    """
    total = 0.0
    for part in module.modules():  # in the order of the forward pass
        if isinstance(part, torch.nn.Linear):
            total += 2.0 * (1 + flows + part.weight.requires_grad) * part.weight.numel()
            flows = flows or _trains(part)
    return total


def _trains(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class Throughput:
    """Measures one process's device.

    Args:
        model: what ``flops_per_token`` takes; it is not kept.
        sequence: tokens of the longest row.
    """

    def __init__(self, model: Any, sequence: int, precision: str) -> None:
        from colossalai.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._peak = peak_flops(self._accelerator.get_device_name(), precision)
        self._flops_per_token = flops_per_token(model, sequence)
        self._last_end = time.perf_counter()

    def utilisation(self, tokens_per_second_per_device: float) -> float | None:
        """Model FLOPs utilisation, 0 to 1; None where the device's peak is not known."""
        if self._peak is None:
            return None
        return tokens_per_second_per_device * self._flops_per_token / self._peak

    def seconds_since_last_step(self, step_seconds: float) -> float:
        """Seconds between the end of the step before and the beginning of this one."""
        now = time.perf_counter()
        between = max(0.0, now - step_seconds - self._last_end)
        self._last_end = now
        return between

    def peak_memory(self) -> int:
        """Bytes that the device had allocated at most; on a CPU those of the process."""
        return int(self._accelerator.max_memory_allocated())
