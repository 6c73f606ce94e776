"""SIGKILL at any moment of a save: the next run goes on as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.integration.faults.lab import (
    AUTO,
    FULL_LENGTH,
    LAST,
    STOPPED,
    Lab,
    Outcome,
    checkpoints,
    equals,
    survivors,
)


def moments(operations: list[str]) -> list[int]:
    """Numbers, from 1, of operations of a save to be killed at."""
    numbers = {1, len(operations), *range(3, len(operations), max(1, len(operations) // 6))}
    # What gives a checkpoint its name, what points at it, what takes an old one's name away.
    named = [n for n, text in enumerate(operations, 1) if _renames(text)]
    assert len(named) in (0, 3), named
    return sorted(numbers | {n + later for n in named for later in (0, 1)})


def _renames(operation: str) -> bool:
    return operation.startswith("os.rename") and ".tmp/" not in operation


def last_save(listing: Path) -> list[str]:
    lines = listing.read_text(encoding="utf-8").splitlines()
    newest = max(
        line.partition("step-")[2].partition(".tmp")[0] for line in lines if ".tmp/" in line
    )
    first = next(n for n, line in enumerate(lines) if f"step-{newest}.tmp/" in line)
    return lines[first:]


def lost_its_peer(done: Outcome, rank: int) -> None:
    """The rank ended by itself, and said in one line why."""
    assert done.codes[rank] == 1, done
    (line,) = done.lines("error: ")
    assert line.startswith(f"error: rank {rank} on {socket.gethostname()} lost the connection")
    assert "Traceback" not in done.said[rank], done


@pytest.mark.parametrize("mode", ["", "--async_save"])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_any_moment_of_a_save(lab: Lab, straight: Path, victim: int, mode: str) -> None:
    """Each run resumes from what the kill before left, so all of them have to be harmless."""
    save_dir = lab.root / f"killed-{victim}{mode}"
    flags = f"{AUTO} {FULL_LENGTH} --keep_last 2 {mode}"
    listing = lab.root / f"operations-{victim}{mode}"
    watch = {"do": "list_operations", "rank": victim, "to": str(listing)}
    stop = {"do": "send", "step": 3, "signals": ["SIGTERM"]}
    done = lab.run(flags, save_dir, watch, stop)
    assert done.codes == [STOPPED, STOPPED], done
    newest = survivors(save_dir, straight)
    for number in moments(last_save(listing)):
        kill = {"do": "kill_in_save", "rank": victim, "operation": number}
        done = lab.run(flags, save_dir, kill)
        assert done.codes[victim] == -signal.SIGKILL, done
        lost_its_peer(done, 1 - victim)
        before, newest = newest, survivors(save_dir, straight)
        assert newest >= before
    assert newest < LAST, "no step was left to be killed in"
    assert lab.run(flags, save_dir).codes == [0, 0]
    assert survivors(save_dir, straight) == LAST
    equals(save_dir, straight, LAST)
    assert not list(save_dir.glob(".*")), "leftovers"


@pytest.mark.parametrize("mode", ["", "--async_save"])
def test_killed_in_the_midst_of_a_file(lab: Lab, straight: Path, mode: str, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    kill = {"do": "kill_in_write", "rank": 1, "step": 3, "bytes": 500_000}
    done = lab.run(mode, save_dir, kill)
    assert done.codes[1] == -signal.SIGXFSZ, done
    lost_its_peer(done, 0)
    # What was begun in step 2 may be on its way to the disk still.
    assert max(checkpoints(save_dir)) in ((1, 2) if mode else (2,))
    assert lab.run(f"{mode} {AUTO}", save_dir).codes == [0, 0]
    equals(save_dir, straight, 8)
    assert not list(save_dir.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "step"), [("--overwrite", 1), ("--load_checkpoint {}/epoch-0_step-2", 3)]
)
def test_stopped_run_is_not_mistaken_for_the_one_before(
    lab: Lab, straight: Path, tmp_path: Path, flags: str, step: int
) -> None:
    """That has more steps: it was overwritten, or gone back from."""
    save_dir = tmp_path / "run"
    for number in (2, 4):
        path = checkpoints(straight)[number]
        shutil.copytree(path, save_dir / path.name)
    flags = f"{FULL_LENGTH} {flags.format(save_dir)}"
    done = lab.run(flags, save_dir, {"do": "send", "step": step, "signals": ["SIGTERM"]})
    assert done.codes == [STOPPED, STOPPED], done
    assert (save_dir / "latest").read_text() == f"epoch-0_step-{step}\n"
    assert (save_dir / "epoch-0_step-4.set-aside-1").is_dir()
    assert survivors(save_dir, straight) == step
    done = lab.run(AUTO, save_dir, {"do": "send", "step": step + 1, "signals": ["SIGTERM"]})
    assert done.lines(f"loading {save_dir}/epoch-0_step-{step}/modeling")
