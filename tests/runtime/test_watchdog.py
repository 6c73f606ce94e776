"""A training that hangs ends soon and names who hangs; a good one does not notice."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colossal_llama.runtime.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests/runtime/watchdog_worker.py"
BIN = Path(sys.executable).parent
Start = Callable[[float, str], list[subprocess.Popen[str]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts two ranks without a launcher, so that the store is in rank 0; leaves none behind."""
    processes: list[subprocess.Popen[str]] = []

    def two(timeout: float, trouble: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        for rank in range(2):
            job = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
            processes.append(
                subprocess.Popen(
                    [sys.executable, WORKER, str(timeout), trouble],
                    cwd=ROOT,
                    env=environment(job | {"MASTER_ADDR": "127.0.0.1"}),
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        return processes

    yield two
    for process in processes:
        process.kill()  # it ends stopped processes, too
        process.communicate()


def environment(job: dict[str, str]) -> dict[str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("TORCHELASTIC")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | job


def finish(process: subprocess.Popen[str], seconds: float = 30.0) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def hangs(said: str) -> str:
    """The one line of the watchdog."""
    (line,) = re.findall(r"^error: training hangs: (.*)$", said, flags=re.MULTILINE)
    return str(line)


def test_a_good_run_shows_nothing_and_ends_at_once(start: Start) -> None:
    for process in start(20.0, "none"):
        code, said = finish(process)
        assert (code, said) == (0, "")


def test_a_rank_that_hangs_names_itself_and_shows_where(start: Start) -> None:
    first, second = start(2.0, "sleep in data")
    code, said = finish(second)
    assert code == EXIT_HUNG, said
    assert re.fullmatch(
        rf"rank 1 \(host \S+, pid {second.pid}\) has been in step 2, data, for \d+ s; the others "
        rf"wait for it in step 2, forward and backward; exit code {EXIT_HUNG}",
        hangs(said),
    )
    assert re.search(r"watchdog_worker.py:\d+ in get_into", said)
    assert "watchdog.py" not in said, "our own threads are of no interest"
    code, said = finish(first)
    assert code != 0
    assert "stacks" not in said, "a victim's stacks are of no interest"


def test_a_stopped_rank_is_named_by_the_others(start: Start) -> None:
    first, second = start(2.0, "stop in data")
    code, said = finish(first)
    assert code == EXIT_HUNG, said
    assert second.poll() is None, "it cannot have said anything"
    assert re.match(
        rf"rank 1 \(host \S+, pid {second.pid}\) has given no sign of life for \d+ s, "
        "last heard of in step 2, data; the others wait for it in step 2, forward and backward;",
        hangs(said),
    )
    assert "stacks" not in said, "a victim's stacks are of no interest"


def test_a_stopped_rank_that_holds_the_store_is_named(start: Start) -> None:
    first, second = start(2.0, "stop in data of rank 0")
    code, said = finish(second)
    assert first.poll() is None
    assert code == EXIT_HUNG, said
    line = hangs(said)
    assert line.startswith(f"rank 1 (host {socket.gethostname()}, pid {second.pid}) has been in")
    assert "; rank 0, which keeps what all ranks report, hangs or is gone;" in line


def test_where_none_is_behind_all_show_their_stacks(start: Start) -> None:
    both = start(2.0, "sleep in forward and backward")
    answers = [finish(process) for process in both]
    said = "".join(text for _, text in answers)
    assert "none is behind: all 2 ranks have been in step 2, forward and backward" in hangs(said)
    assert EXIT_HUNG in [code for code, _ in answers]
    assert re.search(r"watchdog_worker.py:\d+ in get_into", said)


def test_a_phase_that_was_told_to_take_longer_may(start: Start) -> None:
    """Rank 0 has long been waiting in the next step."""
    for process in start(2.0, "told to take 6 in checkpoint"):
        code, said = finish(process)
        assert (code, said) == (0, "")


def test_under_torchrun_all_are_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2",
         WORKER, "2.0", "sleep in data of rank 0"],
        cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert hangs(done.stderr).startswith("rank 0 (host ")
    assert re.search(rf"rank +: 0 .*\n.*exitcode +: {EXIT_HUNG} ", done.stderr), done.stderr
    assert time.monotonic() - started < 25.0


def test_a_single_process_that_hangs_ends() -> None:
    program = (
        "import time\n"
        "from colossal_llama.runtime.watchdog import Watchdog\n"
        "with Watchdog(0.5, 0, 1, None) as watchdog:\n"
        "    watchdog.beat(7, 'evaluation')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == EXIT_HUNG
    assert "has been in step 7, evaluation, for 1 s; exit code" in hangs(done.stderr)


def test_a_job_that_was_paused_as_a_whole_goes_on() -> None:
    program = (
        "import os, time\n"
        "from colossal_llama.runtime.watchdog import Watchdog\n"
        "with Watchdog(2.0, 0, 1, None) as watchdog:\n"
        "    watchdog.beat(1, 'data')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(5)\n"
        "    watchdog.beat(2, 'data')\n"
        "    time.sleep(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert finish(process) == (0, "")


def test_a_disabled_watchdog_has_no_threads() -> None:
    with Watchdog(0.0, 0, 2, None) as watchdog:
        watchdog.beat(1, "data")
        assert watchdog._thread is None
