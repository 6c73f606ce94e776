"""Where every rank's loop stands: written to a c10d store by each, read by who waits too long.

The store is reached over a connection of the watchdog's own. The process group's connection is
locked while the main thread waits in it, and a rank that hangs while groups are being made
keeps all others waiting there. Under ``torchrun`` and ``colossalai run`` the server is in the
launcher of the first machine, so it outlives any rank; without them it is in rank 0.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

RUNNING, DONE = "running", "done"
THREAD_NAME = "watchdog"
# Seconds between two publications, at least.
SHORTEST = 0.25
# Ranks that one line names; a whole machine may be behind.
NAMED = 4


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    ``visit`` counts the phases that the loop has entered since the step began: all ranks run
    the same loop, so (step, visit) tells who is ahead without a list of phases. ``state`` is
    "running", "done", or the name of the exception by which the loop was left.
    """

    host: str
    pid: int
    step: int
    visit: int
    phase: str
    seconds: float  # in this phase, at the time of publication
    allowance: float  # seconds that this phase may take
    state: str = RUNNING
    published: float = 0.0  # seconds since the epoch, by the clock of the rank's own host
    number: int = 0  # counts publications: one that does not change is a rank that is silent

    @property
    def position(self) -> tuple[int, int]:
        return self.step, self.visit

    @property
    def failed(self) -> bool:
        return self.state not in (RUNNING, DONE)


@dataclass(frozen=True)
class View:
    """The ranks, as they were read at ``time`` (seconds, monotonic).

    ``beats[rank]`` is None for a rank that has published nothing; ``unchanged[rank]`` is for
    how many seconds the reader has waited for the next sign of life.
    """

    beats: dict[int, Beat | None]
    unchanged: dict[int, float]
    time: float

    def is_silent(self, rank: int, patience: float) -> bool:
        """Whether a rank that should publish has not done so for ``patience`` seconds."""
        beat = self.beats[rank]
        return beat is not None and beat.state == RUNNING and self.unchanged[rank] >= patience

    def silence(self, rank: int) -> float:
        """Seconds since the last sign of life: at least what was waited here, and what the
        clocks of the two hosts say, which may differ."""
        beat = self.beats[rank]
        assert beat is not None
        return max(self.unchanged[rank], time.time() - beat.published)


def open_store(timeout: float = 10.0) -> Any:
    """A connection to the store of the launcher's MASTER_ADDR and MASTER_PORT.

    None where nothing answers there within ``timeout`` seconds, or without these variables.
    """
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
    except (KeyError, ValueError, DistError):
        return None


class Board:
    """Publishes this rank's beat and, on request, reads all, in a thread that may block.

    A store whose host is stopped answers no read, ever: whoever decides has to be another
    thread, and looks at ``view``.
    """

    def __init__(
        self, store: Any, prefix: str, rank: int, world_size: int, own: Callable[[], Beat]
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._keys = [f"{prefix}/{other}" for other in range(world_size)]
        self._rank = rank
        self._own = own
        self._looking = threading.Event()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = 0
        self._changes: dict[int, tuple[int, float]] = {}  # rank: (last number, when first seen)
        self.view: View | None = None

    def start(self, interval: float) -> None:
        """Publishes every ``interval`` seconds from now on, and when there is news."""
        if self._store is not None:
            self._thread = threading.Thread(
                target=self._run, args=(interval,), name=f"{THREAD_NAME}-store", daemon=True
            )
            self._thread.start()

    def tell(self) -> None:
        """There is news of this rank; never blocks."""
        self._news.set()

    def look(self, wanted: bool) -> None:
        """Whether to read the others, too; ``view`` is None until they are read."""
        if wanted:
            self._looking.set()
        elif self._looking.is_set():
            self._looking.clear()
            self.view = None

    def claim(self, name: str) -> bool:
        """Whether nobody claimed ``name`` before. May block as long as the store does."""
        return self._store is None or self._store.add(f"{self._prefix}/claimed/{name}", 1) == 1

    def close(self, seconds: float) -> None:
        """Publishes the last beat and ends, or gives up after ``seconds``."""
        self._closed.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, interval: float) -> None:
        # RuntimeError: the server is gone. Who has to decide then finds no view.
        try:
            while not self._closed.is_set():
                self._publish()
                if self._looking.is_set():
                    self.view = self._read()
                else:
                    self._changes.clear()
                # A loop may beat many times a second; its last beat counts.
                self._closed.wait(min(SHORTEST, interval / 2))
                self._news.wait(interval / 2)
                self._news.clear()
            self._publish()
        except RuntimeError:
            self.view = None

    def _publish(self) -> None:
        self._number += 1
        beat = {**asdict(self._own()), "published": time.time(), "number": self._number}
        self._store.set(self._keys[self._rank], json.dumps(beat))

    def _read(self) -> View:
        ranks = range(len(self._keys))
        present = list(ranks)
        # Asking for a key that is not there would wait for it.
        if not self._store.check(self._keys):
            present = [rank for rank in ranks if self._store.check([self._keys[rank]])]
        texts = self._store.multi_get([self._keys[rank] for rank in present]) if present else []
        found = {rank: Beat(**json.loads(text)) for rank, text in zip(present, texts, strict=True)}
        now = time.monotonic()
        for rank, beat in found.items():
            if self._changes.get(rank, (-1, now))[0] != beat.number:
                self._changes[rank] = (beat.number, now)
        unchanged = {rank: now - self._changes.get(rank, (0, now))[1] for rank in ranks}
        return View({rank: found.get(rank) for rank in ranks}, unchanged, now)


