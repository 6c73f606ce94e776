"""The presets are the published models: the same settings, the same number of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from colossal_llama.errors import DataError
from colossal_llama.model import init_model
from colossal_llama.model.configuration import (
    PRESETS,
    SUPPORTED,
    empty_model,
    preset_names,
    preset_path,
    read_fields,
)

# Preset: (published ids, weights). The numbers of tinyllama-1.1b, llama2-7b, llama2-13b and
# llama3-8b are what their safetensors files on huggingface.co say. HammerLLM's model.safetensors
# has 2.8 GB in bfloat16: 1.4 billion. The file of chinese-baby-llama2 has 280 MB in float16,
# 140,188,416 weights, with the shared matrix (32,000 x 768) twice; its model card says 115M.
PUBLISHED = {
    "baby-llama2-115m": (32_000, 140_188_416 - 32_000 * 768),
    "tinyllama-1.1b": (32_000, 1_100_048_384),
    "hammerllm-1.4b": (105_789, 1_402_288_128),
    "llama2-7b": (32_000, 6_738_415_616),
    "llama2-13b": (32_000, 13_015_864_320),
    "llama3-8b": (128_256, 8_030_261_248),
}
OURS = ("demo", "tiny")


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_number_of_weights_is_the_published_one(name: str, published: tuple[int, int]) -> None:
    ids, weights = published
    path = preset_path(name)
    config, model = empty_model({**read_fields(path), "vocab_size": ids}, path)
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert config.vocab_size == ids


def test_weights_that_the_count_does_not_see() -> None:
    """Settings of the published configurations that change no shape."""
    fields = {name: read_fields(preset_path(name)) for name in PUBLISHED}
    thetas = {name: preset["rope_theta"] for name, preset in fields.items()}
    assert thetas == {name: 500000.0 if name == "llama3-8b" else 10000.0 for name in PUBLISHED}
    lengths = {name: preset["max_position_embeddings"] for name, preset in fields.items()}
    assert list(lengths.values()) == [1024, 2048, 2048, 4096, 4096, 8192]
    epsilons = {name: preset["rms_norm_eps"] for name, preset in fields.items()}
    assert list(epsilons.values()) == [1e-6, *[1e-5] * 5]
    heads = {
        name: (preset["num_attention_heads"], preset["num_key_value_heads"])
        for name, preset in fields.items()
    }
    assert list(heads.values()) == [(12, 12), (32, 4), (32, 4), (32, 32), (40, 40), (32, 8)]


def test_every_preset_has_a_source_and_nothing_that_transformers_does_not_know() -> None:
    assert preset_names() == sorted([*PUBLISHED, *OURS])
    for name in preset_names():
        content = json.loads(preset_path(name).read_text(encoding="utf-8"))
        assert content["_source"]
        fields = read_fields(preset_path(name))
        assert fields.keys() == content.keys() - {"_source"}
        assert not fields.keys() & {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
        known = AutoConfig.for_model(fields["model_type"]).to_dict()
        assert fields.keys() <= known.keys()
        assert fields.keys() == read_fields(preset_path("tiny")).keys()


def test_help_lists_what_is_there() -> None:
    """Listed from the folder, without a heavy import."""
    code = "import sys; from colossal_llama.cli import main; main(['init-model', '--help'])"
    check = "; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n {code}\nexcept SystemExit: pass\nimport sys{check}"],
        capture_output=True,
        text=True,
        check=True,
    )
    words = " ".join(done.stdout.split())
    assert ", ".join(preset_names()) in words
    assert Path(init_model.__file__).parent == PRESETS.parent


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_supported_models_start_as_transformers_starts_them(model_type: str) -> None:
    """Normal matrices, gains of one, biases of zero: what new_model draws, for each of them."""
    fields: dict[str, Any] = {
        **read_fields(preset_path("tiny")),
        "model_type": model_type,
        "vocab_size": 1000,
        "pad_token_id": 3,
    }
    del fields["architectures"]
    _, empty = empty_model(fields, Path("config.json"))
    torch.manual_seed(0)
    model = type(empty)(empty.config)
    for name, values in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias"):
            assert not values.any()
        elif values.dim() == 1:
            assert type(owner).__name__.endswith("RMSNorm")
            assert (values == 1).all()
        else:
            assert isinstance(owner, torch.nn.Linear | torch.nn.Embedding)
            assert values.std() == pytest.approx(0.02, rel=0.05)
    assert not model.get_input_embeddings().weight[3].any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported; there are llama"),
        ({"num_attention_heads": 0}, "no model can be built"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_size": "wide"}, "no model can be built"),
        ({"hidden_act": "sillu"}, "no model can be built"),
    ],
)
def test_wrong_configurations_are_refused(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    fields = {**read_fields(preset_path("tiny")), **change}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(DataError, match=complaint) as refusal:
        empty_model(read_fields(path), path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
