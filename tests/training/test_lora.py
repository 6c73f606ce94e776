"""LoRA adapters: their start, their sum, their files, and what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colossal_llama import command
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training import lora, parameters
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.export import Exporter, tied_copies
from colossal_llama.training.file_writer import FileWriter
from tests.training.test_parameters import OUTPUT, model

pytestmark = pytest.mark.usefixtures("process_group")


def parse(paths: dict[str, Path], *flags: str) -> TrainOptions:
    argv = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"])]
    return command.parse(TrainOptions, [*argv, "--plugin", "zero2", "--lora_rank", "2", *flags])


@pytest.fixture
def options(paths: dict[str, Path]) -> TrainOptions:
    return parse(paths)


def same_model(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    return model(tied=tied)


def adapter_of(options: TrainOptions, llama: Any, checkpoint: Path | None = None) -> lora.Adapter:
    return lora.add_adapter(options, llama, options.pretrained, checkpoint)


def move(adapter: lora.Adapter) -> None:
    """Something that training could have done."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor += torch.randn_like(tensor) * 0.1


def write(adapter: lora.Adapter, checkpoint: Path) -> None:
    adapter.write(checkpoint / lora.FOLDER, FileWriter())


def test_only_the_adapter_trains(options: TrainOptions) -> None:
    llama = same_model()
    adapter_of(options, llama)
    trained = {name for name, p in llama.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_train_on_demand(paths: dict[str, Path], tied: bool) -> None:
    llama = same_model(tied=tied)
    adapter_of(parse(paths, "--lora_train_embeddings"), llama)
    assert all(weight.requires_grad for weight in parameters.embedding_weights(llama))
    assert not llama.model.norm.weight.requires_grad


def test_a_new_adapter_depends_on_the_seed_alone_and_changes_nothing(
    paths: dict[str, Path],
) -> None:
    ids = torch.arange(20)[None]
    logits = same_model()(ids).logits
    adapters = []
    for seed, before in (("1", 5), ("1", 6), ("2", 5)):
        llama = same_model()
        torch.manual_seed(before)
        adapter = adapter_of(parse(paths, "--seed", seed), llama)
        drawn = torch.rand(3)
        torch.manual_seed(before)
        assert torch.equal(drawn, torch.rand(3)), "the process's own random state has moved"
        assert torch.equal(llama(ids).logits, logits)
        adapters.append(adapter.tensors())
    one, same, other = adapters
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_patterns_freeze_adapters_by_the_names_of_their_layers(options: TrainOptions) -> None:
    llama = same_model()
    adapter_of(options, llama)
    parameters.freeze_matching(llama, ["model.layers.0.*"])
    assert {n.split(".")[2] for n, p in llama.named_parameters() if p.requires_grad} == {"1"}


def test_unknown_layers_are_refused(paths: dict[str, Path]) -> None:
    for name in ("lm_head", "embed_tokens", "proj"):
        flags = ["--lora_modules", "q_proj", name]
        with pytest.raises(UsageError, match=rf"--lora_modules {name}: the layers have down_proj"):
            adapter_of(parse(paths, *flags), same_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_sum_is_taken_in_float32(
    paths: dict[str, Path], dtype: torch.dtype, tied: bool
) -> None:
    llama = same_model(tied=tied).to(dtype)
    base = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    adapter = adapter_of(parse(paths, "--lora_alpha", "3"), llama)
    move(adapter)
    merged = dict(adapter.merged())
    assert merged.keys() == base.keys()
    tensors = adapter.tensors()
    for name, weight in base.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = weight.float()
        if f"{path}.lora_A.weight" in tensors:
            a, b = (tensors[f"{path}.lora_{side}.weight"].float() for side in "AB")
            wanted = wanted + 3 / 2 * (b @ a)
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], wanted.to(dtype)), name
    assert torch.equal(llama.model.layers[0].mlp.up_proj.base_layer.weight,
                       base["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--lora_train_embeddings"]])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_loaded_again(
    paths: dict[str, Path], tmp_path: Path, tied: bool, flags: list[str]
) -> None:
    options = parse(paths, *flags)
    adapter = adapter_of(options, same_model(tied=tied))
    move(adapter)
    write(adapter, tmp_path)
    loaded = adapter_of(options, same_model(tied=tied), tmp_path)
    assert loaded.base == adapter.base
    for name, tensor in adapter.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == adapter.tensors().keys()
    assert (f"base_model.model.{OUTPUT}" in stored) == bool(flags)


