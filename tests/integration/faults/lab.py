"""The other end of ``worker.py``: runs cases, and looks at what they left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.conftest import ROOT, World

Fault = dict[str, Any]
LAST = 16  # step of the run that meets no fault
FULL_LENGTH = f"--max_steps {LAST}"
ENDLESS = "--max_steps 100000 --num_epochs 9999 --save_interval 0"
AUTO = "--load_checkpoint auto"
STOPPED = 75
METRICS = ("loss", "grad_norm", "learning_rate", "tokens")


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a case ended (a signal's code is negative), and what each printed."""

    codes: list[int]
    hung: list[int]
    said: list[str]

    def __post_init__(self) -> None:
        assert not self.hung, f"ranks hang: {self.hung}\n{self}"
        # Now and then the threads of a process group abort a process at its exit.
        assert not self.lines("left behind: "), f"{self}"

    def __str__(self) -> str:
        return "".join(f"--- rank {r}:\n{text[-4000:]}\n" for r, text in enumerate(self.said))

    def lines(self, beginning: str) -> list[str]:
        """What ranks said that begins like this, progress bars aside."""
        every = [line for text in self.said for line in text.replace("\r", "\n").splitlines()]
        return [line for line in map(str.strip, every) if line.startswith(beginning)]


class Lab:
    """A process that forks trainings.

    Where the system allows it, the process has a small disk of its own, which it sees as
    ``disk_inside`` and others as ``disk``, and one that is ``read_only``: None elsewhere.
    """

    DISK_SIZE = 24 << 20  # bytes; a checkpoint has 2.2 MB

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root
        self._cases = 0
        mount, read_only = root / "disk", root / "read-only"
        mount.mkdir()
        read_only.mkdir()
        worker = [sys.executable, "tests/integration/faults/worker.py"]
        in_own_space = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
        make_disk = (
            f"mount -t tmpfs -o size={self.DISK_SIZE} none {mount}; "
            f"mount -t tmpfs -o ro none {read_only}"
        )
        may_mount = (
            shutil.which("unshare")
            and not subprocess.run([*in_own_space, make_disk], capture_output=True).returncode
        )
        if may_mount:
            worker = [*in_own_space, f'{make_disk}; exec "$@"', "sh", *worker]
        self._process = subprocess.Popen(
            worker,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask() == "ready"
        self.disk_inside = mount if may_mount else None
        self.read_only = read_only if may_mount else None
        self.disk = Path(f"/proc/{self._process.pid}/root{mount}") if may_mount else None

    def _ask(self, question: str = "") -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question)
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)

    def flags(self, flags: str, save_dir: Path) -> list[str]:
        """Flags of ``train.py``; those given come after, so that they win."""
        return [
            *["--pretrained", str(self.world.model), "--dataset", str(self.world.pretrain)],
            *["--plugin", "zero2", "--mixed_precision", "bf16", "--micro_batch_size", "2"],
            *["--lr", "0.01", "--lr_schedule", "constant", "--warmup_steps", "1"],
            *["--save_interval", "1", "--max_steps", "8", "--save_dir", str(save_dir)],
            *flags.split(),
        ]

    def run(self, flags: str, save_dir: Path, *faults: Fault, ranks: int = 2) -> Outcome:
        """Runs one training."""
        return self.run_all([self.flags(flags, save_dir)], *faults, ranks=ranks)

    def run_all(self, jobs: list[list[str]], *faults: Fault, ranks: int = 2) -> Outcome:
        """Runs trainings one after the other in one group of processes."""
        self._cases += 1
        out = self.root / f"case-{self._cases:03d}"
        out.mkdir()
        case = {"out": str(out), "ranks": ranks, "jobs": jobs, "faults": faults}
        answer = json.loads(self._ask(json.dumps(case) + "\n"))
        said = [(out / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in range(ranks)]
        return Outcome(answer["codes"], answer["hung"], said)


def checkpoints(save_dir: Path) -> dict[int, Path]:
    """The checkpoints by their steps."""
    found = [path for path in save_dir.glob("epoch-*_step-*") if not path.suffix]
    return {int(path.name.split("step-")[1]): path for path in found}


def contents(directory: Path, *folders: str) -> dict[str, bytes]:
    """All files of a checkpoint, or of some of its folders."""
    paths = [path for folder in folders or [""] for path in (directory / folder).rglob("*")]
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths if p.is_file()}


def learnt(checkpoint: Path) -> dict[str, bytes]:
    """The files with weights, moments and random states."""
    found = contents(checkpoint, "modeling", "optimizer", "rng")
    assert len(found) > 6
    return found


def metrics(save_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


def course(save_dir: Path) -> dict[int, list[Any]]:
    """What each step measured that does not depend on the machine; no step comes twice."""
    lines = metrics(save_dir)
    found = {line["step"]: [line[name] for name in METRICS] for line in lines}
    assert len(found) == len(lines), "a step is there twice"
    return found


def equals(save_dir: Path, straight: Path, last: int) -> None:
    """The run ended with step ``last``, as if nothing had happened to it."""
    found, wanted = checkpoints(save_dir), checkpoints(straight)
    assert max(found) == last
    assert learnt(found[last]) == learnt(wanted[last])
    steps = course(straight)
    assert course(save_dir) == {step: steps[step] for step in range(1, last + 1)}


def survivors(save_dir: Path, straight: Path) -> int:
    """The newest of the checkpoints, which have to be there and complete, to the byte."""
    found, wanted = checkpoints(save_dir), checkpoints(straight)
    for step, path in found.items():
        assert contents(path) == contents(wanted[step]), path
    assert found, "no checkpoint is left"
    return max(found)


def one_error(done: Outcome, *words: str) -> str:
    """All ranks ended with exit code 2, and one of them said why, in one line."""
    assert set(done.codes) == {2}, done
    (line,) = done.lines("error: ")
    for word in words:
        assert word in line
    assert not any("Traceback" in text for text in done.said), done
    return line
