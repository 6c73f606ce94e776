"""A run writes to a directory of its own."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from colossal_llama import command, storage
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.save_dir import check_save_dir, held, run_directory

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def flags(paths: dict[str, Path], tmp_path: Path) -> list[str]:
    given = ["--pretrained", str(paths["model"]), "--dataset", str(paths["data"])]
    return [*given, "--save_dir", str(tmp_path / "run")]


def refused(flags: list[str]) -> str:
    with pytest.raises(UsageError) as found:
        check_save_dir(command.parse(TrainOptions, flags))
    return str(found.value)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model.safetensors", "a model"),
        ("tokenizer_config.json", "a model or tokenizer"),
        ("dataset_manifest.json", "a prepared dataset"),
        ("data-00000-of-00001.arrow", "a part of a dataset"),
        ("running_states.json", "a checkpoint"),
    ],
)
def test_other_peoples_directories_are_refused(
    flags: list[str], tmp_path: Path, file: str, what: str, overwrite: bool
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("{}")
    said = refused([*flags, *(["--overwrite"] if overwrite else [])])
    assert said.startswith(f"--save_dir {tmp_path / 'run'} is {what}: ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_flags_are_not_written_over_somebodys_file(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("lr: 0.1\n")
    flags += ["--config_file", str(path)]
    assert refused(flags).startswith(f"--config_file {path} exists")
    check_save_dir(command.parse(TrainOptions, [*flags, "--overwrite"]))
    storage.write_json(path, {"save_dir": "runs/first", "lr": 0.1})  # as a run leaves it
    check_save_dir(command.parse(TrainOptions, flags))


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        held(tmp_path / "runs" / "a"),
        pytest.raises(DataError, match="another run is writing to it"),
        held(tmp_path / "runs" / "a"),
    ):
        pytest.fail("both write to it")
    assert not (tmp_path / "runs").exists(), "made for nothing"
    with held(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_lock_ends_with_the_run(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error if it is still held
    os.close(descriptor)


def test_directory_of_a_run_is_not_taken_for_its_model(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "epoch-0_step-3"
    checkpoint.mkdir(parents=True)
    storage.write_json(checkpoint / "running_states.json", {})
    for path in (checkpoint, checkpoint.parent):
        assert str(checkpoint / "modeling") in (run_directory(path) or "")
    assert run_directory(tmp_path) is None
    assert run_directory(tmp_path / "absent") is None
