"""Where a run is: read as written, found among leftovers, and told apart from other layouts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.training.state import (
    checkpoint_name,
    checkpoints,
    is_checkpoint,
    newest_checkpoint,
    read_running_state,
)
from tests.training.stand_ins import STATE


def make(directory: Path, *, complete: bool = True) -> Path:
    directory.mkdir(parents=True)
    if complete:
        storage.write_json(directory / "running_states.json", asdict(STATE))
    return directory


def test_state_is_read_as_written(tmp_path: Path) -> None:
    assert read_running_state(make(tmp_path / "any")) == STATE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2, "steps": 3}', '{"version": 99}', '{"version": 1}']
)
def test_unreadable_state_is_the_users_to_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "running_states.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"running_states\.json"):
        read_running_state(tmp_path)


def test_identity_names_what_an_optimizer_state_depends_on() -> None:
    for change in (
        {"plugin": "zero2"},
        {"world_size": 2},
        {"layout": {"tp": 2, "pp": 1}},
        {"mixed_precision": "fp16"},
        {"trained": "embeddings"},
    ):
        assert replace(STATE, **change).identity() != STATE.identity()
    for change in ({"step": 9}, {"samples": 1}, {"tokens": 5}, {"epoch": 3}, {"order": {}}):
        assert replace(STATE, **change).identity() == STATE.identity()


def test_newest_has_the_most_steps(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None
    for name in ("epoch-0_step-9", "epoch-1_step-100", "epoch-10_step-20"):
        make(tmp_path / name)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "epoch-1_step-100"
    assert [path.name for path in checkpoints(tmp_path)] == [
        "epoch-0_step-9",
        "epoch-10_step-20",
        "epoch-1_step-100",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *(".epoch-0_step-30.tmp", ".epoch-0_step-30.removed", ".epoch-0_step-30.old-17"),
        *("epoch-0_step-30.good", "epoch-0_step-30_000", "epoch-0_step-", "epoch-0_step-x"),
        *("epoch-0_step--30", "my_epoch-0_step-30", "epoch-0_step-30 "),
    ],
)
def test_leftovers_and_copies_are_not_taken(tmp_path: Path, name: str) -> None:
    make(tmp_path / name)
    assert newest_checkpoint(tmp_path) is None
    own = make(tmp_path / checkpoint_name(STATE))
    assert newest_checkpoint(tmp_path) == own
    make(tmp_path / "epoch-0_step-40", complete=False)
    assert newest_checkpoint(tmp_path) == own


def test_pointer_plays_no_part(tmp_path: Path) -> None:
    """A kill between the directory's name and the pointer costs nothing."""
    make(tmp_path / "epoch-0_step-1")
    newest = make(tmp_path / "epoch-0_step-2")
    (tmp_path / "latest").write_text("epoch-0_step-1\n", encoding="utf-8")
    assert newest_checkpoint(tmp_path) == newest


def test_content_decides_what_a_checkpoint_is(tmp_path: Path) -> None:
    assert is_checkpoint(make(tmp_path / "any name"))
    assert is_checkpoint(str(tmp_path / "any name"))
    assert not is_checkpoint(make(tmp_path / "epoch-0_step-1", complete=False))
    assert not is_checkpoint(tmp_path / "absent")
