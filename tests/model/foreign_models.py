"""Other programs' Llamas: random weights under their names, and what they compute with them.

Written from the formulas of the published code, not from its opposite in the product:
lit-gpt and TinyLlama (lit_gpt/model.py), litgpt 0.5 (model.py), llama2.c and
Baby-Llama2-Chinese (model.py), Meta's llama (model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear, silu

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What all of them are shaped like; 3 queries share a key."""

    ids: int = 700
    width: int = 48
    inner: int = 80
    layers: int = 2
    heads: int = 6
    groups: int = 2
    theta: float = 10000.0
    epsilon: float = 1e-5

    @property
    def size(self) -> int:
        return self.width // self.heads

    def config(self, **changes: object) -> dict[str, object]:
        """The same as a config.json."""
        return {
            "model_type": "llama",
            "vocab_size": self.ids,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "max_position_embeddings": 128,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
            **changes,
        }


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Weights so large that every part of the model matters for its logits."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def angles(shape: Shape, length: int) -> torch.Tensor:
    """[length, size / 2]: position times theta^(-2i / size)."""
    exponents = torch.arange(0, shape.size, 2).float() / shape.size
    return torch.outer(torch.arange(length).float(), 1.0 / shape.theta**exponents)


def norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention. q: [time, heads, size]; k, v: [time, groups, size]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(len(q), len(q)).triu(1).bool()
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def lit_state(shape: Shape, *, attention: str = "attn", mlp: str = "swiglu") -> State:
    """``attention``: attn (TinyLlama, lit-gpt) or qkv (litgpt 0.5); ``mlp``: swiglu or fc."""
    first, second, last = {
        "swiglu": ("swiglu.w1", "swiglu.w2", "swiglu.w3"),
        "fc": ("fc_1", "fc_2", "proj"),
    }[mlp]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (shape.ids, shape.width),
        "transformer.wte.weight": (shape.ids, shape.width),
        "transformer.ln_f.weight": (shape.width,),
    }
    for layer in range(shape.layers):
        rows = (shape.heads + 2 * shape.groups) * shape.size
        inside = {
            "norm_1": (shape.width,),
            f"attn.{attention}": (rows, shape.width),
            "attn.proj": (shape.width, shape.width),
            "norm_2": (shape.width,),
            f"mlp.{first}": (shape.inner, shape.width),
            f"mlp.{second}": (shape.inner, shape.width),
            f"mlp.{last}": (shape.width, shape.inner),
        }
        shapes |= {f"transformer.h.{layer}.{name}.weight": size for name, size in inside.items()}
    return random_state(shapes)


def lit_logits(state: State, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[time, ids]."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Rotates the first half of a head against its second half."""
        angle = angles(shape, len(x))[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                first * angle.sin() + second * angle.cos(),
            ],
            dim=-1,
        )

    x = embedding(ids, state["transformer.wte.weight"])
    for layer in range(shape.layers):
        block = {
            name.removeprefix(f"transformer.h.{layer}.").removesuffix(".weight"): value
            for name, value in state.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        y = norm(x, block["norm_1"], shape.epsilon)
        each = shape.heads // shape.groups
        if "attn.attn" in block:
            qkv = linear(y, block["attn.attn"]).view(len(ids), shape.groups, each + 2, shape.size)
            q, k, v = qkv.split((each, 1, 1), dim=-2)
            q, k, v = (part.reshape(len(ids), -1, shape.size) for part in (q, k, v))
        else:
            rows = [shape.heads * shape.size, *[shape.groups * shape.size] * 2]
            parts = linear(y, block["attn.qkv"]).split(rows, dim=-1)
            q, k, v = (part.view(len(ids), -1, shape.size) for part in parts)
        x = x + linear(attend(turn(q), turn(k), v), block["attn.proj"])
        y = norm(x, block["norm_2"], shape.epsilon)
        names = ("swiglu.w1", "swiglu.w2", "swiglu.w3")
        if "mlp.fc_1" in block:
            names = ("fc_1", "fc_2", "proj")
        gate, up, down = (block[f"mlp.{name}"] for name in names)
        x = x + linear(silu(linear(y, gate)) * linear(y, up), down)
    x = norm(x, state["transformer.ln_f.weight"], shape.epsilon)
    return linear(x, state["lm_head.weight"])


def meta_state(shape: Shape, *, tied: bool = False) -> State:
    keys = shape.groups * shape.size
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (shape.ids, shape.width),
        "norm.weight": (shape.width,),
        "output.weight": (shape.ids, shape.width),
    }
    for layer in range(shape.layers):
        inside = {
            "attention.wq": (shape.width, shape.width),
            "attention.wk": (keys, shape.width),
            "attention.wv": (keys, shape.width),
            "attention.wo": (shape.width, shape.width),
            "feed_forward.w1": (shape.inner, shape.width),
            "feed_forward.w2": (shape.width, shape.inner),
            "feed_forward.w3": (shape.inner, shape.width),
            "attention_norm": (shape.width,),
            "ffn_norm": (shape.width,),
        }
        shapes |= {f"layers.{layer}.{name}.weight": size for name, size in inside.items()}
    state = random_state(shapes)
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def meta_logits(state: State, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[time, ids]."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Multiplies neighbours, read as a complex number, by exp(i angle)."""
        angle = angles(shape, len(x))
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        factors = torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(numbers * factors).flatten(-2)

    x = embedding(ids, state["tok_embeddings.weight"])
    for layer in range(shape.layers):
        block = {
            name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): value
            for name, value in state.items()
            if name.startswith(f"layers.{layer}.")
        }
        y = norm(x, block["attention_norm"], shape.epsilon)
        q, k, v = (
            linear(y, block[f"attention.{name}"]).view(len(ids), -1, shape.size)
            for name in ("wq", "wk", "wv")
        )
        x = x + linear(attend(turn(q), turn(k), v), block["attention.wo"])
        y = norm(x, block["ffn_norm"], shape.epsilon)
        gate, down, up = (block[f"feed_forward.{name}"] for name in ("w1", "w2", "w3"))
        x = x + linear(silu(linear(y, gate)) * linear(y, up), down)
    x = norm(x, state["norm.weight"], shape.epsilon)
    return linear(x, state["output.weight"])
