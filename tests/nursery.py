"""Groups of processes that have imported everything before they begin.

Importing ColossalAI takes five seconds of a core, for each process and for a launcher; most of
what is tested in a group of processes takes less. Here they are forked from two that have done it
once and for all (``nursery_worker.py``). There are two because the hash seed is inherited: it has
to differ between the ranks of a group, as it does where each of them is started for itself.

The launchers themselves, and what happens before the first import is done, are the business of
the tests of real commands: the demo, the examples, the recipe and the watchdog's.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 10.0  # seconds that the others have to end once one process of a group has failed
# A machine's GPUs are not for these: the parents have looked for them, and found none.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
# What a process that is started by torchrun is told besides its rank.
LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


class Parent:
    """A process that forks others."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="nursery-"))
        self._socket = str(self._directory / "socket")
        self.process = subprocess.Popen(
            [sys.executable, "tests/nursery_worker.py", self._socket],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries say when they are imported
            text=True,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", "see what nursery_worker.py says"

    def ask(self, request: dict[str, Any], *descriptors: int) -> socket.socket:
        """A connection on which the request is answered."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._socket)
        message = (json.dumps(request) + "\n").encode()
        sent = socket.send_fds(connection, [message], descriptors)
        connection.sendall(message[sent:])
        return connection

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(self._directory)


@dataclass
class Rank:
    """A process of a group; the exit code is None until it has ended."""

    connection: socket.socket
    pid: int
    code: int | None = None


class Said(NamedTuple):
    """What the processes of a group have printed."""

    stdout: str
    stderr: str


def _parents() -> tuple[Parent, Parent]:
    """The same two every time; started at the first."""
    with _starting:
        return _started()


@functools.cache
def _started() -> tuple[Parent, Parent]:
    parents = Parent(), Parent()
    for parent in parents:
        atexit.register(parent.close)
    for parent in parents:
        parent.wait_until_ready()
    return parents


_starting, _groups = threading.Lock(), itertools.count()


def run_group(script: str, *arguments: str, processes: int = 2, timeout: float = 900) -> Said:
    """Runs a script, relative to the repository's root, as ``torchrun`` does.

    Returns what all processes have printed. If one of them fails, the others are killed a while
    later, and so is the test.
    """
    parents, first = _parents(), next(_groups)
    environment = {**os.environ, **ENVIRONMENT, **LAUNCHED, "WORLD_SIZE": str(processes)}
    request = {"script": str(ROOT / script), "arguments": list(arguments)}
    with ExitStack() as stack:
        output, errors = (stack.enter_context(_file()) for _ in range(2))
        store = stack.enter_context(parents[0].ask({}))
        environment["MASTER_PORT"] = _line(store)
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            connection = parents[(first + rank) % 2].ask(
                {**request, "environment": environment | own}, output.fileno(), errors.fileno()
            )
            stack.enter_context(connection)
            ranks.append(Rank(connection, int(_line(connection))))
        try:
            _wait(ranks, timeout)
        finally:
            _kill(ranks)
        said = [_contents(stream) for stream in (output, errors)]
    codes = [rank.code for rank in ranks]
    assert not any(codes), f"{script}: {codes}\n{said[0][-3000:]}\n{said[1][-6000:]}"
    return Said(*said)


def _wait(ranks: list[Rank], timeout: float) -> None:
    """Until all have ended, or one has failed and the others had time to."""
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.connection, selectors.EVENT_READ, rank)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(0, deadline - time.monotonic())):
                key.data.code = int(_line(key.data.connection))
                selector.unregister(key.data.connection)
                if key.data.code:
                    deadline = min(deadline, time.monotonic() + PATIENCE)


def _kill(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.code is None:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            rank.code = int(_line(rank.connection))


def _line(connection: socket.socket) -> str:
    """The next line of an answer; a parent says nothing before it is due."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        assert byte, "a process of the nursery has died"
        line += byte
    return line.decode().strip()


@contextmanager
def _file() -> Iterator[IO[bytes]]:
    """A file to which several processes append."""
    with tempfile.NamedTemporaryFile(mode="ab") as stream:
        yield stream


def _contents(stream: IO[bytes]) -> str:
    return Path(stream.name).read_text(encoding="utf-8", errors="replace")
