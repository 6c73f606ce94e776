"""The command as a whole: types, shards, padding, memory, flags."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from colossal_llama.model import convert_checkpoint as convert_module
from colossal_llama.model import shard_writer
from tests.model.converting import IDS, SHAPE, convert, load, logits, prefixed, tensors
from tests.model.foreign_models import (
    Shape,
    State,
    lit_logits,
    lit_state,
)


def test_what_is_beside_the_weights_is_used(original: Path, tmp_path: Path) -> None:
    """A directory needs no further flags; the result is a directory like any other."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(original, source)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    torch.save(tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    torch.save({"state": {}}, source / "optimizer.pt")
    assert convert(source, target) == 0
    assert torch.equal(logits(target), logits(original))
    assert (target / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert len(AutoTokenizer.from_pretrained(target)) == SHAPE.ids
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert len(modes) == 1


def test_dtype_shards_and_bytes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types stay or are changed as a whole; the same flags give the same bytes."""
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 50_000)
    for name in ("a", "b"):
        assert convert(original, tmp_path / name, dtype="bfloat16") == 0
    assert convert(original, tmp_path / "kept") == 0
    wanted = tensors(original)
    rounded, kept = tensors(tmp_path / "a"), tensors(tmp_path / "kept")
    assert rounded.keys() == kept.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(values, kept[name])
        assert torch.equal(values.bfloat16(), rounded[name])
    assert load(tmp_path / "a").dtype == torch.bfloat16
    assert load(tmp_path / "kept").dtype == torch.float32
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert "model.safetensors.index.json" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def pad(state: State, rows: int) -> State:
    """lit-gpt rounds vocabularies up; the rows beyond are never used."""
    for name in ("transformer.wte.weight", "lm_head.weight"):
        extra = torch.full((rows - SHAPE.ids, SHAPE.width), 9.0)
        state[name] = torch.cat([state[name], extra])
    return state


def test_padding_goes_when_somebody_says_so(
    config: Callable[..., Path], original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = lit_state(SHAPE)
    wanted = lit_logits(state, IDS, SHAPE)
    source = tmp_path / "padded.pth"
    torch.save(pad(state, 704), source)
    for name, flags in {
        "flag": {"model_config": config(), "trim_vocab_padding": True},
        "tokenizer": {"model_config": config(), "tokenizer_path": original},
    }.items():
        assert convert(source, tmp_path / name, **flags) == 0
        assert "4 rows of padding left out" in capsys.readouterr().out
        torch.testing.assert_close(logits(tmp_path / name), wanted, rtol=1e-4, atol=1e-4)
    assert convert(source, tmp_path / "silent", model_config=config()) == 2
    message = capsys.readouterr().err
    assert "704 rows" in message
    assert "vocabulary of 700" in message
    assert "--trim_vocab_padding" in message
    # The configuration may keep the rows; a tokenizer that needs fewer does not change that.
    settings = config(vocab_size=704)
    kept = tmp_path / "kept"
    assert convert(source, kept, model_config=settings, tokenizer_path=original) == 0
    assert load(kept).config.vocab_size == 704


def test_preset_takes_its_ids_from_the_tokenizer(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colossal_llama.model.configuration import empty_model, preset_path, read_fields

    path = preset_path("tiny")
    _, empty = empty_model({**read_fields(path), "vocab_size": 704}, path)
    state = {name: torch.randn(value.shape) for name, value in empty.named_parameters()}
    source = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": prefixed("model.")(state)}, source)
    target = tmp_path / "target"
    assert convert(source, target, model_config="tiny") == 2
    assert "--tokenizer_path" in capsys.readouterr().err
    assert convert(source, target, model_config="tiny", tokenizer_path=original) == 0
    model = load(target)
    assert model.config.vocab_size == SHAPE.ids
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.num_parameters() == empty.num_parameters() - 2 * 4 * 64


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"model_config": "llama9"}, "tinyllama-1.1b"),
        ({"model_config": "missing.json"}, "missing.json"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_flag_mistakes(
    flags: dict[str, str],
    complaint: str,
    original: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(original, tmp_path / "target", **flags) == 2
    assert complaint in capsys.readouterr().err
    assert convert(original, original) == 2
    assert "must not be --source_checkpoint" in capsys.readouterr().err


def test_target_is_not_overwritten_unasked(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    assert convert(original, target) == 2
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert convert(original, target, overwrite=True) == 0
    assert not (target / "mine").exists()


def test_real_command_maps_the_file_instead_of_reading_it(tmp_path: Path) -> None:
    """160 MB among 200 MB of optimizer state: a shard of 20 MB is what lies in memory."""
    shape = Shape(width=768, inner=512, layers=18, heads=12, groups=4)
    state = lit_state(shape)
    moments = {number: torch.ones(10_000_000) for number in range(5)}
    torch.save({"model": state, "optimizer": moments}, tmp_path / "ckpt.pth")
    size = sum(values.nbytes for values in state.values())
    assert size > 160_000_000
    (tmp_path / "config.json").write_text(json.dumps(shape.config()))
    script = (
        "import runpy, sys, threading, time\n"
        "import torch, transformers.models.llama.modeling_llama, safetensors.torch\n"
        "from colossal_llama.model import shard_writer\n"
        "shard_writer.SHARD_BYTES = 20_000_000\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    (line,) = [line for line in lines if line.startswith('RssAnon')]\n"
        "    return int(line.split()[1]) * 1024\n"
        "seen = [anonymous()]\n"
        "def watch():\n"
        "    while True:\n"
        "        seen.append(anonymous()); time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print(max(seen) - seen[0])\n"
    )
    file = convert_module.__file__
    flags = ["--source_checkpoint", tmp_path / "ckpt.pth", "--target_model_path", tmp_path / "out"]
    code = f"import sys; sys.argv[0] = {file!r}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert int(done.stdout.split()[-1]) < 80_000_000