def test_same_adapter_same_files(paths: dict[str, Path], tmp_path: Path) -> None:
    modules = (["q_proj", "v_proj", "up_proj"], ["up_proj", "q_proj", "v_proj"])
    for name, order in zip("ab", modules, strict=True):
        write(adapter_of(parse(paths, "--lora_modules", *order), same_model()), tmp_path / name)
    for path in (tmp_path / "a" / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "adapter" / path.name).read_bytes(), path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rank", "4"], r"r 2, the flags ask for 4"),
        (["--lora_alpha", "8"], r"lora_alpha 16, the flags ask for 8"),
        (["--lora_alpha", "0.5"], r"lora_alpha 16, the flags ask for 0.5"),
        (["--lora_modules", "q_proj"], r"target_modules .* the flags ask for \['q_proj'\]"),
        (["--lora_train_embeddings"], r"modules_to_save None"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    paths: dict[str, Path], tmp_path: Path, flags: list[str], said: str
) -> None:
    write(adapter_of(parse(paths), same_model()), tmp_path)
    with pytest.raises(DataError, match=rf"{said}.*new stage with --load_checkpoint .*/modeling"):
        adapter_of(parse(paths, *flags), same_model(), tmp_path)


def test_other_base_weights_are_refused(options: TrainOptions, tmp_path: Path) -> None:
    write(adapter_of(options, same_model()), tmp_path)
    other = same_model()
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    with pytest.raises(DataError, match=r"trained on the weights of .*has others.*--pretrained"):
        adapter_of(options, other, tmp_path)
    # In another dtype they cannot be compared.
    adapter_of(options, same_model().bfloat16(), tmp_path)


def test_a_damaged_adapter_is_an_error(options: TrainOptions, tmp_path: Path) -> None:
    write(adapter_of(options, same_model()), tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        adapter_of(options, same_model(), tmp_path)


def test_base_weights_are_where_they_were_or_where_the_flags_say(
    options: TrainOptions, paths: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "epoch-0_step-1"
    with pytest.raises(DataError, match=r"trained without LoRA.*without --lora_rank.*/modeling"):
        lora.base_directory(options, checkpoint)
    write(lora.add_adapter(options, same_model(), paths["weights"], None), checkpoint)
    assert lora.base_directory(options, checkpoint) == paths["weights"]
    both = tmp_path / "both"
    both.mkdir()
    base, checkpoint = (path.rename(both / path.name) for path in (paths["weights"], checkpoint))
    assert lora.base_directory(options, checkpoint) == base, "they were moved together"
    base.rename(tmp_path / "moved")
    assert lora.base_directory(options, checkpoint) == paths["model"]
    (checkpoint / "adapter" / "base.json").write_text(json.dumps({"where": "?"}))
    with pytest.raises(DataError, match="does not describe base weights"):
        lora.base_directory(options, checkpoint)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_the_sum(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    from colossal_llama.training import export

    monkeypatch.setattr(export, "_SHARD", "3KB")
    monkeypatch.setattr(export, "finish_model_directory", lambda *_: None)
    (tmp_path / "modeling").mkdir()
    llama = same_model(tied=tied)
    adapter = adapter_of(options, llama)
    move(adapter)
    Exporter(booster=None, model=None, tokenizer=None, adapter=adapter)(tmp_path, FileWriter())
    assert len(list((tmp_path / "modeling").glob("model-*.safetensors"))) > 2
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "modeling", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in adapter.merged():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert tied_copies(llama) == ({OUTPUT} if tied else set())


def test_flags_that_need_lora_or_do_not_go_with_it(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def problem(*flags: str) -> str:
        with pytest.raises(UsageError) as caught:
            parse(paths, *flags)
        return "\n".join(caught.value.problems)

    for flags in (["--plugin", "gemini"], ["--plugin", "3d", "--tp", "2"],
                  ["--plugin", "3d", "--pp", "2"]):  # fmt: skip
        assert "--lora_rank does not work with" in problem(*flags)
    assert "freezes the layers" in problem("--freeze_non_embeds_params")
    assert "needs --lora_train_embeddings" in problem("--train_new_rows_only")
    assert "--lora_alpha must be above 0" in problem("--lora_alpha", "0")
    for flags in (["--lora_train_embeddings"], ["--lora_dropout", "0.1"],
                  ["--lora_modules", "q_proj"]):  # fmt: skip
        assert problem("--lora_rank", "0", *flags) == f"{flags[0]} needs --lora_rank"
