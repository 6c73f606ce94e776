"""Who is behind, and in which words."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from colossal_llama.runtime.beats import (
    DONE,
    Beat,
    Board,
    View,
    behind,
    may_go_on,
    open_store,
    sentence,
)

PATIENCE = 15.0
PHASES = ("data", "forward and backward", "update", "checkpoint")


def beat(step: int, phase: str, seconds: float = 601.0, **others: Any) -> Beat:
    return Beat(
        host="x", pid=123, step=step, visit=PHASES.index(phase), phase=phase,
        **{"seconds": seconds, "allowance": 600.0, "published": time.time(), **others},
    )  # fmt: skip


def view(*beats: Beat | None, silent: dict[int, float] | None = None) -> View:
    unchanged = dict.fromkeys(range(len(beats)), 0.0) | (silent or {})
    return View(dict(enumerate(beats)), unchanged, time.monotonic())


WAITS = beat(12, "forward and backward")
ROWS = {
    "an earlier phase": (
        view(WAITS, beat(12, "data"), WAITS),
        [1],
        "rank 1 (host x, pid 123) has been in step 12, data, for 601 s; "
        "the others wait for it in step 12, forward and backward",
    ),
    "an earlier step": (
        view(beat(11, "checkpoint"), beat(12, "data")),
        [0],
        "rank 0 (host x, pid 123) has been in step 11, checkpoint, for 601 s; "
        "the others wait for it in step 12, data",
    ),
    "two of three": (
        view(beat(12, "data"), WAITS, beat(12, "data")),
        [0, 2],
        "rank 0 (host x, pid 123) has been in step 12, data, for 601 s; "
        "rank 2 (host x, pid 123) has been in step 12, data, for 601 s; "
        "the others wait for them in step 12, forward and backward",
    ),
    "silent, though not behind": (
        view(WAITS, beat(12, "update", 1.0, published=0.0), silent={1: 20.0}),
        [1],
        f"rank 1 (host x, pid 123) has given no sign of life for {time.time():.0f} s, "
        "last heard of in step 12, update; the others wait for it in step 12, forward and backward",
    ),
    "left by an error": (
        view(WAITS, beat(12, "update", state="ValueError"), silent={1: 20.0}),
        [1],
        "rank 1 (host x, pid 123) has left the loop in step 12, update, by ValueError; "
        "the others wait for it in step 12, forward and backward",
    ),
    "done too early": (
        view(WAITS, beat(11, "checkpoint", state=DONE)),
        [1],
        "rank 1 (host x, pid 123) has left the loop after step 11, checkpoint; "
        "the others wait for it in step 12, forward and backward",
    ),
    "the others are done": (
        view(beat(12, "checkpoint"), beat(12, "checkpoint", state=DONE)),
        [0],
        "rank 0 (host x, pid 123) has been in step 12, checkpoint, for 601 s; "
        "the others wait for it in step 12, checkpoint",
    ),
    "never began": (
        view(WAITS, None),
        [1],
        "rank 1 has not come as far as the training loop; "
        "the others wait for it in step 12, forward and backward",
    ),
    "all in one place": (
        view(WAITS, WAITS),
        [0, 1],
        "none is behind: all 2 ranks have been in step 12, forward and backward, for 601 s; "
        "the stacks show where each is",
    ),
    "a single rank": (
        view(WAITS),
        [0],
        "rank 0 (host x, pid 123) has been in step 12, forward and backward, for 601 s",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_who_is_behind(name: str) -> None:
    seen, ranks, words = ROWS[name]
    assert behind(seen, PATIENCE) == ranks
    said = sentence(seen, ranks, PATIENCE)
    # The silence is counted from 1970: a few seconds have passed since the table was made.
    assert re.sub(r"\d{9,} s", "years", said) == re.sub(r"\d{9,} s", "years", words)
    assert not may_go_on(seen, ranks, PATIENCE)


def test_a_machine_of_ranks_is_counted_not_listed() -> None:
    seen = view(*[beat(3, "data")] * 8, beat(3, "update"))
    said = sentence(seen, behind(seen, PATIENCE), PATIENCE)
    assert "rank 3" in said
    assert "rank 4" not in said
    assert "and 4 ranks more; the others wait for them" in said


@pytest.mark.parametrize(
    "slow",
    [
        beat(12, "data", seconds=100.0),
        beat(12, "data", seconds=700.0, allowance=3600.0),  # it was told to take longer
    ],
)
def test_a_slow_rank_is_not_a_hung_one(slow: Beat) -> None:
    seen = view(WAITS, slow)
    assert may_go_on(seen, behind(seen, PATIENCE), PATIENCE)


def test_a_silent_rank_has_the_time_of_its_phase_too() -> None:
    stopped = beat(12, "data", seconds=1.0)
    assert may_go_on(view(WAITS, stopped, silent={1: 20.0}), [1], PATIENCE)
    assert not may_go_on(view(WAITS, stopped, silent={1: 600.0}), [1], PATIENCE)


def test_board_reads_without_waiting_for_who_is_missing() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = [beat(1, "data")]
    board = Board(
        TCPStore("127.0.0.1", store.port, wait_for_workers=False, timeout=timedelta(seconds=60)),
        "test", 1, 3, lambda: own[0],
    )  # fmt: skip
    board.start(0.1)
    try:
        board.look(True)
        seen = until(lambda: board.view)
        assert (seen.beats[0], seen.beats[2]) == (None, None)
        assert seen.beats[1].position == (1, 0)
        own[0] = beat(2, "update")
        board.tell()
        assert until(lambda: board.view and board.view.beats[1].step == 2)
        assert board.claim("x")
        assert not board.claim("x")
        board.look(False)
        assert board.view is None or until(lambda: board.view is None)
    finally:
        started = time.monotonic()
        board.close(5.0)
    assert time.monotonic() - started < 2.0


def until(condition: Any) -> Any:
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("not within 10 s")


def test_no_store_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert open_store() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert open_store(timeout=1.0) is None
