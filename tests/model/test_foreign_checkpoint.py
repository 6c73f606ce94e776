"""Files of others: what ColossalAI itself writes, old formats, and what is refused by name."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.model.booster_worker import LAYOUTS
from tests.model.converting import convert, logits, prefixed, tensors
from tests.model.foreign_models import (
    State,
)
from tests.nursery import run_group

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def boosted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ColossalAI itself writes for two processes, a directory for each layout."""
    out = tmp_path_factory.mktemp("boosted")
    run_group("tests/model/booster_worker.py", str(original), str(out))
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_colossalai_checkpoints(name: str, boosted: Path, original: Path, tmp_path: Path) -> None:
    source, target = boosted / name, tmp_path / "target"
    flags = {"tokenizer_path": original}
    if not (source / "config.json").is_file():
        flags["model_config"] = original / "config.json"
    assert convert(source, target, **flags) == 0
    assert torch.equal(logits(target), logits(original))
    if name.startswith("stages") and name != "stages-one-file":
        files = sorted(path.name for path in source.iterdir())
        assert any("-stage-00002-shard-00001" in file for file in files)


def test_colossalai_stages_without_their_joint_index(
    boosted: Path, original: Path, tmp_path: Path
) -> None:
    """The first process may die before it has joined the stages' indices."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(boosted / "stages-bin", source)
    (source / "pytorch_model.bin.index.json").unlink()
    assert convert(source, target, tokenizer_path=original) == 0
    assert torch.equal(logits(target), logits(original))


@pytest.mark.parametrize("level", ["save", "save/epoch-0_step-2"])
def test_own_checkpoints(level: str, boosted: Path, original: Path, tmp_path: Path) -> None:
    """The directory that train.py saved to means its newest checkpoint."""
    save = tmp_path / "save"
    for step in (1, 2):
        checkpoint = save / f"epoch-0_step-{step}"
        source = boosted / "stages-safetensors" if step == 2 else original
        shutil.copytree(source, checkpoint / "modeling")
        (checkpoint / "optimizer").mkdir()
        save_file({"x": torch.ones(1)}, checkpoint / "optimizer" / "rank-00000.safetensors")
    (save / "latest").write_text("epoch-0_step-2\n", encoding="utf-8")
    (save / "epoch-0_step-1" / "modeling" / "model.safetensors").unlink()
    target = tmp_path / "target"
    assert convert(tmp_path / level, target) == 0
    assert torch.equal(logits(target), logits(original))


def test_files_of_old_torch(original: Path, tmp_path: Path) -> None:
    torch.save(tensors(original), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    flags = {"model_config": original / "config.json"}
    assert convert(tmp_path / "old.bin", tmp_path / "target", **flags) == 0
    assert torch.equal(logits(tmp_path / "target"), logits(original))


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def _edit(change: Callable[[State], object]) -> Callable[[Path], object]:
    def write(source: Path) -> None:
        state = tensors(source)
        changed = change(state)
        (source / "model.safetensors").unlink()
        content = changed if isinstance(changed, dict) else state
        torch.save(content, source / "pytorch_model.bin")

    return write


def _rename(state: State) -> None:
    state["model.layers.1.mlp.gate.weight"] = state.pop("model.layers.1.mlp.gate_proj.weight")


def _cut(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])


def _lose_shard(source: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "lost.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _point_outside(source: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "../x.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _lie_in_index(source: Path) -> None:
    index = {"weight_map": {"model.embeddings.weight": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _configure(**changes: object) -> Callable[[Path], object]:
    def write(source: Path) -> None:
        fields = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**fields, **changes}))

    return write


def _twice(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    shutil.copyfile(source / "model-1.safetensors", source / "model-2.safetensors")


def _several(source: Path) -> None:
    (source / "model.safetensors").unlink()
    for name in ("a.pth", "b.pth"):
        torch.save({}, source / name)


def _set(name: str, values: torch.Tensor) -> Callable[[Path], object]:
    return _edit(lambda state: state.update({name: values}))


Q = "model.layers.0.self_attn.q_proj.weight"
MISTAKES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no source": (shutil.rmtree, ("no such file or directory",)),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), ("no weights here",)),
    "no config": (lambda source: (source / "config.json").unlink(), ("--model_config",)),
    "other model": (_configure(model_type="gpt2"), ("config.json", "'gpt2' is not supported")),
    "cut file": (_cut, ("model.safetensors", "not a complete")),
    "lost shard": (_lose_shard, ("lost.safetensors", "index names it")),
    "lost checkpoint": (
        lambda source: (source / "latest").write_text("epoch-0_step-9\n"),
        ("latest: it names 'epoch-0_step-9', which is not there",),
    ),
    "file elsewhere": (_point_outside, ("'../x.safetensors' is not the name of a file beside",)),
    "wrong index": (_lie_in_index, ("model.embeddings.weight is missing", "the index")),
    "two copies": (_twice, ("model-2.safetensors", "also in model-1.safetensors")),
    "two files": (_several, ("several checkpoints (a.pth, b.pth)",)),
    "renamed": (
        _edit(_rename),
        ("missing model.layers.1.mlp.gate_proj.weight", "not known model.layers.1.mlp.gate.weight"),
    ),
    "layers too many": (
        _configure(num_hidden_layers=1),
        ("not known model.layers.1.", "and 5 more"),
    ),
    "layers too few": (_configure(num_hidden_layers=3), ("missing model.layers.2.", "and 5 more")),
    "wrong shape": (_set(Q, torch.ones(48, 40)), (Q, "[48, 40] instead of [48, 48]")),
    "quantised": (_set(Q, torch.ones(48, 48, dtype=torch.int8)), (Q, "torch.int8", "quantised")),
    "quantised to 8 bits": (
        _set(Q, torch.ones(48, 48).to(torch.float8_e4m3fn)),
        (Q, "float8_e4m3fn", "quantised"),
    ),
    "sparse": (_set(Q, torch.ones(48, 48).to_sparse()), (Q, "is sparse or quantised")),
    "no numbers": (_set(Q, torch.ones(48, 48, device="meta")), (Q, "has no numbers")),
    "number as name": (
        _edit(lambda state: {**state, 7: torch.ones(2)}),
        ("not known 7",),
    ),
    "no head": (
        _edit(lambda state: {name: state[name] for name in state if name != "lm_head.weight"}),
        ("missing lm_head.weight", "tie_word_embeddings"),
    ),
    "two heads": (_configure(tie_word_embeddings=True), ("lm_head.weight differs",)),
    "other head rows": (
        _set("lm_head.weight", torch.ones(699, 48)),
        ("lm_head.weight [699, 48] instead of [700, 48]",),
    ),
    "fewer rows": (_configure(vocab_size=800), ("700 rows", "vocabulary of 800")),
    "tokenizer too large": (_configure(vocab_size=600), ("700 ids", "vocab_size 600")),
    "two models": (
        _edit(lambda state: {**prefixed("actor.")(state), **prefixed("critic.")(state)}),
        ("'actor.' and 'critic.'",),
    ),
    "outside the prefix": (
        _edit(lambda state: {**prefixed("actor.")(state), "head.bias": torch.ones(3)}),
        ("not known head.bias",),
    ),
    "same name twice": (
        _edit(lambda state: {**state, **prefixed("module.")(state)}),
        ("lm_head.weight and module.lm_head.weight are both lm_head.weight",),
    ),
    "other layout": (_edit(lambda state: {"wte": torch.ones(2)}), ("no embedding named", "wte")),
    "no tensors": (_edit(lambda state: {"epoch": 3}), ("no tensors by name", "epoch")),
    "a list": (
        lambda source: (
            torch.save([torch.ones(2)], source / "pytorch_model.bin"),
            (source / "model.safetensors").unlink(),
        ),
        ("holds a list",),
    ),
    "not a checkpoint": (
        lambda source: (
            (source / "pytorch_model.bin").write_text("hello"),
            (source / "model.safetensors").unlink(),
        ),
        ("pytorch_model.bin", "not a complete checkpoint file"),
    ),
    "objects": (
        _edit(lambda state: {"model": state, "args": argparse.Namespace(lr=1)}),
        ("refused", "argparse.Namespace", "save the state dict alone"),
    ),
}


@pytest.mark.parametrize(("mistake", "complaints"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_one_line(
    mistake: Callable[[Path], object],
    complaints: tuple[str, ...],
    original: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(original, source)
    mistake(source)
    capsys.readouterr()
    assert convert(source, tmp_path / "target") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert str(source) in message
    for complaint in complaints:
        assert complaint in message
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_pickled_code_does_not_run(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    state = {**tensors(original), "x": Canary(canary)}
    for name, zipped in {"new.pt": True, "old.pt": False}.items():
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        flags = {"model_config": original / "config.json"}
        assert convert(tmp_path / name, tmp_path / "target", **flags) == 2
        message = capsys.readouterr().err
        assert "refused" in message
        assert f"{os.mkdir.__module__}.mkdir" in message
        assert not canary.exists()
        assert not (tmp_path / "target").exists()
