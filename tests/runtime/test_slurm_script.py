"""``train.example.slurm`` with stand-ins for Slurm's commands: when does it requeue?"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "train.example.slurm"

# srun runs the body; scancel passes the signal on to it; scontrol writes down what it is asked.
STAND_INS = {
    "srun": 'echo $$ > "$HERE/srun.pid"; printf "%s\\n" "$@" > "$HERE/srun.args"\n{body}',
    "scancel": '[ "$1" = --signal=TERM ] && kill -TERM "$(cat "$HERE/srun.pid")"',
    "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" > "$HERE/asked"',
}


def submit(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Starts the script as sbatch would, in an empty directory; ``srun`` does ``body``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text("#!/bin/bash\n" + text.replace("{body}", body) + "\n")
        (tools / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = {
        "SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64", "HERE": str(tmp_path),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(SCRIPT)], cwd=tmp_path, env={**os.environ, **job}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    said, errors = job.communicate(timeout=30)
    return job.returncode, said + errors


def send(tmp_path: Path, job: subprocess.Popen[str], number: signal.Signals) -> None:
    """Sends a signal to the script alone, once the training is on its way."""
    until = time.monotonic() + 10
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until, "srun was not called"
        time.sleep(0.02)
    job.send_signal(number)


STEPS = "touch $HERE/ready; while :; do sleep 0.1; done"
SAVES = f'trap "sleep 0.5; touch $HERE/saved; exit 1" TERM; {STEPS}'


@pytest.mark.parametrize("status", [0, 1])
def test_ends_as_the_training_does(tmp_path: Path, status: int) -> None:
    assert end(submit(tmp_path, f"exit {status}")) == (status, "")
    assert not (tmp_path / "asked").exists()
    given = (tmp_path / "srun.args").read_text(encoding="utf-8").splitlines()
    assert given[given.index("--rdzv_endpoint") + 1] == "node7:20123"
    assert given[given.index("--nnodes") + 1] == "2"


def test_when_the_time_is_up_it_saves_and_goes_back_to_the_queue(tmp_path: Path) -> None:
    job = submit(tmp_path, SAVES)
    send(tmp_path, job, signal.SIGUSR1)
    assert end(job) == (0, "the time is up: back into the queue\n")
    assert (tmp_path / "saved").exists(), "it did not wait for the checkpoint"
    assert (tmp_path / "asked").read_text(encoding="utf-8") == "requeue 20123\n"


def test_finished_while_the_time_was_running_out(tmp_path: Path) -> None:
    job = submit(tmp_path, f'trap "exit 0" TERM; {STEPS}')
    send(tmp_path, job, signal.SIGUSR1)
    assert end(job) == (0, "")
    assert not (tmp_path / "asked").exists()


def test_what_fails_by_itself_stays_out_of_the_queue(tmp_path: Path) -> None:
    assert end(submit(tmp_path, "exit 70"))[0] == 70
    assert not (tmp_path / "asked").exists()
