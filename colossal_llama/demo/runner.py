"""Runs a list of commands one after the other, remembers which are done, and measures them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colossal_llama import __version__
from colossal_llama.errors import ColossalLlamaError, DataError
from colossal_llama.storage import read_json, write_json

POLL_SECONDS = 0.5
_LOG_LINES_SHOWN = 15
_LAUNCHER = re.compile(r"[WE]\d{4} .*(Sending process|failed \(exitcode)")
# The launcher passes the environment on as `export NAME="value"` in a shell command.
_BREAKS_EXPORT = set('"$`\\\n')


class StageError(ColossalLlamaError):
    """A stage's command did not succeed."""


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    ``command`` is run in, and ``outputs`` are relative to, the repository's root; the outputs
    are what the command writes, and are removed before it runs again. ``SAVE_DIR/{latest}`` in
    the command stands for the newest checkpoint of a run that an earlier stage made.
    """

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(self.command)

    @property
    def fingerprint(self) -> str:
        """Changes with the command line, our version and Python's (whose text we train on)."""
        identity = [*self.command, __version__, platform.python_version()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def run_stages(stages: Sequence[Stage], out: Path, root: Path) -> list[dict[str, Any]]:
    """Runs what is not done yet; once one stage has run, all that follow it run again.

    A stage is done when ``out/stages/<name>.json`` was written by the same command and its
    outputs are there. Its log is ``out/logs/<name>.log``.

    Returns:
        Per stage: name, title, command, fingerprint, seconds, peak_rss_bytes, kept.

    Raises:
        StageError: a command exited with another code than 0.
    """
    from tqdm import tqdm

    records = []
    stale = False
    # Where nobody watches a line rewrite itself, a log does not need it twice a second.
    interval = POLL_SECONDS if sys.stderr.isatty() else 60
    with tqdm(total=len(stages), bar_format=_BAR, mininterval=interval, miniters=0) as bar:

        def show(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update(0)

        for planned in stages:
            stage = resolved(planned, root)
            bar.set_description_str(stage.title, refresh=False)
            marker = out / "stages" / f"{stage.name}.json"
            record = None if stale else _finished(stage, marker, root)
            stale = record is None
            if record is None:
                record = run_stage(stage, out, root, show)
                write_json(marker, record)
            records.append({**record, "kept": not stale})
            bar.set_postfix_str("done" if stale else "kept from before", refresh=False)
            bar.update()
            bar.refresh()
    return records


def resolved(stage: Stage, root: Path) -> Stage:
    """The stage with every ``{latest}`` replaced by what the run's file ``latest`` names."""
    return replace(stage, command=tuple(resolved_word(word, root) for word in stage.command))


def resolved_word(word: str, root: Path) -> str:
    """One word of a command, likewise; it may hold several paths, separated by commas."""

    def name_checkpoint(match: re.Match[str]) -> str:
        latest = (root / match[1] / "latest").read_text(encoding="utf-8").strip()
        return f"{match[1]}/{latest}"

    return re.sub(r"([^,]+)/{latest}", name_checkpoint, word)


_BAR = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed} {desc}{postfix}"


def _finished(stage: Stage, marker: Path, root: Path) -> dict[str, Any] | None:
    try:
        record = read_json(marker)
    except DataError:
        return None
    same = isinstance(record, dict) and record.get("fingerprint") == stage.fingerprint
    return record if same and all((root / path).exists() for path in stage.outputs) else None


def run_stage(stage: Stage, out: Path, root: Path, show: Any) -> dict[str, Any]:
    """Runs one command to its end, passing the last line of its output to ``show``."""
    marker = out / "stages" / f"{stage.name}.json"
    marker.unlink(missing_ok=True)
    for path in stage.outputs:
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink(missing_ok=True)
    log = out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, peak = time.monotonic(), 0
    with log.open("wb") as stream, _child(stage, root, stream) as child:
        while child.poll() is None:
            peak = max(peak, _tree_rss(child.pid))
            show(_last_line(log))
            try:
                child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    if child.returncode != 0:
        raise StageError(_failure(stage, child.returncode, log))
    return {
        "name": stage.name,
        "title": stage.title,
        "command": stage.line,
        "fingerprint": stage.fingerprint,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak,
    }


@contextmanager
def _child(stage: Stage, root: Path, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the command; whatever happens, none of its processes outlives the block."""
    program = sys.executable if stage.command[0] == "python" else stage.command[0]
    environment = child_environment()
    path = shutil.which(program, path=environment["PATH"])
    if path is None:
        raise StageError(f"{program} is not installed beside {sys.executable}")
    child = subprocess.Popen(
        [path, *stage.command[1:]],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            _end(child)


def child_environment() -> dict[str, str]:
    """Ours, with the programs of this Python first, and without what would break the launcher."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.isidentifier() and not _BREAKS_EXPORT & set(value)
    }
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    # Two processes on two CPU cores, wherever it runs: one GPU could not serve both.
    environment["CUDA_VISIBLE_DEVICES"] = "-1"
    return environment


def _end(child: subprocess.Popen[bytes]) -> None:
    import psutil

    try:
        parent = psutil.Process(child.pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        _signal(process.kill)
    child.wait()


def _signal(send: Any) -> None:
    import psutil

    try:
        send()
    except psutil.NoSuchProcess:
        return


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants; pages they share count for each."""
    import psutil

    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue  # it ended meanwhile
    except psutil.Error:
        return 0
    return total


def _last_line(log: Path) -> str:
    """What a terminal would show last: the text after the last line end or carriage return."""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1000))
        lines = stream.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    shown = [line.strip() for line in lines if line.strip()]
    return shown[-1][:60] if shown else ""


def _failure(stage: Stage, code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    # What the launcher adds after a process has failed is long and says nothing about why.
    told = itertools.takewhile(lambda line: not _LAUNCHER.match(line), lines)
    tail = [line for line in told if line.strip()][-_LOG_LINES_SHOWN:]
    print("\n".join(["", *tail]), file=sys.stderr)
    return (
        f"stage {stage.name} ({stage.title}) ended with exit code {code}; its whole output is in "
        f"{log}; run the same command again to continue from this stage"
    )
