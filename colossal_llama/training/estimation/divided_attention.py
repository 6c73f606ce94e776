"""Attention as ColossalAI's sequence parallelism computes it, on one process alone.

All-to-all gives each process all tokens of a share of the heads (Jacobs et al. 2023, "DeepSpeed
Ulysses"). Without flash attention ColossalAI 0.5.0 then holds whole matrices of scores
(shardformer/modeling/llama.py, ``get_llama_flash_attention_forward``). The exchange is a copy
here: tensors without data need only their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def register_divided_attention(processes: int) -> str:
    """Makes the attention known to transformers; returns its name."""
    name = f"divided_by_{processes}"

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Tensors [batch, heads, own sequence, head width] to [batch, own sequence, heads, ...]."""
        batch, heads, own, width = query.shape
        groups = heads // key.shape[1]
        query, key, value = (_exchange(tensor, processes) for tensor in (query, key, value))
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores + attention_mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = (weights @ value).transpose(1, 2).contiguous()
        return mixed.reshape(batch, own, heads, width).clone(), None

    ALL_ATTENTION_FUNCTIONS[name] = attend
    return name


def _exchange(tensor: torch.Tensor, processes: int) -> torch.Tensor:
    batch, heads, own, width = tensor.shape
    return tensor.reshape(batch, heads // processes, own * processes, width).clone()
