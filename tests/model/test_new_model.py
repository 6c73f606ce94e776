"""Random models: transformers' distribution, numbers that only seed and name decide."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.errors import DataError
from colossal_llama.model import new_model, shard_writer
from colossal_llama.model.configuration import preset_path

TINY = json.loads(preset_path("tiny").read_text(encoding="utf-8"))


def make(
    target: Path, tokenizer: Path, seed: int = 1, dtype: str = "float32", **changes: Any
) -> dict[str, torch.Tensor]:
    """Writes a model of the tiny preset with some settings changed; returns its tensors."""
    target.mkdir()
    preset = target.parent / f"{target.name}.json"
    preset.write_text(json.dumps({**TINY, **changes}), encoding="utf-8")
    new_model.write(preset, tokenizer, target, seed=seed, dtype=dtype)
    found = {}
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [10**9, 60_000], ids=["one file", "shards"])
def test_transformers_loads_it_whole(
    tied: bool, limit: int, old_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", limit)
    weights = make(tmp_path / "model", old_tokenizer, dtype="bfloat16", tie_word_embeddings=tied)
    assert ("lm_head.weight" in weights) != tied
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", torch_dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(old_tokenizer))
    assert model.generation_config.eos_token_id == 2
    for name, values in model.state_dict().items():
        if name in weights:
            assert torch.equal(values, weights[name])
    index = tmp_path / "model" / "model.safetensors.index.json"
    assert index.is_file() == (limit == 60_000)
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        assert content["weight_map"].keys() == weights.keys()
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
        for file in set(content["weight_map"].values()):
            inside = [name for name, place in content["weight_map"].items() if place == file]
            assert len(inside) == 1 or sum(weights[name].nbytes for name in inside) <= limit


def test_distribution(old_tokenizer: Path, tmp_path: Path) -> None:
    """Every row and every block of a matrix; a wide model, so that deviations are sharp."""
    weights = make(
        tmp_path / "model", old_tokenizer, hidden_size=2400, num_hidden_layers=1,
        attention_bias=True, initializer_range=0.05,
    )  # fmt: skip
    for name, values in weights.items():
        if name.endswith(".bias"):
            assert not values.any()
        elif values.dim() == 1:
            assert (values == 1).all()
        else:
            assert values.mean().abs() < 0.05 * 6 / values.numel() ** 0.5
            assert values.std() == pytest.approx(0.05, rel=0.02)
            rows = values.std(dim=1)
            assert ((rows > 0.03) & (rows < 0.07)).all()
    assert weights["model.layers.0.self_attn.q_proj.bias"].numel() == 2400
    # 2400 x 2400 numbers are more than one block: no block repeats another.
    big = weights["model.layers.0.self_attn.q_proj.weight"].view(-1)
    assert big.numel() > new_model._BLOCK
    rest = big[new_model._BLOCK :]
    assert not torch.equal(big[: rest.numel()], rest)
    assert len({values.view(-1)[:50].numpy().tobytes() for values in weights.values()
                if values.dim() == 2}) == 9  # fmt: skip


def test_padding_row_is_zero(old_tokenizer: Path, tmp_path: Path) -> None:
    """Like transformers, which marks the row of the padding id in the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(old_tokenizer)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(tmp_path / "padded")
    weights = make(tmp_path / "model", tmp_path / "padded")
    embedding = weights["model.embed_tokens.weight"]
    assert not embedding[tokenizer.pad_token_id].any()
    assert embedding.any(dim=1).sum() == len(embedding) - 1


def test_seed_and_name_decide_and_nothing_else(
    old_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(tmp_path / "one", old_tokenizer)
    other = make(tmp_path / "other", old_tokenizer, seed=2)
    deeper = make(tmp_path / "deeper", old_tokenizer, num_hidden_layers=3)
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 60_000)
    torch.manual_seed(7)
    sharded = make(tmp_path / "sharded", old_tokenizer)
    rounded = make(tmp_path / "rounded", old_tokenizer, dtype="float16")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for name, values in one.items():
        assert torch.equal(values, sharded[name])
        assert torch.equal(values, deeper[name])
        assert torch.equal(values.half(), rounded[name])
        assert torch.equal(values, other[name]) == (values.dim() == 1)


def test_same_flags_same_bytes(old_tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, old_tokenizer, dtype="bfloat16")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_memory_is_a_shard_and_not_the_model(old_tokenizer: Path, tmp_path: Path) -> None:
    """160 MB of weights in shards of 20 MB: what the process needs grows by a shard or two."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from colossal_llama.model import new_model, shard_writer\n"
        "shard_writer.SHARD_BYTES = 20_000_000\n"
        "tokenizer, root = map(Path, sys.argv[1:])\n"
        "for name in ('small', 'large'):\n"
        "    new_model.write(root / f'{name}.json', tokenizer, root / name, seed=1,"
        " dtype='bfloat16')\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    for name, layers in (("small", 1), ("large", 25)):
        (tmp_path / name).mkdir()
        fields = {**TINY, "hidden_size": 768, "intermediate_size": 640, "num_hidden_layers": layers}
        (tmp_path / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", script, str(old_tokenizer), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = (int(line) * 1024 for line in done.stdout.split())
    written = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert written > 160_000_000
    assert large - small < 60_000_000


def test_a_file_that_cannot_be_written_is_named(old_tokenizer: Path, tmp_path: Path) -> None:
    """safetensors has an error of its own for a full disk; a limit stands for that here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"model\.safetensors: cannot be written: .*too large"):
            make(tmp_path / "model", old_tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