def behind(view: View, patience: float) -> list[int]:
    """The ranks that the others wait for; all of them where none is behind another.

    In this order: who left by an error, who is silent (stopped, dead, or cut off), who never
    came as far as the loop, who stands at the earliest point of it.
    """
    for suspects in (
        [rank for rank, beat in view.beats.items() if beat and beat.failed],
        [rank for rank in view.beats if view.is_silent(rank, patience)],
        [rank for rank, beat in view.beats.items() if beat is None],
    ):
        if suspects:
            return suspects
    beats = {rank: beat for rank, beat in view.beats.items() if beat is not None}
    earliest = min(beat.position for beat in beats.values())
    ranks = [rank for rank, beat in beats.items() if beat.position == earliest]
    running = [rank for rank in ranks if beats[rank].state == RUNNING]
    # At the end of the loop, who is done waits for nobody.
    return running if running and len(ranks) == len(beats) else ranks


def may_go_on(view: View, ranks: Sequence[int], patience: float) -> bool:
    """Whether one of ``ranks`` is still within the time that its phase may take."""
    for rank in ranks:
        beat = view.beats[rank]
        if beat is not None and beat.state == RUNNING:
            silence = view.silence(rank) if view.is_silent(rank, patience) else 0.0
            if beat.seconds + silence < beat.allowance:
                return True
    return False


def sentence(view: View, ranks: Sequence[int], patience: float) -> str:
    """Who is behind, where, since when, and where the others wait."""
    if len(ranks) == len(view.beats) > 1:
        first = view.beats[ranks[0]]
        assert first is not None, "the rank that reads is one of them"
        return (
            f"none is behind: all {len(ranks)} ranks have been in step {first.step}, "
            f"{first.phase}, for {first.seconds:.0f} s; the stacks show where each is"
        )
    clauses = [_clause(view, rank, patience) for rank in ranks[:NAMED]]
    if len(ranks) > NAMED:
        clauses.append(f"and {len(ranks) - NAMED} ranks more")
    others = [beat for rank, beat in view.beats.items() if beat and rank not in ranks]
    if others:
        newest = max(others, key=lambda beat: beat.position)
        whom = "it" if len(ranks) == 1 else "them"
        clauses.append(f"the others wait for {whom} in step {newest.step}, {newest.phase}")
    return "; ".join(clauses)


def _clause(view: View, rank: int, patience: float) -> str:
    beat = view.beats[rank]
    if beat is None:
        return f"rank {rank} has not come as far as the training loop"
    who = f"rank {rank} (host {beat.host}, pid {beat.pid})"
    where = f"step {beat.step}, {beat.phase}"
    if beat.failed:
        return f"{who} has left the loop in {where}, by {beat.state}"
    if beat.state == DONE:
        return f"{who} has left the loop after {where}"
    if view.is_silent(rank, patience):
        silence = f"{view.silence(rank):.0f} s"
        return f"{who} has given no sign of life for {silence}, last heard of in {where}"
    return f"{who} has been in {where}, for {beat.seconds:.0f} s"
