"""The part of a model that one process holds.

One of ``tp`` tensor parallel processes holds a Llama with all layers and the whole width, but with
a share of the heads, of the MLP's width and of the vocabulary (Shoeybi et al. 2019, "Megatron-LM",
section 3). So that part is itself a model that transformers can build.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from colossal_llama.training.arguments import TrainOptions

# Shardformer pads the vocabulary of plugin 3d to a multiple of this, times tp
# (ColossalAI 0.5.0, hybrid_parallel_plugin.py, make_vocab_size_divisible_by).
VOCABULARY_MULTIPLE = 64

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Weight:
    """A parameter as one process holds it: all of it, whatever ZeRO or Gemini divide later.

    Args:
        matrix: whether it has more than one dimension: those decay, and are a group of their own.
        layer: the decoder layer it is in; None for embeddings, last norm and head.
    """

    name: str
    numel: int
    trained: bool
    matrix: bool = True
    layer: int | None = None


@dataclass(frozen=True)
class Stage:
    """What one stage of a pipeline holds; without a pipeline there is one that holds all.

    Args:
        layers: indices of its decoder layers.
        weights: in the order of ``model.parameters()``.
    """

    index: int
    layers: range
    weights: list[Weight]
    first: bool
    last: bool


def rank_fields(fields: dict[str, Any], options: TrainOptions) -> dict[str, Any]:
    """The configuration of the model of one tensor parallel process."""
    heads = fields["num_attention_heads"]
    changed = {
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "num_attention_heads": heads // options.tp,
        "num_key_value_heads": (fields.get("num_key_value_heads") or heads) // options.tp,
        "intermediate_size": fields["intermediate_size"] // options.tp,
    }
    if options.tp > 1:
        multiple = VOCABULARY_MULTIPLE * options.tp
        changed["vocab_size"] = _rounded_up(fields["vocab_size"], multiple) // options.tp
    return {**fields, **changed}


def pipeline_stages(weights: Sequence[Weight], layers: int, options: TrainOptions) -> list[Stage]:
    """Divides a process's weights among the stages of the pipeline.

    The middle stages get the layers that do not divide evenly (ColossalAI 0.5.0,
    pipeline/stage_manager.py, ``distribute_layers``). A tied embedding is on the first stage and,
    as the head, on the last.
    """
    each, rest = divmod(layers, options.pp)
    first_longer = options.pp // 2 - rest // 2
    stages, start = [], 0
    for index in range(options.pp):
        held = range(start, start + each + (first_longer <= index < first_longer + rest))
        first, last = index == 0, index == options.pp - 1
        own = list(_of_stage(weights, held, first=first, last=last))
        stages.append(Stage(index, held, own, first, last))
        start = held.stop
    return stages


def padded(
    weights: Iterable[Weight], fields: dict[str, Any], options: TrainOptions
) -> list[Weight]:
    """Weights with the rows that plugin 3d adds to the vocabulary without tensor parallelism.

    There only the head is padded, and the embedding if it is tied to it.
    """
    if options.plugin != "3d" or options.tp > 1:
        return list(weights)
    more = _rounded_up(fields["vocab_size"], VOCABULARY_MULTIPLE) - fields["vocab_size"]
    last = EMBEDDING if fields.get("tie_word_embeddings") else HEAD
    return [
        replace(weight, numel=weight.numel + more * fields["hidden_size"])
        if weight.name == last
        else weight
        for weight in weights
    ]


def _of_stage(
    weights: Sequence[Weight], layers: range, *, first: bool, last: bool
) -> Iterable[Weight]:
    tied = not any(weight.name == HEAD for weight in weights)
    for weight in weights:
        if weight.layer is not None:
            here = weight.layer in layers
        elif weight.name == EMBEDDING:
            here = first or (last and tied)
        else:
            here = last
        if here:
            yield weight


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
