"""Checkpoints: what is read is what was written, and a name stands for a complete one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training.checkpoint import (
    RunningState,
    read_running_state,
    restore,
    save_checkpoint,
)
from colossal_llama.training.plugins import Layout
from colossal_llama.training.schedule import CosineSchedule

LAYOUT = Layout(1, 0, True, True, 0, pipeline=False, sequence_multiple=1)
STATE = RunningState(
    epoch=1, step=7, samples=28, tokens=3500, world_size=1, plugin="3d", layout={"tp": 1, "pp": 1},
    mixed_precision="bf16", config_fingerprint="a1", dataset_fingerprints=["b2", "c3"],
)  # fmt: skip


class DiskFullError(Exception):
    pass


class Booster:
    """Saves a model as Booster would, or breaks off after the first bytes."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks

    def save_model(self, model: nn.Module, path: str, **settings: Any) -> None:
        Path(path, "model.safetensors").write_bytes(b"half")
        if self.breaks:
            raise DiskFullError


class Tokenizer:
    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}", encoding="utf-8")
        config = '{"add_prefix_space": null, "legacy": false}'  # as transformers writes it
        (path / "tokenizer_config.json").write_text(config, encoding="utf-8")


class Optimizer:
    """What a plugin's optimizer wrapper looks like from outside: an inner optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.optim = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(self, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 3)).square().sum().backward()
            self.optim.step()
            self.optim.zero_grad()


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(
    directory: Path, state: RunningState = STATE, *, breaks: bool = False,
    optimizer: Optimizer | None = None,
) -> Path:  # fmt: skip
    return save_checkpoint(
        directory,
        state,
        booster=Booster(breaks=breaks),
        model=None,
        optimizer=optimizer or Optimizer(nn.Linear(3, 2)),
        schedule=CosineSchedule(1.0, 2, 10),
        tokenizer=Tokenizer(),
        layout=LAYOUT,
    )


def draw() -> list[Any]:
    """The next numbers of every generator whose state a checkpoint holds."""
    return [
        torch.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.randint(2**31, size=3).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
        [random.random() for _ in range(3)],
    ]


def test_running_state_is_read_as_written(tmp_path: Path) -> None:
    assert read_running_state(save(tmp_path)) == STATE


@pytest.mark.parametrize("in_store", [False, True])
def test_random_states_are_restored_exactly(tmp_path: Path, in_store: bool) -> None:
    """Python and numpy draw normal deviates in pairs, and keep the second of each."""
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    draw()
    if not in_store:
        random.gauss(0, 1)
        np.random.standard_normal()
    assert (random.getstate()[2] is not None) == in_store
    assert bool(np.random.get_state()[3]) == in_store
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model)
    directory = save(tmp_path, optimizer=optimizer)
    wanted = draw()
    draw()
    random.seed(0)
    restore(directory, optimizer, LAYOUT)
    assert draw() == wanted


def test_optimizer_continues_exactly(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model)
    optimizer.train(model, 3)
    directory = save(tmp_path, optimizer=optimizer)
    optimizer.train(model, 2)
    resumed = nn.Linear(3, 2)
    again = Optimizer(resumed)
    restore(directory, again, LAYOUT)
    for group in again.optim.state.values():
        group["step"] = torch.tensor(float(group["step"]))  # as torch's AdamW wants it
    again.train(resumed, 2)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path)
    for other in (nn.Linear(4, 2), nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))):
        with pytest.raises(DataError, match="another model or layout"):
            restore(directory, Optimizer(other), LAYOUT)


def test_checkpoint_is_complete_and_pointed_at(tmp_path: Path) -> None:
    directory = save(tmp_path)
    assert directory.name == "epoch-1_step-7"
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == directory.name
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {
        "modeling/model.safetensors",
        "modeling/tokenizer.json",
        "modeling/tokenizer_config.json",
        "optimizer/rank-00000.safetensors",
        "rng/rank-00000.safetensors",
        "lr_scheduler",
        "running_states.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"latest", directory.name}


def test_broken_off_checkpoint_has_no_name(tmp_path: Path) -> None:
    complete = save(tmp_path)
    later = replace(STATE, step=8)
    with pytest.raises(DiskFullError):
        save(tmp_path, later, breaks=True)
    assert list(tmp_path.glob("epoch-*")) == [complete]
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == complete.name
    # What is left of it is in nobody's way.
    assert read_running_state(save(tmp_path, later)) == later
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("step", ["write_json", "fsync_tree", "replace_directory"])
def test_name_appears_after_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        assert not list(tmp_path.glob("epoch-*"))
        raise DiskFullError

    monkeypatch.setattr(storage, step, fail)
    with pytest.raises(DiskFullError):
        save(tmp_path)
    assert not list(tmp_path.glob("epoch-*"))
    assert not (tmp_path / "latest").exists()


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    again = replace(STATE, tokens=99)
    assert read_running_state(save(tmp_path, again)) == again


def test_identity_names_what_an_optimizer_state_depends_on() -> None:
    for change in (
        {"plugin": "zero2"},
        {"world_size": 2},
        {"layout": {"tp": 2, "pp": 1}},
        {"mixed_precision": "fp16"},
    ):
        assert replace(STATE, **change).identity() != STATE.identity()
    for change in ({"step": 9}, {"samples": 1}, {"tokens": 5}, {"epoch": 3}):
        assert replace(STATE, **change).identity() == STATE.identity()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "steps": 3}', '{"version": 99}'])
def test_unreadable_running_state_is_the_users_to_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "running_states.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"running_states\.json"):
        read_running_state(tmp_path)


@pytest.mark.parametrize("folder", ["optimizer", "rng"])
@pytest.mark.parametrize("missing", [False, True])
def test_damaged_rank_file_is_the_users_to_mend(tmp_path: Path, folder: str, missing: bool) -> None:
    directory = save(tmp_path)
    path = directory / folder / "rank-00000.safetensors"
    data = path.read_bytes()
    path.unlink()
    if not missing:
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{directory}: rank 0's state is missing or damaged"):
        restore(directory, Optimizer(nn.Linear(3, 2)), LAYOUT)
