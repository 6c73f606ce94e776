"""The data of a run: verified once a machine, refused by all processes, in the order asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama import command
from colossal_llama.dataset.writer import ARROW_FILE
from colossal_llama.errors import DataError
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.data import build_sampler, describe_mixture, open_rows
from tests.dataset.made_parts import some_rows, write_dataset, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(paths: dict[str, Path], tmp_path: Path) -> Path:
    """What passes for a model, with a tokenizer."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    tokenizer.rename(paths["model"] / "tokenizer.json")
    return paths["model"]


def open_in_processes(store: Path, local_ranks: list[int], flags: list[str]) -> list[list[str]]:
    """Opens data with a group of processes; returns the lines that each of them prints."""
    processes = []
    for rank, local_rank in enumerate(local_ranks):
        environment = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": len(local_ranks)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "tests/training/data_worker.py", str(store), *flags],
                cwd=ROOT,
                env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(local_ranks)
    return said


def test_data_is_verified_by_one_process_of_a_machine(model: Path, tmp_path: Path) -> None:
    output = write_dataset(tmp_path / "out", model, [some_rows(300), some_rows(20, 1)])
    flags = ["--pretrained", str(model), "--dataset", str(output), "--verify_data", "full"]
    said = open_in_processes(tmp_path / "store-1", [0, 1, 0], flags)
    assert said == [["320", f"hashed {files}"] for files in (2, 0, 2)]
    path = output / "part-00001" / ARROW_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = open_in_processes(tmp_path / "store-2", [0, 1], flags)
    assert [lines[1] for lines in said] == ["hashed 2", "hashed 0"]
    for lines in said:
        assert lines[0].startswith(f"error: {path}: SHA-256 ")


def test_weights_and_order_are_those_of_the_flags(model: Path, tmp_path: Path) -> None:
    parts = [some_rows(300), some_rows(20, 1), []]
    output = write_dataset(tmp_path / "out", model, parts)
    names = [str(output / f"part-0000{number}") for number in range(3)]

    def options(*flags: str) -> TrainOptions:
        return command.parse(TrainOptions, ["--pretrained", str(model), "--dataset", *flags])

    weighted = options(*names[:2], "--dataset_weights", "0.75,0.25", "--num_epochs", "2")
    rows = open_rows(weighted)
    assert describe_mixture(weighted, rows, 640) == [
        f"{names[0]}: 75.0% of the samples, 1.60 epochs of 300 rows",
        f"{names[1]}: 25.0% of the samples, 8.00 epochs of 20 rows",
    ]
    batch = build_sampler(weighted, rows, 1000).batch(0)
    assert sum(row >= 300 for row in batch) == 250
    for flags, early in (([], 0), (["--data_order", "shuffled"], 1)):
        plain = options(*names, *flags)
        assert describe_mixture(plain, rows, 640) == []
        batch = build_sampler(plain, open_rows(plain), 320).batch(0)
        assert sorted(batch) == list(range(320))
        assert any(row >= 300 for row in batch[:300]) == early
    with pytest.raises(DataError, match=f"^{names[2]} has no rows, but a share in --dataset_wei"):
        open_rows(options(*names, "--dataset_weights", "0.5,0.3,0.2"))
