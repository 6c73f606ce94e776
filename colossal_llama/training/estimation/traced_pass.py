"""What a pass forward and backward holds, counted on tensors without data.

transformers' own model, with few layers, runs under torch's FakeTensorMode: operations give
tensors that have a shape, a dtype and a lifetime, but no memory. Adding up what is alive at each
moment counts what autograd saves, what it frees, and what operations need in between, without a
formula that would have to follow every change of the model. docs/training.md has the formula.

What an operation allocates within itself is not seen (cuBLAS's workspace, for one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from colossal_llama.training import loss, parameters
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.batches import document_mask
from colossal_llama.training.estimation.counting import LiveBytes, Mark
from colossal_llama.training.estimation.divided_attention import register_divided_attention
from colossal_llama.training.estimation.rank_model import Weight
from colossal_llama.training.loss import TokenLoss

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Enough to tell the first, the last and those between them apart.
TRACED_LAYERS = 3


@dataclass(frozen=True)
class Activations:
    """What one micro-batch needs on one process beside weights and their gradients, in bytes.

    Args:
        entry: held when the first layer begins: the embeddings' output, rotary tables, a mask.
        saved: for each layer what it keeps for its way back.
        forward: for each layer the most that it holds on its way forward, above what it found.
        head: the most from the last layer's end to the loss and back, above what layers keep.
        backward: for each layer the most while it runs back, above what those below it keep.
        embedding: the most while the embedding runs back, all included.
    """

    entry: int
    saved: list[int]
    forward: list[int]
    head: int
    backward: list[int]
    embedding: int

    def expanded(self, layers: int) -> Activations:
        """For a model of ``layers`` layers, those in the middle like the one in the middle here."""
        order = [_like(layer, layers) for layer in range(layers)]
        return Activations(
            entry=self.entry,
            saved=[self.saved[index] for index in order],
            forward=[self.forward[index] for index in order],
            head=self.head,
            backward=[self.backward[index] for index in order],
            embedding=self.embedding,
        )


def trace(
    fields: dict[str, Any], layers: int, options: TrainOptions
) -> tuple[list[Weight], Activations]:
    """Runs a micro-batch of full rows through a process's part of the model.

    Args:
        fields: configuration of that part (see ``rank_model``).
        layers: how many the whole model has.
    """
    # A pattern of names may freeze any of the layers.
    traced = layers if options.freeze else min(layers, TRACED_LAYERS)
    model = _build({**fields, "num_hidden_layers": traced}, options)
    with FakeTensorMode():
        _place(model)
        activations = _run(model, options)
    weights = [_weight(name, parameter) for name, parameter in model.named_parameters()]
    if traced < layers:
        return _expanded_weights(weights, layers), activations.expanded(layers)
    return weights, activations


def _build(fields: dict[str, Any], options: TrainOptions) -> Any:
    """The model on torch's meta device, with what is trained in it."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, torch_dtype=DTYPES[options.mixed_precision], attn_implementation="sdpa"
        )
        if options.lora_rank:
            _add_adapter(model, options)
            model.to(DTYPES[options.mixed_precision])  # as plugins do
    if options.sp > 1:
        model.config._attn_implementation = register_divided_attention(options.sp)
    if options.freeze_non_embeds_params:
        parameters.freeze_non_embeddings(model)
    if options.freeze:
        parameters.freeze_matching(model, options.freeze)
    if options.use_grad_checkpoint:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
    return model.train()


def _add_adapter(model: Any, options: TrainOptions) -> None:
    """As training/lora.py does, but for the weights that it starts from."""
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_modules or "all-linear",
    )
    inject_adapter_in_model(config, model)
    if options.lora_train_embeddings:
        for weight in parameters.embedding_weights(model):
            weight.requires_grad = True


