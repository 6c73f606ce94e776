"""Freezing leaves the embeddings, tied or not, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_llama.training.freeze import freeze_non_embeddings


def model(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_embeddings_train(tied: bool) -> None:
    llama = model(tied=tied)
    freeze_non_embeddings(llama)
    trained = {name for name, tensor in llama.named_parameters() if tensor.requires_grad}
    # A tied output embedding is the input embedding, listed once.
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    assert trained == ({"model.embed_tokens.weight"} if tied else both)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_the_embeddings_through_frozen_layers(tied: bool) -> None:
    llama = model(tied=tied)
    freeze_non_embeddings(llama)
    ids = torch.arange(10)[None]
    llama(input_ids=ids, labels=ids).loss.backward()
    for name, tensor in llama.named_parameters():
        assert (tensor.grad is not None) == tensor.requires_grad, name
    assert llama.get_input_embeddings().weight.grad.abs().sum() > 0
    assert llama.get_output_embeddings().weight.grad.abs().sum() > 0


def test_freezing_again_and_after_freezing_all() -> None:
    llama = model(tied=False)
    llama.requires_grad_(False)
    for _ in range(2):
        freeze_non_embeddings(llama)
    assert llama.get_input_embeddings().weight.requires_grad
