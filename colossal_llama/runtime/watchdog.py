"""Ends a training of which one rank hangs, and says which.

A rank that hangs (a stuck file system, a dead device, an endless loop) keeps all others waiting
in a collective until the process group's own timeout, minutes later, whose traceback names
nobody. Here every rank's loop says where it is:

    with Watchdog(600.0, rank, world_size, open_store()) as watchdog:
        for step in steps:
            watchdog.beat(step, "data")
            ...

A phase begins before its first wait for others: a rank that has its data and waits for the
rest to have theirs should be seen to be ahead of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from colossal_llama.runtime.beats import (
    DONE,
    RUNNING,
    THREAD_NAME,
    Beat,
    Board,
    View,
    behind,
    may_go_on,
    open_store,
    sentence,
)

__all__ = ["EXIT_HUNG", "Watchdog", "open_store"]

# EX_SOFTWARE of sysexits.h; 75 (EX_TEMPFAIL) is for a run that was asked to stop.
EXIT_HUNG = 70

# Seconds between two signs of life, at most.
LONGEST_INTERVAL = 5.0
# Signs of life that a rank may miss before it counts as silent.
MISSED = 3
# Seconds for what may itself hang at the end: a full pipe, a store that is gone.
LAST_WORDS = 5.0

# Watchdogs that this process has made: they share the store's keys, if one follows another.
_made = itertools.count()


@dataclass(frozen=True)
class _Moment:
    """The last beat, and when it was (seconds, monotonic)."""

    step: int
    visit: int
    phase: str
    time: float
    allowance: float


class Watchdog:
    """Ends this process with ``EXIT_HUNG`` when the training hangs.

    Every rank has one. When its loop has not beaten for ``timeout`` seconds, it looks who is
    behind. A rank that is behind says so, shows the Python stacks of its threads and ends, so
    that the launcher ends the job; the others give it a moment to do so, then one of each host
    says what it knows, and all of them end.

    Args:
        timeout: seconds that a phase may take; 0 or less disables the watchdog.
        rank: this process's rank of ``world_size``.
        store: a connection to the job's store that nobody else uses (``open_store``). With None
            a rank knows only of itself.
    """

    def __init__(self, timeout: float, rank: int, world_size: int, store: Any) -> None:
        self.timeout = timeout
        self._rank = rank
        self._moment = _Moment(0, 0, "start", time.monotonic(), timeout)
        self._resumed = 0.0
        self._interval = min(LONGEST_INTERVAL, timeout / 8)
        self._patience = MISSED * self._interval
        self._state = RUNNING
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._host, self._pid = socket.gethostname(), os.getpid()
        # A launcher that starts the job again may keep the store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"colossal_llama/watchdog/{attempt}/{next(_made)}"
        if world_size == 1:
            store = None
        self._knows_others = store is not None
        self._board = Board(store, prefix, rank, world_size, self._own_beat)

    def beat(self, step: int, phase: str, timeout: float | None = None) -> None:
        """The loop has come to ``phase`` of ``step``; costs a few microseconds.

        Args:
            timeout: seconds that this phase may take, where that is not the watchdog's.
        """
        last = self._moment
        visit = last.visit + (phase != last.phase) if step == last.step else 0
        allowance = self.timeout if timeout is None else timeout
        self._moment = _Moment(step, visit, phase, time.monotonic(), allowance)
        self._board.tell()

    def start(self) -> Watchdog:
        """Begins to watch; the time counts from here."""
        if self.timeout > 0:
            self._moment = replace(self._moment, time=time.monotonic())
            self._board.start(self._interval)
            self._thread = threading.Thread(target=self._watch, name=THREAD_NAME, daemon=True)
            self._thread.start()
        return self

    def close(self, state: str = DONE) -> None:
        """Stops watching. The others are told that this rank is done, or by what it failed."""
        if self._thread is not None:
            self._state = state
            self._closed.set()
            # A daemon thread that is inside the store when Python exits aborts the process.
            self._thread.join(LAST_WORDS)
            self._board.close(LAST_WORDS)
            self._thread = None

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close(DONE if kind is None else kind.__name__)

    def _own_beat(self) -> Beat:
        moment = self._moment
        seconds = time.monotonic() - max(moment.time, self._resumed)
        return Beat(
            self._host, self._pid, moment.step, moment.visit, moment.phase,
            seconds, moment.allowance, self._state,
        )  # fmt: skip

    def _watch(self) -> None:
        overdue_since: float | None = None
        woken = time.monotonic()
        while not self._closed.wait(self._interval / 2):
            before, woken = woken, time.monotonic()
            if woken - before > self._patience:
                # The process was stopped as a whole, and the loop with it: count anew.
                self._resumed = woken
            moment, own = self._moment, self._own_beat()
            if own.seconds < own.allowance:
                overdue_since = None
                self._board.look(False)
                continue
            if overdue_since is None:
                overdue_since = woken
                self._board.look(True)
            self._judge(moment, own, woken - overdue_since)

    def _judge(self, moment: _Moment, own: Beat, waited: float) -> None:
        """Ends the process if it is this rank's turn, ``waited`` seconds after its time is up."""
        # A silence of `patience` is seen after that, a round of reading and one of writing.
        ripe = self._patience + 3 * self._interval
        # Who is behind shall be the first to speak: only it can show its stacks.
        turn = 2 * ripe
        alone = View({self._rank: own}, {self._rank: 0.0}, time.monotonic())
        view = self._view(own) if self._knows_others else alone
        if waited < (turn if view is None else ripe) or self._moment is not moment:
            return
        if view is None:
            finding = sentence(alone, [self._rank], self._patience)
            self._end(f"{finding}; {_store_host()} hangs or is gone", stacks=True, asks=False)
            return
        ranks = behind(view, self._patience)
        mine = self._rank in ranks
        if (mine or waited >= turn) and not may_go_on(view, ranks, self._patience):
            self._end(sentence(view, ranks, self._patience), stacks=mine)

    def _view(self, own: Beat) -> View | None:
        """All ranks, this one as it is now; None if the store has not answered lately."""
        view = self._board.view
        if view is None or time.monotonic() - view.time > self._patience:
            return None
        beats, unchanged = {**view.beats, self._rank: own}, {**view.unchanged, self._rank: 0.0}
        return View(beats, unchanged, view.time)

    def _end(self, finding: str, *, stacks: bool, asks: bool = True) -> None:
        """Last words, if no other rank of this host (``asks``) has said them; then the end.

        They go to the file descriptor itself: the loop may hold the lock of sys.stderr.
        """
        # A progress bar leaves the cursor at its end.
        line = f"\nerror: training hangs: {finding}; exit code {EXIT_HUNG}\n"
        if not asks or _within(LAST_WORDS, lambda: self._board.claim(self._host), default=True):
            _within(LAST_WORDS, lambda: os.write(2, line.encode()))
        if stacks:
            title = f"rank {self._rank} (host {self._host}, pid {self._pid}), Python stacks:\n"
            _within(LAST_WORDS, lambda: os.write(2, (title + _stacks()).encode()))
        _within(LAST_WORDS, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        os._exit(EXIT_HUNG)


def _store_host() -> str:
    """Whose silence it is when the store does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            f"the launcher on {os.environ.get('MASTER_ADDR')}, which keeps what all ranks report,"
        )
    return "rank 0, which keeps what all ranks report,"


def _stacks() -> str:
    """Every thread's stack but ours, innermost call first, without a look at the source files:
    the file system may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "not of Python's making")
        if name.startswith(THREAD_NAME):
            continue
        lines.append(f"  thread {ident} ({name}), innermost call first:")
        for inner, number in traceback.walk_stack(frame):
            lines.append(f"    {inner.f_code.co_filename}:{number} in {inner.f_code.co_qualname}")
    return "".join(f"{line}\n" for line in lines)


def _within(seconds: float, function: Callable[[], Any], default: Any = None) -> Any:
    """``function()``, or ``default`` if it fails or takes longer than ``seconds``."""
    result = [default]

    def call() -> None:
        with contextlib.suppress(Exception):
            result[0] = function()

    thread = threading.Thread(target=call, name=f"{THREAD_NAME}-end", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0]
