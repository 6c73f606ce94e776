"""Checkpoints: what is read is what was written, and a name stands for a complete one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training import file_writer
from colossal_llama.training.checkpoint import SaveError, restore, verify
from colossal_llama.training.file_writer import FileWriter
from colossal_llama.training.state import RunningState, read_running_state
from tests.training.stand_ins import (
    LAYOUT,
    STATE,
    Optimizer,
    checkpoint_files,
    export,
    run_processes,
)

pytestmark = pytest.mark.usefixtures("process_group")


def disk_full(*arguments: Any, **settings: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def half_export(checkpoint: Path, writer: FileWriter) -> None:
    export(checkpoint, writer)
    disk_full()


def save(
    directory: Path, state: RunningState = STATE, optimizer: Optimizer | None = None,
    export: Callable[[Path, FileWriter], None] = export, *, late: bool = False,
) -> Path:  # fmt: skip
    files, writer = checkpoint_files(directory, optimizer, export), FileWriter(late=late)
    files.collect(state, writer)
    if late:
        writer.start()
    return files.publish(state, writer)


@pytest.mark.parametrize("late", [False, True])
def test_running_state_is_read_as_written(tmp_path: Path, late: bool) -> None:
    assert read_running_state(save(tmp_path, late=late)) == STATE


@pytest.mark.parametrize("late", [False, True])
def test_optimizer_continues_exactly(tmp_path: Path, late: bool) -> None:
    """So do the random numbers, which the inputs come from."""
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model)
    optimizer.train(model, 3)
    directory = save(tmp_path, optimizer=optimizer, late=late)
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


@pytest.mark.parametrize("late", [False, True])
def test_checkpoint_is_complete_and_pointed_at(tmp_path: Path, late: bool) -> None:
    directory = save(tmp_path, late=late)
    assert directory.name == "epoch-1_step-7"
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == directory.name
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {
        "modeling/model.safetensors",
        "modeling/config.json",
        "optimizer/rank-00000.safetensors",
        "optimizer/rank-00000.json",
        "rng/rank-00000.safetensors",
        "lr_scheduler",
        "running_states.json",
        "checksums.json",
    }
    listed = json.loads((directory / "checksums.json").read_text(encoding="utf-8"))
    assert listed.keys() == files - {"checksums.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"latest", directory.name}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("place", ["export", "tensors", "small files", "end"])
def test_full_disk_leaves_no_checkpoint_and_harms_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, late: bool
) -> None:
    complete, later = save(tmp_path), replace(STATE, step=8)
    if place == "tensors":
        monkeypatch.setattr(file_writer, "save_file", disk_full)
    elif place == "small files":
        monkeypatch.setattr(storage, "write_json", disk_full)
    elif place == "end":
        monkeypatch.setattr(storage, "fsync_tree", disk_full)
    with pytest.raises(SaveError, match=r"^cannot write the checkpoint: .*No space left on device"):
        save(tmp_path, later, export=half_export if place == "export" else export, late=late)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", complete.name}
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == complete.name
    verify(complete)
    monkeypatch.undo()
    assert read_running_state(save(tmp_path, later, late=late)) == later
    assert not list(tmp_path.glob(".*"))


def test_no_place_to_write_to(tmp_path: Path) -> None:
    files = checkpoint_files(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("a file", encoding="utf-8")
    with pytest.raises(SaveError, match=f"{tmp_path / 'gone'}.*: Not a directory"):
        files.collect(STATE, FileWriter())


@pytest.mark.parametrize("step", ["write_json", "fsync_tree", "replace_directory"])
def test_name_appears_after_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    seen = []

    def look(*arguments: Any, **settings: Any) -> None:
        seen.append(list(tmp_path.glob("epoch-*")) + list(tmp_path.glob("latest")))
        original(*arguments, **settings)

    original = getattr(storage, step)
    monkeypatch.setattr(storage, step, look)
    save(tmp_path)
    assert seen
    assert not any(seen)


def test_leftovers_of_a_killed_save_are_in_nobodys_way(tmp_path: Path) -> None:
    complete, killed = save(tmp_path), replace(STATE, step=8)
    files = checkpoint_files(tmp_path)
    files.collect(killed, FileWriter())
    assert list(tmp_path.glob(".epoch-*"))
    assert read_running_state(save(tmp_path, killed)) == killed
    files.collect(killed, FileWriter())
    files.remove_leftovers()
    assert not list(tmp_path.glob(".*"))
    verify(complete)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    again = replace(STATE, tokens=99)
    assert read_running_state(save(tmp_path, again)) == again
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "epoch-1_step-7"}


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_the_last_are_kept(tmp_path: Path, number: int) -> None:
    """By their steps, as numbers: 100 comes after 20."""
    found = [save(tmp_path, replace(STATE, step=step)) for step in (3, 100, 20)]
    copy = tmp_path / "epoch-1_step-9.good"  # that somebody made
    copy.mkdir()
    checkpoint_files(tmp_path).keep_last(number, found[1])
    kept = [found[1], found[2], found[0]][:number]
    assert set(tmp_path.iterdir()) == {*kept, copy, tmp_path / "latest"}
    for path in kept:
        verify(path)


def test_a_checkpoint_just_written_is_not_removed(tmp_path: Path) -> None:
    """Somebody went back to step 3, with checkpoints of later steps in the directory."""
    found = [save(tmp_path, replace(STATE, step=step)) for step in (3, 100, 20)]
    checkpoint_files(tmp_path).keep_last(1, found[2])
    assert set(tmp_path.glob("epoch-*")) == set(found[1:])


def test_every_changed_byte_and_missing_file_is_found(tmp_path: Path) -> None:
    directory = save(tmp_path)
    verify(directory)
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    assert len(paths) == 8
    for path in paths:
        data = path.read_bytes()
        for place in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            listing = path.name == "checksums.json"
            with pytest.raises(DataError, match=str(directory if listing else path)):
                verify(directory)
        path.unlink()
        with pytest.raises(DataError, match=str(path)):
            verify(directory)
        path.write_bytes(data)
    verify(directory)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "{"])
def test_checksums_that_are_none(tmp_path: Path, content: str) -> None:
    directory = save(tmp_path)
    (directory / "checksums.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"checksums\.json"):
        verify(directory)


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


def test_a_mistake_of_one_process_is_that_of_all(tmp_path: Path) -> None:
    """Whoever went on alone would wait for the others for ever."""
    first, second = run_processes("checkpoint_worker", 2, tmp_path)
    assert first == second
    assert first["saved"] == "epoch-1_step-7"
    assert "optimizer/rank-00001.safetensors" in first["files"]
    assert "rng/rank-00001.safetensors" in first["files"]
    assert first["verified"] is None
    for name in ("unwritable", "unwritable late"):
        assert first[name].startswith("SaveError: cannot write the checkpoint: ")
        assert "No space left" in first[name]
    assert first["left"] == ["epoch-1_step-7", "latest"]
    for name in ("damaged", "missing"):
        assert first[name].startswith("DataError: ")
    assert "rank-00001" in first["missing"]
    assert first["restored"].startswith("DataError: ")
    assert "rank 1's state" in first["restored"]