def _place(model: Any) -> None:
    """Gives a model on the meta device tensors of the CPU, under FakeTensorMode."""
    known: dict[int, torch.nn.Parameter] = {}  # a tied embedding is one parameter of two modules
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in known:
                placed = torch.empty(weight.shape, dtype=weight.dtype)
                known[id(weight)] = torch.nn.Parameter(placed, weight.requires_grad)
            module._parameters[name] = known[id(weight)]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _run(model: Any, options: TrainOptions) -> Activations:
    """One pass. Layers begin, and run back, at marks between which the peak is taken."""
    counter = LiveBytes()
    counter.ignore(model.parameters())
    layers = list(model.model.layers)
    starts: dict[int, Mark] = {}
    backs: dict[int, Mark] = {}
    # A layer ends where the next begins, the last one at the norm above it.
    for index, module in enumerate([*layers, model.model.norm]):
        module.register_forward_pre_hook(_before(index, starts, counter))
    for index, layer in enumerate(layers):
        layer.register_forward_hook(_after(index, backs, counter))
    if options.train_new_rows_only:
        for weight in parameters.embedding_weights(model):
            if weight.requires_grad:
                weight.register_hook(torch.clone)  # the old rows are zeroed in a copy
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(counter.drop_gradient)
    with counter:
        losses = _losses(model, options)
        losses.sum().backward()
        final = counter.mark()
    indices = range(len(layers))
    # A layer's way back ends where that of the one below begins.
    ways_back = {index: backs.get(index - 1, final) for index in indices if index in backs}
    return Activations(
        entry=starts[0].live,
        saved=[starts[index + 1].live - starts[index].live for index in indices],
        forward=[starts[index + 1].peak - starts[index].live for index in indices],
        head=backs.get(indices[-1], final).peak - starts[len(layers)].live,
        backward=[
            ways_back[index].peak - starts[index].live if index in ways_back else 0
            for index in indices
        ],
        embedding=final.peak,
    )


def _before(index: int, starts: dict[int, Mark], counter: LiveBytes) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if index not in starts:  # gradient checkpointing calls a layer again
            starts[index] = counter.mark()

    return hook


def _after(index: int, backs: dict[int, Mark], counter: LiveBytes) -> Callable[..., None]:
    def runs_back(_: torch.Tensor) -> None:
        backs[index] = counter.mark()

    def hook(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        # In a recomputation it is registered in vain: no gradient comes to that output.
        if output[0].requires_grad:
            output[0].register_hook(runs_back)

    return hook


def _losses(model: Any, options: TrainOptions) -> torch.Tensor:
    """As training takes them: outside of the model, in float32, for each token."""
    rows, length = options.micro_batch_size, options.max_length
    ids = torch.zeros((rows, length // options.sp), dtype=torch.long)
    positions = torch.arange(ids.shape[1]).repeat(rows, 1)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if options.sp > 1:
        # ColossalAI's attention for sequence parallelism has the whole causal mask.
        inputs["attention_mask"] = torch.zeros((rows, 1, length, length), dtype=model.dtype)
    elif not options.attention_across_documents:
        inputs["attention_mask"] = document_mask(positions, model.dtype)
    vocabulary = model.config.vocab_size
    if options.fused_loss:
        hidden = model.model(**inputs).last_hidden_state
        return TokenLoss(vocabulary, head=model.get_output_embeddings())(hidden, ids)
    logits = model(**inputs).logits
    if options.tp == 1:
        return TokenLoss(vocabulary)(logits, ids)
    with mock.patch.object(loss, "dist", _Alone()):
        return TokenLoss(vocabulary, tensor_group=_Alone())(logits, ids)


class _Alone:
    """Stands in for a process group, and for torch.distributed: this process exchanges nothing."""

    ReduceOp = dist.ReduceOp

    def get_rank(self, group: Any) -> int:
        return 0

    def all_reduce(self, *_: Any, **__: Any) -> None: ...


def _weight(name: str, parameter: torch.Tensor) -> Weight:
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    return Weight(name, parameter.numel(), parameter.requires_grad, parameter.dim() > 1, layer)


def _expanded_weights(weights: list[Weight], layers: int) -> list[Weight]:
    first = next(index for index, weight in enumerate(weights) if weight.layer == 0)
    own = [weight for weight in weights if weight.layer == 0]
    after = [weight for weight in weights[first:] if weight.layer is None]
    repeated = [
        replace(weight, name=weight.name.replace(".0.", f".{layer}.", 1), layer=layer)
        for layer in range(layers)
        for weight in own
    ]
    return [*weights[:first], *repeated, *after]


def _like(layer: int, layers: int) -> int:
    if layer == 0:
        return 0
    return TRACED_LAYERS - 1 if layer == layers - 1 else 1
