"""Mistakes in what ``train.py`` is given: one line that names both sides, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.integration.conftest import BIN, MAX_LENGTH, World, call
from tests.nursery import run_group


@dataclass(frozen=True)
class Mistakes:
    """A training that went well, copies of its inputs to spoil, and calls with what was spoilt."""

    world: World
    out: Path
    calls: dict[str, list[str]]

    @property
    def good_run(self) -> Path:
        return self.out / "good"

    @property
    def checkpoint(self) -> Path:
        return self.good_run / (self.good_run / "latest").read_text(encoding="utf-8").strip()

    def copy(self, source: Path, name: str) -> Path:
        return shutil.copytree(source, self.out / "copies" / name / source.name)

    def call(
        self, name: str, *flags: str, model: Path | None = None, data: Path | None = None
    ) -> None:
        """Notes a call that is a mistake; each has a ``--save_dir`` of its own."""
        self.calls[name] = [
            *["--pretrained", str(model or self.world.model)],
            *["--dataset", str(data or self.world.pretrain / "part-00000")],
            *["--save_dir", str(self.out / "saved" / name), "--plugin", "zero2"],
            *["--mixed_precision", "bf16", "--save_interval", "0", *flags],
        ]  # fmt: skip


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def spoil_data(mistakes: Mistakes) -> None:
    world = mistakes.world
    mistakes.call("long-rows", "--max_length", str(MAX_LENGTH // 2))
    part = mistakes.copy(world.pretrain, "cut-data") / "part-00000"
    cut(next(part.glob("*.arrow")))
    mistakes.call("cut-data", data=part)
    part = mistakes.copy(world.pretrain, "no-manifest") / "part-00000"
    (part.parent / "dataset_manifest.json").unlink()
    mistakes.call("no-manifest", data=part)
    both = [str(world.pretrain / "part-00000"), str(world.sft / "part-00000")]
    mistakes.call("two-kinds", "--dataset", *both, "--max_length", "512")
    mistakes.call("twice", "--dataset", both[0], both[0])
    mistakes.call("too-little", "--micro_batch_size", "1000000")


def spoil_models(mistakes: Mistakes) -> None:
    world = mistakes.world
    rows = mistakes.copy(world.model, "few-rows")
    model = AutoModelForCausalLM.from_pretrained(rows)
    model.resize_token_embeddings(300)
    model.save_pretrained(rows)
    mistakes.call("few-rows", model=rows)
    weights = mistakes.copy(world.model, "cut-weights")
    cut(next(weights.glob("*.safetensors")))
    mistakes.call("cut-weights", model=weights)
    weights = mistakes.copy(world.model, "no-weights")
    for path in weights.glob("*.safetensors"):
        path.unlink()
    mistakes.call("no-weights", model=weights)
    weights = mistakes.copy(world.model, "lacking-weights")
    path = next(weights.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    mistakes.call("lacking-weights", model=weights)
    weights = mistakes.copy(world.model, "other-shapes")
    edit_json(weights / "config.json", lambda config: config.update(intermediate_size=24))
    mistakes.call("other-shapes", model=weights)
    tokenizer = mistakes.copy(world.model, "no-tokenizer")
    for path in tokenizer.glob("*token*"):
        path.unlink()
    mistakes.call("no-tokenizer", model=tokenizer)
    config = mistakes.copy(world.model, "bad-config") / "config.json"
    cut(config)
    mistakes.call("bad-config", model=config.parent)


def spoil_checkpoints(mistakes: Mistakes) -> None:
    good = mistakes.checkpoint
    sft = mistakes.world.sft / "part-00000"
    mistakes.call("other-data", "--max_length", "512", "--load_checkpoint", str(good), data=sft)
    for name, folder in SPOILT.items():
        checkpoint = mistakes.copy(good, name)
        path = next((checkpoint / folder).glob("*.safetensors"))
        path.unlink() if name.startswith("no-") else flip(path)
        mistakes.call(name, "--load_checkpoint", str(checkpoint))
    checkpoint = mistakes.copy(good, "cut-checksums")
    cut(checkpoint / "checksums.json")
    mistakes.call("cut-checksums", "--load_checkpoint", str(checkpoint))
    other = mistakes.copy(mistakes.world.model, "other-model")
    edit_json(other / "config.json", lambda config: config.update(num_key_value_heads=1))
    mistakes.call("other-model", "--load_checkpoint", str(good), model=other)
    mistakes.call("neither", "--load_checkpoint", str(good / "optimizer"))
    checkpoint = mistakes.copy(good, "version")
    edit_json(checkpoint / "running_states.json", lambda state: state.update(version=99))
    mistakes.call("version", "--load_checkpoint", str(checkpoint))
    mistakes.call("occupied", "--save_dir", str(mistakes.good_run))


# Whose file is missing from a checkpoint, or has a bit that was changed.
SPOILT = {
    "no-optimizer": "optimizer",
    "no-weights-saved": "modeling",
    "no-random": "rng",
    "flipped-optimizer": "optimizer",
    "flipped-weights": "modeling",
}

# For each call: words of the one line that it has to end with.
EXPECTED = {
    "long-rows": ("part-00000", f"{MAX_LENGTH} tokens", "--max_length"),
    "cut-data": (".arrow", "bytes", "incomplete"),
    "no-manifest": ("dataset_manifest.json", "not a prepared dataset"),
    "two-kinds": ("sft dataset", "pretrain dataset"),
    "twice": ("part-00000", "twice"),
    "too-little": ("rows", "1,000,000 of one step", "--micro_batch_size"),
    "few-rows": ("few-rows", "300 embedding rows", "pieces", "init_model"),
    "cut-weights": ("cut-weights", "cannot load the model"),
    "no-weights": ("no-weights", "cannot load the model"),
    "lacking-weights": ("lacking-weights", "up_proj"),
    "other-shapes": ("other-shapes", "model"),
    "no-tokenizer": ("no-tokenizer", "tokenizer"),
    "bad-config": ("config.json", "not JSON"),
    "other-data": ("epoch-", "other data", "modeling"),
    "no-optimizer": ("epoch-", "optimizer/rank-00000", "missing", "resume from another"),
    "no-weights-saved": ("modeling/", "missing", "incomplete"),
    "no-random": ("rng/rank-00000", "missing"),
    "flipped-optimizer": ("optimizer/rank-00000", "damaged", "resume from another"),
    "flipped-weights": ("modeling/", "damaged"),
    "cut-checksums": ("checksums.json", "not JSON"),
    "other-model": ("epoch-", "other-model", "num_key_value_heads", "there, 1 here"),
    "neither": ("--load_checkpoint", "neither a checkpoint", "nor a model directory"),
    "version": ("running_states.json", "99"),
    "occupied": ("--save_dir", "another run", "--overwrite"),
}


@pytest.fixture(scope="module")
def mistakes(world: World, tmp_path_factory: pytest.TempPathFactory) -> Mistakes:
    found = Mistakes(world, tmp_path_factory.mktemp("mistakes"), {})
    found.call("good", "--save_dir", str(found.good_run), "--micro_batch_size", "16")
    good = [sys.executable, "train.py", *found.calls.pop("good")]
    assert "Traceback" not in call(good).stderr
    spoil_data(found)
    spoil_models(found)
    spoil_checkpoints(found)
    more = ["--micro_batch_size", "16", "--max_steps", "3"]
    found.call("other-seed", "--load_checkpoint", str(found.checkpoint), "--seed", "7", *more)
    return found


@pytest.fixture(scope="module")
def results(mistakes: Mistakes) -> dict[str, tuple[int | str, str]]:
    listing = mistakes.out / "calls.json"
    listing.write_text(json.dumps(mistakes.calls), encoding="utf-8")
    done = run_group("tests/integration/error_worker.py", str(listing), processes=1)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_call_is_expected(mistakes: Mistakes) -> None:
    assert mistakes.calls.keys() == {*EXPECTED, "other-seed"}


def test_another_order_of_the_data_is_a_warning(
    mistakes: Mistakes, results: dict[str, tuple[int | str, str]]
) -> None:
    """What was trained on is counted in the new order, so rows may come twice, or not at all."""
    code, said = results["other-seed"]
    assert code == 0, said
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: --seed")]
    assert warning.startswith("warning: --seed was 42, now 7: the order of the data is another one")
    state = json.loads((mistakes.checkpoint / "running_states.json").read_text(encoding="utf-8"))
    assert f"the first {state['samples']:,} samples are left out" in warning


@pytest.mark.parametrize("name", EXPECTED)
def test_mistake_is_one_line(
    mistakes: Mistakes, results: dict[str, tuple[int | str, str]], name: str
) -> None:
    code, said = results[name]
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.endswith(errors[0] + "\n"), "the error goes on over several lines"
    for word in EXPECTED[name]:
        assert word in errors[0]
    assert not (mistakes.out / "saved" / name).exists(), "something was written"


def check_process(flags: list[str], *words: str) -> None:
    done = call([sys.executable, "train.py", *flags], check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]


def test_process_that_finds_no_input(tmp_path: Path) -> None:
    flags = ["--pretrained", "no/model", "--dataset", "no/data", "--save_dir", str(tmp_path / "s")]
    check_process(flags, "--pretrained no/model", "--dataset no/data")
    assert not (tmp_path / "s").exists()


def test_process_that_would_mix_two_runs(mistakes: Mistakes) -> None:
    before = sorted(mistakes.good_run.rglob("*"))
    check_process(mistakes.calls["occupied"], "--save_dir", "another run")
    assert sorted(mistakes.good_run.rglob("*")) == before


def test_process_with_data_of_another_tokenizer(mistakes: Mistakes, tmp_path: Path) -> None:
    model = mistakes.copy(mistakes.world.model, "other-tokenizer")
    text = Path(__file__)
    documents = tmp_path / "text.jsonl"
    record = {"source": "", "target": text.read_text(encoding="utf-8"), "category": "en"}
    documents.write_text(json.dumps(record) + "\n", encoding="utf-8")
    tokenizer = tmp_path / "tokenizer"
    call([
        sys.executable, "colossal_llama/tokenizer/train_tokenizer.py", "--vocab_size", "400",
        "--data_input_dirs", str(documents), "--target_tokenizer_dir", str(tokenizer),
    ])  # fmt: skip
    shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    save_dir = tmp_path / "saved"
    flags = ["--pretrained", str(model), "--dataset", str(mistakes.world.pretrain)]
    check_process(
        [*flags, "--save_dir", str(save_dir)], str(model), str(mistakes.world.pretrain), "tokenizer"
    )
    assert not save_dir.exists()


def test_torchrun_does_not_silence_the_one_that_speaks(tmp_path: Path) -> None:
    """The first process may be the last to meet a mistake."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        "from colossal_llama import command\n"
        "from colossal_llama.errors import DataError\n"
        "def fail():\n"
        "    time.sleep(1 if os.environ['RANK'] == '0' else 0)\n"
        "    raise DataError('what is wrong')\n"
        "sys.exit(command.exit_code(fail))\n"
    )
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = call([*launcher, str(script)], check=False)
    assert done.returncode == 1
    assert done.stderr.count("error: what is wrong\n") == 1
