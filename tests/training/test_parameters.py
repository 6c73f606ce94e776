"""What trains and what decays, with embeddings of their own and with tied ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_llama import command
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training import parameters
from colossal_llama.training.arguments import TrainOptions

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
both_kinds = pytest.mark.parametrize("tied", [False, True])


def model(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def trained(llama: Any) -> set[str]:
    return {name for name, tensor in llama.named_parameters() if tensor.requires_grad}


@both_kinds
def test_only_the_embeddings_train(tied: bool) -> None:
    llama = model(tied=tied)
    parameters.freeze_non_embeddings(llama)
    # A tied output embedding is the input embedding, listed once.
    assert trained(llama) == ({INPUT} if tied else {INPUT, OUTPUT})


@both_kinds
def test_gradients_reach_the_embeddings_through_frozen_layers(tied: bool) -> None:
    llama = model(tied=tied)
    parameters.freeze_non_embeddings(llama)
    ids = torch.arange(10)[None]
    llama(input_ids=ids, labels=ids).loss.backward()
    for name, tensor in llama.named_parameters():
        assert (tensor.grad is not None) == tensor.requires_grad, name
    assert llama.get_input_embeddings().weight.grad.abs().sum() > 0
    assert llama.get_output_embeddings().weight.grad.abs().sum() > 0


def test_freezing_again_and_after_freezing_all() -> None:
    llama = model()
    llama.requires_grad_(False)
    for _ in range(2):
        parameters.freeze_non_embeddings(llama)
    assert llama.get_input_embeddings().weight.requires_grad


@both_kinds
def test_embedding_weights(tied: bool) -> None:
    llama = model(tied=tied)
    found = parameters.embedding_weights(llama)
    assert len(found) == (1 if tied else 2)
    assert found[0] is llama.model.embed_tokens.weight
    llama.lm_head.weight = None  # as on the first stage of a pipeline
    assert parameters.embedding_weights(llama) == found[:1]


def test_patterns_freeze_what_they_match_and_nothing_else() -> None:
    llama = model()
    every = trained(llama)
    parameters.freeze_matching(llama, ["model.layers.[0].*", "*norm.weight"])
    frozen = every - trained(llama)
    assert frozen == {
        name for name in every if name.startswith("model.layers.0.") or "norm" in name
    }
    assert {INPUT, OUTPUT} < trained(llama)


@both_kinds
def test_a_pattern_freezes_a_tied_embedding_under_its_only_name(tied: bool) -> None:
    llama = model(tied=tied)
    parameters.freeze_matching(llama, ["model.embed_tokens.*"])
    assert llama.get_output_embeddings().weight.requires_grad == (not tied)
    if tied:
        with pytest.raises(UsageError, match=r"--freeze lm_head\.weight: no parameter has such"):
            parameters.freeze_matching(llama, [OUTPUT])
    else:
        parameters.freeze_matching(llama, [OUTPUT])
        assert not llama.lm_head.weight.requires_grad


def test_patterns_add_to_frozen_layers() -> None:
    llama = model()
    parameters.freeze_non_embeddings(llama)
    parameters.freeze_matching(llama, [OUTPUT])
    assert trained(llama) == {INPUT}


def test_a_pattern_for_nothing_is_refused_and_so_is_one_for_all() -> None:
    with pytest.raises(UsageError) as caught:
        parameters.freeze_matching(model(), ["layers.0.*", "model.*", "MODEL.*"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--freeze layers.0.*",
        "--freeze MODEL.*",  # names have a case
    ]
    assert "there are model.embed_tokens.weight, " in str(caught.value)
    with pytest.raises(UsageError, match=r"--freeze \* leaves nothing to train"):
        parameters.freeze_matching(model(), ["*"])


def names_of(llama: Any, group: dict[str, Any]) -> set[str]:
    names = {id(tensor): name for name, tensor in llama.named_parameters()}
    assert len({id(p) for p in group["params"]}) == len(group["params"]), "one of them twice"
    return {names[id(parameter)] for parameter in group["params"]}


@both_kinds
def test_vectors_do_not_decay(tied: bool) -> None:
    llama = model(tied=tied)
    matrices, vectors = parameters.optimizer_groups(llama, 0.1, decay_all=False)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in name for name in names_of(llama, vectors))
    assert names_of(llama, matrices) | names_of(llama, vectors) == trained(llama)
    assert (OUTPUT in names_of(llama, matrices)) == (not tied)


def test_everything_decays_if_that_is_wanted() -> None:
    llama = model()
    (group,) = parameters.optimizer_groups(llama, 0.1, decay_all=True)
    assert names_of(llama, group) == trained(llama)
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("decay_all", [False, True])
def test_frozen_parameters_are_in_no_group_and_no_group_is_empty(decay_all: bool) -> None:
    llama = model()
    parameters.freeze_non_embeddings(llama)
    (group,) = parameters.optimizer_groups(llama, 0.1, decay_all=decay_all)
    assert names_of(llama, group) == {INPUT, OUTPUT}


@pytest.mark.parametrize("decay_all", [False, True])
def test_embeddings_can_be_left_out_of_decay(decay_all: bool) -> None:
    llama = model()
    apart = parameters.embedding_weights(llama)
    groups = parameters.optimizer_groups(llama, 0.1, decay_all=decay_all, undecayed=apart)
    decayed, others = (names_of(llama, group) for group in groups)
    assert {INPUT, OUTPUT} <= others
    assert ("model.norm.weight" in decayed) == decay_all
    assert decayed | others == trained(llama)


def parse(paths: dict[str, Path], *flags: str) -> TrainOptions:
    argv = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"])]
    return command.parse(TrainOptions, [*argv, "--plugin", "zero2", *flags])


def test_old_rows_are_as_given_or_as_init_model_noted(paths: dict[str, Path]) -> None:
    _set_vocabulary(paths, 120)
    only_new = "--train_new_rows_only"
    assert parameters.old_rows(parse(paths, only_new, "--num_old_rows", "100")) == 100
    with pytest.raises(UsageError, match=r"does not say how many rows are old.*--num_old_rows"):
        parse(paths, only_new)
    report = paths["model"] / parameters.EXTENSION_REPORT
    for content in ([], {}, {"size_before": "many"}, {"size_before": 0}):
        report.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UsageError, match="does not say how many"):
            parse(paths, only_new)
    report.write_text(json.dumps({"size_before": 90, "size_after": 120}), encoding="utf-8")
    assert parameters.old_rows(parse(paths, only_new)) == 90
    assert parameters.old_rows(parse(paths, only_new, "--num_old_rows", "100")) == 100
    report.unlink()
    with pytest.raises(DataError, match="--num_old_rows"):
        parameters.old_rows(parse(paths))


@pytest.mark.parametrize("old", ["120", "121"])
def test_there_must_be_new_rows(paths: dict[str, Path], old: str) -> None:
    _set_vocabulary(paths, 120)
    with pytest.raises(UsageError, match=r"all 120 embedding rows .* are old ones"):
        parse(paths, "--train_new_rows_only", "--num_old_rows", old)


def _set_vocabulary(paths: dict[str, Path], size: int) -> None:
    config = paths["model"] / "config.json"
    sizes = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**sizes, "vocab_size": size}), encoding="utf-8")


def test_the_description_tells_apart_what_has_another_optimizer(paths: dict[str, Path]) -> None:
    _set_vocabulary(paths, 120)
    lora = ["--lora_rank", "4"]
    rows = ["--train_new_rows_only", "--num_old_rows"]
    kinds: list[list[str]] = [
        [],
        ["--decay_all"],
        ["--freeze", "*norm*"],
        ["--freeze_non_embeds_params"],
        ["--freeze_non_embeds_params", *rows, "100"],
        ["--freeze_non_embeds_params", *rows, "90"],
        [*rows, "100"],
        lora,
        ["--lora_rank", "8"],
        [*lora, "--lora_alpha", "8"],
        [*lora, "--lora_modules", "q_proj"],
        [*lora, "--lora_train_embeddings"],
        [*lora, "--lora_train_embeddings", *rows, "100"],
    ]
    described = [parameters.describe(parse(paths, *flags)) for flags in kinds]
    assert len(set(described)) == len(kinds), described
    assert described[0] == "all weights"
    order = (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    one, other = (parse(paths, *lora, "--lora_modules", *names) for names in order)
    assert parameters.describe(one) == parameters.describe(other)
