"""Hands model and optimizer to a plugin, and builds the passes over what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.nn.optimizer import HybridAdam

from colossal_llama.dataset.loader import TrainingRows
from colossal_llama.runtime.rope import restore_rope_frequencies
from colossal_llama.training import parameters
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.batches import BatchMaker
from colossal_llama.training.forward_backward import Passes
from colossal_llama.training.loading import DTYPES
from colossal_llama.training.loss import TokenLoss
from colossal_llama.training.neftune import NoisyEmbeddings
from colossal_llama.training.new_rows import NewRows
from colossal_llama.training.plugins import Layout, build_layout, build_plugin

# AdamW's decay rates in Llama (Touvron et al. 2023, section 2.3).
ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Boosted:
    """What a plugin made of model and optimizer."""

    booster: Any
    model: Any
    optimizer: Any
    layout: Layout


def boost(options: TrainOptions, model: Any, accumulation: int) -> Boosted:
    """Builds the optimizer of what is not frozen, and hands both to the plugin."""
    plugin = build_plugin(options, accumulation)
    booster = Booster(plugin=plugin)
    layout = build_layout(options, plugin)
    new_rows = None
    if options.train_new_rows_only:
        new_rows = NewRows(parameters.old_rows(options), options.weight_decay)
    if options.use_grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = HybridAdam(
        parameters.optimizer_groups(
            model,
            options.weight_decay,
            decay_all=options.decay_all,
            undecayed=parameters.embedding_weights(model) if new_rows else (),
        ),
        lr=options.lr,
        betas=ADAM_BETAS,
        adamw_mode=True,
    )
    if new_rows is not None and options.plugin != "3d":
        new_rows.mask(model)
    model, optimizer, *_ = booster.boost(model, optimizer)
    if new_rows is not None:
        if options.plugin == "3d":  # which has put other embeddings in place
            new_rows.mask(model.unwrap(), layout.tensor_group)
        new_rows.decay_in(optimizer)
    restore_rope_frequencies(model.unwrap())
    if options.torch_compile:
        for layer in model.unwrap().model.layers:
            layer.compile()  # one by one: they are alike, and compiled once
    return Boosted(booster, model, optimizer, layout)


def build_passes(
    options: TrainOptions, boosted: Boosted, rows: TrainingRows, tokenizer: Any
) -> Passes:
    """Forward and backward passes with the loss and the noise that the flags ask for."""
    layout, model = boosted.layout, boosted.model.unwrap()
    first_stage = not layout.pipeline or boosted.booster.plugin.stage_manager.is_first_stage()
    noise = None
    if options.use_neft and first_stage:
        noise = NoisyEmbeddings(model, options.neftune_noise_alpha, options.seed)
    return Passes(
        booster=boosted.booster,
        model=boosted.model,
        optimizer=boosted.optimizer,
        batches=BatchMaker(
            rows=rows,
            layout=layout,
            micro_batch_size=options.micro_batch_size,
            pad_id=tokenizer.pad_token_id or 0,
            across_documents=options.attention_across_documents,
            dtype=DTYPES[options.mixed_precision],
        ),
        token_loss=build_loss(model, layout, fused=options.fused_loss),
        layout=layout,
        noise=noise,
        device=torch.device(get_accelerator().get_current_device()),
    )


def build_loss(model: Any, layout: Layout, *, fused: bool) -> TokenLoss:
    """The loss of a boosted model, however its vocabulary is divided.

    With ``fused`` the model returns hidden states: the loss applies the output embedding.
    """
    head = model.get_output_embeddings()
    if fused and head is not None:  # only the last stage of a pipeline has one
        head.forward = lambda hidden: hidden
    first_logit = 0
    # Earlier stages of a pipeline keep an output embedding that nobody has divided, or uses.
    if layout.tensor_group is not None and hasattr(head, "new_num_embeddings"):
        group = layout.tensor_group
        own = head.new_num_embeddings // dist.get_world_size(group)
        first_logit = dist.get_rank(group) * own
    return TokenLoss(
        vocab_size=model.config.vocab_size,
        tensor_group=layout.tensor_group,
        first_logit=first_logit,
        sequence_group=layout.sequence_group,
        head=head if fused else None,
    )
