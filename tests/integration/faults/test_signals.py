"""A run that is asked to end, by a signal or by its time, ends with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import BIN, ROOT
from tests.integration.faults.lab import (
    AUTO,
    ENDLESS,
    STOPPED,
    Lab,
    checkpoints,
    contents,
    course,
    equals,
    metrics,
)


@pytest.mark.parametrize(
    ("ranks", "name"), [([1], "SIGTERM"), ([0, 1], "SIGTERM"), ([0], "SIGINT")]
)
def test_signal_ends_a_run_with_a_checkpoint(
    lab: Lab, straight: Path, tmp_path: Path, ranks: list[int], name: str
) -> None:
    save_dir = tmp_path / "run"
    signals = [{"do": "send", "rank": rank, "step": 3, "signals": [name]} for rank in ranks]
    done = lab.run("--save_interval 100", save_dir, *signals)
    assert done.codes == [STOPPED, STOPPED], done
    assert len(done.lines("stopped by ")) == 1
    assert list(checkpoints(save_dir)) == [3]
    equals(save_dir, straight, 3)
    assert lab.run(f"--save_interval 100 {AUTO}", save_dir).codes == [0, 0]
    equals(save_dir, straight, 8)


def test_second_ctrl_c_ends_a_run_at_once(lab: Lab, tmp_path: Path) -> None:
    done = lab.run("", tmp_path / "run", {"do": "send", "step": 3, "signals": ["SIGINT"] * 2})
    assert done.codes == [130, 130], done
    assert done.lines("interrupted")
    assert max(checkpoints(tmp_path / "run")) == 2
    assert not any("Traceback" in text for text in done.said), done


def test_run_ends_before_its_time_is_up(lab: Lab, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    done = lab.run(f"--max_time 6s {ENDLESS}", save_dir)
    assert done.codes == [STOPPED, STOPPED], done
    assert done.lines("stopped before --max_time")
    assert max(checkpoints(save_dir)) == len(metrics(save_dir)) > 1
    first, last = (save_dir / "config.json").stat().st_mtime, (save_dir / "latest").stat().st_mtime
    assert last - first < 9  # a machine may be busy


def test_a_long_step_is_not_taken_for_hung(lab: Lab, tmp_path: Path) -> None:
    """As long as its micro-batches come on."""
    plain = "--max_steps 1 --hang_timeout 2 --micro_batch_size 1 --accumulation_steps 7"
    flags = [f"{plain} --plugin {plugin}" for plugin in ("zero2", "3d --pp 2")]
    jobs = [lab.flags(own, tmp_path / str(number)) for number, own in enumerate(flags)]
    done = lab.run_all(jobs, {"do": "slow", "seconds": 0.5})
    assert done.codes == [0, 0], done
    for number in range(len(jobs)):
        (step,) = metrics(tmp_path / str(number))
        assert step["seconds"] > 3


def test_sigterm_through_torchrun(lab: Lab, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "train.py"]
    with subprocess.Popen(
        [*launcher, *lab.flags(ENDLESS, save_dir)], cwd=ROOT, stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        log = save_dir / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said  # torchrun's own, whatever the ranks' is
    assert "stopped by SIGTERM" in said
    last = max(checkpoints(save_dir))
    assert last == len(metrics(save_dir))
    again = tmp_path / "again"
    lab.run(ENDLESS, again, {"do": "send", "step": last, "signals": ["SIGTERM"]})
    assert course(save_dir) == course(again)
    ours, theirs = checkpoints(save_dir)[last], checkpoints(again)[last]
    for folder in ("modeling", "optimizer"):  # imports draw random numbers, which are others
        assert contents(ours, folder) == contents(theirs, folder)
