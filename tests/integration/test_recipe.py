"""A recipe in two processes: killed in its second stage it goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from colossal_llama.training.state import newest_checkpoint, read_running_state
from colossal_llama.training.train import EXIT_STOPPED
from tests.integration.conftest import BIN, ROOT, World, call

RECIPE = """
variables: {pretrain: null, sft: null}
plugin: zero2
mixed_precision: fp32
max_length: 512
micro_batch_size: 1
save_interval: 3
lr: 0.01
stages:
  - name: embeddings
    config: frozen.yaml
    dataset: [$pretrain/part-00000]
    max_steps: 4
  - name: all
    dataset: [$pretrain/part-00001, $pretrain/part-00002]
    lr_schedule: wsd
    max_steps: SECOND
  - name: chat
    dataset: [$sft]
    accumulation_steps: 2
    use_neft: true
    max_steps: 4
"""
NAMES = ["01-embeddings", "02-all", "03-chat"]
TRAIN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "train.py"]


def flags(world: World, folder: Path, *, second: int = 12) -> list[str]:
    """Flags of a recipe that is written to ``folder``, and saved there."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SECOND", str(second)), encoding="utf-8")
    (folder / "frozen.yaml").write_text("freeze_non_embeds_params: true\n", encoding="utf-8")
    return [
        *["--config", str(recipe), "--pretrained", str(world.model)],
        *["--pretrain", str(world.pretrain), "--sft", str(world.sft)],
        *["--save_dir", str(folder / "runs")],
    ]


def last(folder: Path, name: str) -> Path:
    checkpoint = newest_checkpoint(folder / "runs" / name)
    assert checkpoint is not None
    return checkpoint


def kill_in_second_stage(command: list[str], folder: Path) -> None:
    """Kills a run, its workers too, once the second stage has saved a checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = folder / "killed.txt"
    with said.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 400
            while newest_checkpoint(folder / "runs" / NAMES[1]) is None:
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                for pid in (*children(process.pid), process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """An uninterrupted recipe, one that was killed and called again, and what the last said."""
    root = tmp_path_factory.mktemp("recipes")
    straight, killed = root / "straight", root / "killed"
    call([*TRAIN, *flags(world, straight)])
    command = [*TRAIN, *flags(world, killed)]
    kill_in_second_stage(command, killed)
    state = read_running_state(last(killed, NAMES[1]))
    assert not state.finished, "killed too late: give the second stage more steps"
    assert newest_checkpoint(killed / "runs" / NAMES[2]) is None
    return straight, killed, call(command).stderr


def test_stages_follow_each_other(folders: tuple[Path, Path, str]) -> None:
    straight, _, _ = folders
    for name, steps in zip(NAMES, (4, 12, 4), strict=True):
        state = read_running_state(last(straight, name))
        assert (state.step, state.finished) == (steps, True)
    # The loss of a stage's first step is that of the weights the stage before it has left.
    losses = {name: metrics(straight / "runs" / name) for name in NAMES}
    assert losses[NAMES[1]][0]["loss"] < losses[NAMES[0]][0]["loss"]
    rates = [line["learning_rate"] for line in losses[NAMES[1]]]
    assert rates[0] == 0.01, "warmed up anew"
    frozen = load(last(straight, NAMES[0]) / "modeling")
    for name, tensor in load(last(straight, NAMES[1]) / "modeling").items():
        assert not torch.equal(tensor, frozen[name]), name


def test_a_killed_recipe_ends_with_the_same_bits(folders: tuple[Path, Path, str]) -> None:
    straight, killed, said = folders
    assert "stage 1 of 3, 01-embeddings: finished, skipped" in said
    assert "stage 2 of 3, 02-all: goes on from" in said
    assert "changed settings" not in said
    assert "stage 3 of 3, 03-chat: starts from" in said
    for name in NAMES:
        assert last(straight, name).name == last(killed, name).name
        for folder in ("modeling", "optimizer", "rng"):
            wanted, found = load(last(straight, name) / folder), load(last(killed, name) / folder)
            assert wanted.keys() == found.keys()
            for key, tensor in wanted.items():
                assert torch.equal(tensor, found[key]), (name, folder, key)


def test_a_finished_recipe_is_left_alone(folders: tuple[Path, Path, str], world: World) -> None:
    straight, _, _ = folders
    before = {path: path.stat().st_mtime_ns for path in (straight / "runs").rglob("*")}
    done = call([str(BIN / "colossal-llama"), "train", *flags(world, straight)])
    assert done.stderr.count("finished, skipped") == 3
    assert {path: path.stat().st_mtime_ns for path in (straight / "runs").rglob("*")} == before


def test_mistakes_of_all_stages_are_one_line(world: World, tmp_path: Path) -> None:
    given = flags(world, tmp_path)
    given[given.index("--sft") + 1] = "no/chat"
    done = call([*TRAIN, *given, "--tp", "2"], check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "03-chat: --dataset no/chat: not found" in errors[0]
    assert errors[0].count("--tp needs --plugin 3d") == 1
    assert not (tmp_path / "runs").exists()


def test_tiny_recipe_stops_in_time_and_goes_on(world: World, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    for name, target in (("init", world.model), ("data", world.pretrain), ("sft-data", world.sft)):
        (demo / name).symlink_to(target)
    command = [str(BIN / "colossal-llama"), "train", "--config", "configs/recipes/tiny.yaml"]
    command += ["--demo", str(demo), "--max_length", "512", "--max_steps", "2"]
    stopped = call([*command, "--max_time", "1s"], check=False)
    assert stopped.returncode == EXIT_STOPPED, stopped.stderr
    assert "stage 1 of 3, 01-embeddings: stopped; the same command goes on" in stopped.stderr
    done = call(command)
    assert "stage 1 of 3, 01-embeddings: goes on from" in done.stderr
    assert "all 3 stages are finished" in done.stderr


def metrics(save_dir: Path) -> list[dict[str, float]]:
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by file and name."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
