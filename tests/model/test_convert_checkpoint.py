"""Foreign checkpoints compute what their own programs compute, or are refused by name.

lit-gpt and Meta are held against the maths in ``foreign_models.py``; ColossalAI's files are
written by ColossalAI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaModel

from colossal_llama import command
from colossal_llama.model import convert_checkpoint as convert_module
from colossal_llama.model import shard_writer
from colossal_llama.model.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint
from tests.model.booster_worker import LAYOUTS
from tests.model.foreign_models import (
    Shape,
    State,
    lit_logits,
    lit_state,
    meta_logits,
    meta_state,
)

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape()
IDS = torch.arange(1, 60) * 11 % SHAPE.ids


def convert(source: Path, target: Path, **flags: object) -> int:
    """The command, in this process; the exit code."""
    given: dict[str, object] = {"source_checkpoint": source, "target_model_path": target, **flags}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return command.run(ConvertCheckpointOptions, convert_checkpoint, words)


def load(directory: Path) -> Any:
    """The model, as anyone loads it; every weight comes from the files."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    return load(directory)(IDS[None]).logits[0]


def tensors(directory: Path) -> State:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the shape of this file's models as a config.json somewhere else."""

    def write(**changes: object) -> Path:
        path = tmp_path / "settings" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(SHAPE.config(**changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def original(old_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model with its tokenizer, that others have wrapped and saved."""
    path = tmp_path_factory.mktemp("original") / "model"
    torch.manual_seed(3)
    config = AutoConfig.for_model(**SHAPE.config(initializer_range=0.3))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    shutil.copytree(old_tokenizer, path, dirs_exist_ok=True)
    return path


LIT = {
    "TinyLlama": {"attention": "attn", "mlp": "swiglu"},
    "lit-gpt": {"attention": "attn", "mlp": "fc"},
    "litgpt 0.5": {"attention": "qkv", "mlp": "fc"},
}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("style", LIT.values(), ids=LIT)
def test_lit_gpt_computes_the_same(
    style: dict[str, str], groups: int, config: Callable[..., Path], tmp_path: Path
) -> None:
    shape = Shape(groups=groups)
    state = lit_state(shape, **style)
    torch.save({"model": state, "iter_num": 7}, tmp_path / "iter-7-ckpt.pth")
    settings = config(num_key_value_heads=groups)
    source, target = tmp_path / "iter-7-ckpt.pth", tmp_path / "target"
    assert convert(source, target, model_config=settings) == 0
    torch.testing.assert_close(logits(target), lit_logits(state, IDS, shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_meta_and_llama2c_compute_the_same(
    theta: float, groups: int, config: Callable[..., Path], tmp_path: Path
) -> None:
    shape = Shape(groups=groups, theta=theta)
    state = meta_state(shape)
    saved = {**state, "rope.freqs": torch.ones(4)}
    source, target = tmp_path / "consolidated.00.pth", tmp_path / "target"
    torch.save(saved, source)
    settings = config(num_key_value_heads=groups, rope_theta=theta)
    assert convert(source, target, model_config=settings) == 0
    torch.testing.assert_close(logits(target), meta_logits(state, IDS, shape), rtol=1e-4, atol=1e-4)


def test_baby_llama2_shares_its_matrix(config: Callable[..., Path], tmp_path: Path) -> None:
    """llama2.c's ckpt.pt: compiled, shared, among other state."""
    state = meta_state(SHAPE, tied=True)
    saved = {
        "model": {f"_orig_mod.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "model_args": {"dim": 48},
        "iter_num": 5,
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    target = tmp_path / "target"
    assert convert(tmp_path / "ckpt.pt", target, model_config=config(tie_word_embeddings=True)) == 0
    assert "lm_head.weight" not in tensors(target)
    torch.testing.assert_close(logits(target), meta_logits(state, IDS, SHAPE), rtol=1e-4, atol=1e-4)


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": prefixed(""),
    "compiled": prefixed("_orig_mod."),
    "DDP": prefixed("module."),
    "DDP and compiled": prefixed("module._orig_mod."),
    "compiled DDP": prefixed("_orig_mod.module."),
    "in a Lightning module": prefixed("model."),
    "deep in something": prefixed("agent.policy."),
    "compiled layers": lambda state: {
        name.replace(".self_attn.", "._orig_mod.self_attn."): value for name, value in state.items()
    },
    "FSDP": lambda state: {
        name.replace(".mlp.", "._fsdp_wrapped_module.mlp."): value for name, value in state.items()
    },
    "model": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed("model.")(state), "step": 3},
    "model_state_dict": lambda state: {"args": {"lr": 0.1}, "model_state_dict": state},
    "DeepSpeed": lambda state: {"module": prefixed("module.")(state), "dp_world_size": 1},
    "old buffers": lambda state: {
        **state,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_come_off(
    wrap: Callable[[State], dict[str, Any]], original: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "saved.pt", tmp_path / "target"
    torch.save(wrap(tensors(original)), source)
    flags = {"model_config": original / "config.json", "tokenizer_path": original}
    assert convert(source, target, **flags) == 0
    assert torch.equal(logits(target), logits(original))


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


def test_model_without_head(original: Path, tmp_path: Path) -> None:
    """What AutoModel saves is a whole model if the head is the embedding."""
    model = LlamaModel.from_pretrained(original)
    model.save_pretrained(tmp_path / "bare")
    state = tensors(tmp_path / "bare")
    assert "embed_tokens.weight" in state
    source, target = tmp_path / "bare" / "model.safetensors", tmp_path / "target"
    config = json.loads((original / "config.json").read_text())
    settings = tmp_path / "tied.json"
    settings.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert convert(source, target, model_config=settings) == 0
    with torch.no_grad():
        last = model(IDS[None]).last_hidden_state[0]
    wanted = torch.nn.functional.linear(last, state["embed_tokens.weight"])
    torch.testing.assert_close(logits(target), wanted, rtol=1e-4, atol=1e-4)


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


@pytest.fixture(scope="module")
def boosted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ColossalAI itself writes for two processes, a directory for each layout."""
    out = tmp_path_factory.mktemp("boosted")
    torchrun = Path(sys.executable).parent / "torchrun"
    worker = ROOT / "tests" / "model" / "booster_worker.py"
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc_per_node", "2", worker, original, out],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
        assert "refused" in capsys.readouterr().err
        assert not canary.exists()
        assert not (tmp_path / "target").exists()


def test_files_of_old_torch(original: Path, tmp_path: Path) -> None:
    torch.save(tensors(original), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    flags = {"model_config": original / "config.json"}
    assert convert(tmp_path / "old.bin", tmp_path / "target", **flags) == 0
    assert torch.equal(logits(tmp_path / "target"), logits(original))


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
