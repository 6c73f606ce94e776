"""How runs begin, and begin again: with the weights they were given, and enough data."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from tests.integration.faults.lab import AUTO, Lab, checkpoints, course, one_error


def config(save_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((save_dir / "config.json").read_text(encoding="utf-8"))
    return found


def test_a_stage_killed_before_its_first_save_begins_with_the_same_weights(
    lab: Lab, straight: Path, tmp_path: Path
) -> None:
    weights = checkpoints(straight)[4] / "modeling"
    flags, load = "--max_steps 3", f"--load_checkpoint {weights}"
    assert lab.run(f"{flags} {load}", tmp_path / "straight").codes == [0, 0]
    wanted = course(tmp_path / "straight")
    assert wanted != course(straight)

    save_dir = tmp_path / "run"
    kill = {"do": "kill_in_save", "rank": 0, "operation": 3}
    assert -signal.SIGKILL in lab.run(f"{flags} {load}", save_dir, kill).codes
    assert not checkpoints(save_dir)
    for stop in (2, 3):  # once from the weights, once from a checkpoint
        fault = {"do": "send", "step": stop, "signals": ["SIGTERM"]}
        done = lab.run(f"{flags} {AUTO}", save_dir, fault)
        assert done.lines(f"loading {weights if stop == 2 else checkpoints(save_dir)[2]}"), done
    assert course(save_dir) == wanted

    # What is written there runs the whole of it again.
    assert config(save_dir)["load_checkpoint"] == str(weights)
    again = lab.run(f"--config {save_dir / 'config.json'} {flags}", tmp_path / "again")
    assert again.codes == [0, 0], again
    assert course(tmp_path / "again") == wanted

    # Nor does a call that trains nothing, or one that began anew, change that.
    written = config(save_dir)
    done = lab.run(f"{flags} {AUTO} --lr 0.5", save_dir)
    assert done.codes == [0, 0], done
    assert done.lines("warning: ") == ["warning: goes on with changed settings: lr 0.01 -> 0.5"]
    assert config(save_dir) == written
    assert lab.run(f"{flags} {load} --overwrite", save_dir).codes == [0, 0]
    assert config(save_dir) == written

    shutil.rmtree(checkpoints(save_dir)[1])
    for path in checkpoints(save_dir).values():
        shutil.rmtree(path)
    moved = json.dumps({**written, "load_checkpoint": str(tmp_path / "gone")})
    (save_dir / "config.json").write_text(moved, encoding="utf-8")
    one_error(lab.run(f"{flags} {AUTO}", save_dir), str(tmp_path / "gone"), "is gone")


def test_damaged_weights_are_no_beginning(lab: Lab, straight: Path, tmp_path: Path) -> None:
    start = shutil.copytree(checkpoints(straight)[4], tmp_path / "epoch-0_step-4")
    (path,) = (start / "modeling").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = lab.run(f"--load_checkpoint {start / 'modeling'}", tmp_path / "run")
    one_error(done, str(path), "damaged")


def test_every_epoch_is_saved(lab: Lab, tmp_path: Path) -> None:
    """Of a run whose length is told in steps, too."""
    flags = "--micro_batch_size 42 --max_steps 7 --save_interval 0"  # 252 rows
    assert lab.run(flags, tmp_path / "run").codes == [0, 0]
    names = sorted(path.name for path in checkpoints(tmp_path / "run").values())
    assert names == ["epoch-1_step-3", "epoch-2_step-6", "epoch-2_step-7"]


def test_a_step_has_no_row_twice(lab: Lab, tmp_path: Path) -> None:
    done = lab.run("--micro_batch_size 127 --max_steps 2", tmp_path / "run")
    one_error(done, "--dataset has 252 rows, fewer than the 254 of one step")


def test_names_are_looked_for_before_anything_is_loaded(lab: Lab, tmp_path: Path) -> None:
    for flags, words in (
        ("--freeze modle.*", "--freeze modle.*: no parameter has such a name"),
        ("--lora_rank 4 --lora_modules q_porj", "--lora_modules q_porj: the layers have"),
    ):
        done = lab.run(flags, tmp_path / "run")
        one_error(done, words)
        assert not done.lines("loading "), done


def test_a_warm_up_is_within_the_run(lab: Lab, tmp_path: Path) -> None:
    flags = lab.flags("--num_epochs 1 --warmup_steps 64", tmp_path / "run")
    place = flags.index("--max_steps")
    del flags[place : place + 2]
    one_error(lab.run_all([flags]), "--warmup_steps 64 is more than the run's 63 steps")
