"""Worker processes: as many as asked for, none where one suffices."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from colossal_llama.errors import ColossalLlamaError

_WAITING_PER_WORKER = 2

_worker: Any = None  # of a worker process


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare_processes(modules: Sequence[str]) -> None:
    """Begins to import ``modules`` in the process from which workers will be forked.

    That goes on beside what this process does next, and is done once for all workers.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()


class Workers:
    """Calls methods of a worker object in ``count`` processes; in this one if it is 1.

    They are forked, when first used, from a process that does nothing else: a fork of this one
    would copy whatever locks the threads of numerical libraries hold.
    """

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        """``make`` builds the worker object in each process; it has to be picklable."""
        self._make = make
        self._count = count
        self._local: Any = None
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if kind is not None:
            # Whoever interrupts does not want to wait for chunks to end. (``kill_workers`` of
            # Python 3.14; what a worker leaves is complete or will be done again.)
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Lets the processes end, without waiting until they have."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def run(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields the results of ``method(*task)``, in whatever order they come.

        Raises:
            ColossalLlamaError: a process was killed from outside.
        """
        if self._count == 1:
            self._local = self._local or self._make()
            for task in tasks:
                yield getattr(self._local, method)(*task)
            return
        try:
            yield from self._run_in_processes(method, iter(tasks))
        except BrokenProcessPool:
            raise ColossalLlamaError(
                "a worker process was killed, perhaps for want of memory; give fewer "
                "--num_workers, and --resume to go on"
            ) from None

    def _run_in_processes(self, method: str, tasks: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        if self._executor is None:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("forkserver"),
                initializer=_start,
                initargs=(self._make,),
            )
        waiting: set[concurrent.futures.Future[Any]] = set()
        try:
            while True:
                while len(waiting) < _WAITING_PER_WORKER * self._count:
                    task = next(tasks, None)
                    if task is None:
                        break
                    waiting.add(self._executor.submit(_call, method, task))
                if not waiting:
                    return
                done, waiting = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def _start(make: Callable[[], Any]) -> None:
    """Prepares a worker process: it leaves Ctrl-C to the command, and ends with it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    _worker = make()


def _end_with_the_command() -> None:
    """Ends this process when the command has gone, even if that was killed."""
    command = multiprocessing.parent_process()
    assert command is not None
    multiprocessing.connection.wait([command.sentinel])
    os._exit(1)


def _call(method: str, task: tuple[Any, ...]) -> Any:
    return getattr(_worker, method)(*task)
