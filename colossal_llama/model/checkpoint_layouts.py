"""Layouts of Llama checkpoints, told by their names, and what each calls Hugging Face's tensors.

A layout is a row of ``LAYOUTS``: the name of its embedding, and a function from a name to the
tensors that are cut from it. A name that a layout does not know stands for itself, and is
refused later because no model has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import torch


class Heads(NamedTuple):
    """Numbers of attention heads, and rows of one head."""

    query: int
    key_value: int
    size: int


class Part(NamedTuple):
    """A tensor of the Hugging Face layout, and how it is cut from the one it lies in."""

    name: str
    cut: Callable[[torch.Tensor, Heads], torch.Tensor] = lambda tensor, heads: tensor


class Layout(NamedTuple):
    title: str
    embedding: str
    parts: Callable[[str], list[Part]]  # of a name; none for what can be left out


# Modules that wrap a model, or a part of it, without changing what it computes.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Tables of the rotary embedding and causal masks: computed, not learned.
_TABLES = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|freqs_(cos|sin|cis)|mask)$")


def _hugging_face(name: str) -> list[Part]:
    return [Part(name)]


def _without_head(name: str) -> list[Part]:
    """What ``AutoModel`` saves: the same, without its first level."""
    return [Part(f"model.{name}")]


def _lit_gpt(name: str) -> list[Part]:
    """lit-gpt, its heir litgpt, and TinyLlama (their model.py and convert_lit_checkpoint.py).

    One matrix for q, k and v: ``attn.attn`` holds for every key head its query heads, the key
    head and the value head; ``attn.qkv`` (litgpt 0.5) all queries, all keys, all values.
    """
    layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer is None:
        outer = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}
        module, _, leaf = name.rpartition(".")
        return [Part(f"{outer.get(module, module)}.{leaf}")]
    number, module, leaf = layer.groups()
    inner: dict[str, list[Part]] = {
        "attn.attn": [
            Part("self_attn.q_proj", lambda qkv, heads: _groups(qkv, heads)[:, :-2].flatten(0, 2)),
            Part("self_attn.k_proj", lambda qkv, heads: _groups(qkv, heads)[:, -2].flatten(0, 1)),
            Part("self_attn.v_proj", lambda qkv, heads: _groups(qkv, heads)[:, -1].flatten(0, 1)),
        ],
        "attn.qkv": [
            Part("self_attn.q_proj", lambda qkv, heads: _thirds(qkv, heads)[0]),
            Part("self_attn.k_proj", lambda qkv, heads: _thirds(qkv, heads)[1]),
            Part("self_attn.v_proj", lambda qkv, heads: _thirds(qkv, heads)[2]),
        ],
        "attn.proj": [Part("self_attn.o_proj")],
        "norm_1": [Part("input_layernorm")],
        "norm_2": [Part("post_attention_layernorm")],
        "mlp.swiglu.w1": [Part("mlp.gate_proj")],
        "mlp.swiglu.w2": [Part("mlp.up_proj")],
        "mlp.swiglu.w3": [Part("mlp.down_proj")],
        "mlp.fc_1": [Part("mlp.gate_proj")],
        "mlp.fc_2": [Part("mlp.up_proj")],
        "mlp.proj": [Part("mlp.down_proj")],
    }
    parts = inner.get(module, [Part(module)])
    return [Part(f"model.layers.{number}.{part.name}.{leaf}", part.cut) for part in parts]


def _meta(name: str) -> list[Part]:
    """Meta's own names, which llama2.c and Baby-Llama2-Chinese use too (their model.py).

    Their rotary embedding turns neighbouring rows of a head; Hugging Face's turns a row of the
    first half with one of the second. So the rows of q and k change places.
    """
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer is None:
        outer = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
        module, _, leaf = name.rpartition(".")
        return [Part(f"{outer.get(module, module)}.{leaf}")]
    number, module, leaf = layer.groups()
    inner = {
        "attention.wq": Part("self_attn.q_proj", lambda q, heads: _halves(q, heads.query)),
        "attention.wk": Part("self_attn.k_proj", lambda k, heads: _halves(k, heads.key_value)),
        "attention.wv": Part("self_attn.v_proj"),
        "attention.wo": Part("self_attn.o_proj"),
        "attention_norm": Part("input_layernorm"),
        "ffn_norm": Part("post_attention_layernorm"),
        "feed_forward.w1": Part("mlp.gate_proj"),
        "feed_forward.w2": Part("mlp.down_proj"),
        "feed_forward.w3": Part("mlp.up_proj"),
    }
    part = inner.get(module, Part(module))
    return [Part(f"model.layers.{number}.{part.name}.{leaf}", part.cut)]


# Looked through from the top: the fourth embedding's name ends the first's.
LAYOUTS = (
    Layout("Hugging Face", "model.embed_tokens.weight", _hugging_face),
    Layout("lit-gpt", "transformer.wte.weight", _lit_gpt),
    Layout("Meta", "tok_embeddings.weight", _meta),
    Layout("Hugging Face without head", "embed_tokens.weight", _without_head),
)


def recognise(names: Iterable[str], where: str) -> tuple[Layout, dict[str, list[Part]]]:
    """The layout that names belong to, and what each of them holds.

    What wraps a model is taken off the names: torch.compile, DDP and FSDP wherever they stand,
    and any prefix that all names share with the embedding.

    Raises:
        DataError: it is no layout that is known, or there are two models; names ``where``.
    """
    plain = {name: _unwrap(name) for name in names}
    for layout in LAYOUTS:
        ends = [name for name in plain.values() if f".{name}".endswith(f".{layout.embedding}")]
        prefixes = sorted({name.removesuffix(layout.embedding) for name in ends})
        if len(prefixes) > 1:
            some = " and ".join(repr(prefix) for prefix in prefixes)
            raise DataError(f"{where}: several models, under {some}; save the one you want alone")
        if prefixes:
            break
    else:
        known = ", ".join(f"{layout.embedding} ({layout.title})" for layout in LAYOUTS)
        some = ", ".join(list(plain)[:4])
        raise DataError(f"{where}: no embedding named {known}; it holds {some}, ...")
    parts = {}
    for name, short in plain.items():
        is_inside = short.startswith(prefixes[0])
        inner = layout.parts(short.removeprefix(prefixes[0])) if is_inside else [Part(short)]
        parts[name] = [] if _TABLES.search(short) else inner
    return layout, parts


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _groups(qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[rows, ...] as [key heads, queries of each + key + value, head size, ...]."""
    members = heads.query // heads.key_value + 2
    return qkv.reshape(heads.key_value, members, heads.size, *qkv.shape[1:])


def _thirds(qkv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """[rows, ...] as queries, keys and values."""
    rows = [heads.query * heads.size, *[heads.key_value * heads.size] * 2]
    return qkv.split(rows)


def _halves(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of each of ``count`` heads: those with an even number first, then the odd ones."""
    pairs = rows.reshape(count, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
