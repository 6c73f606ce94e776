"""Rotary frequencies in full precision.

Every plugin casts a model's floating-point buffers to the working dtype, the inverse
frequencies of the rotary embedding among them. bf16 keeps 8 bits: at position 4096 the angle
of the fastest dimension is off by radians, and the exported model, whose frequencies are
computed afresh in fp32, is not the one that was trained.

May go when ColossalAI leaves non-persistent buffers as they are.
"""

from __future__ import annotations

from typing import Any


def restore_rope_frequencies(model: Any) -> int:
    """Recomputes the ``inv_freq`` buffers of a boosted Llama in fp32; returns how many."""
    count = 0
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "rope_init_fn"):
            device = module.inv_freq.device
            # The first value is the frequencies; the second a scale for the attention.
            frequencies, _ = module.rope_init_fn(module.config, device)
            module.register_buffer("inv_freq", frequencies.float(), persistent=False)
            module.original_inv_freq = module.inv_freq
            count += 1
    return count
