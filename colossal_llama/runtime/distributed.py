"""The process group: started from a launcher's environment, taken down in good order."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from colossal_llama.errors import UsageError

_LONGEST_WAIT = datetime.timedelta(hours=2)  # the watchdog is there for what hangs
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """The number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def distributed(seed: int) -> AbstractContextManager[None]:
    """Makes ColossalAI ready for this device and joins the processes of this job.

    Reads the variables that ``torchrun`` and ``colossalai run`` set; without them the job has
    one process. Inside a process group that is already there (tests that run several
    trainings in one process), that group is used and left alone.

    Raises:
        UsageError: the launcher's variables are incomplete.
        LostPeerError: another process of the job is gone.
        ProcessError: the memory of this process's device, or of the machine, is not enough.
    """
    return _Job(seed)


class _Job:
    """The time from joining the processes to leaving them.

    No generator: while one handles an error, ``contextlib`` holds the error's traceback.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._joined = False

    def __enter__(self) -> None:
        import torch.distributed

        if torch.distributed.is_initialized():
            return
        _check_environment()
        _quieten()
        _prepare()
        import colossalai
        from colossalai.logging import get_dist_logger

        # Where it puts which shard, at every checkpoint; its warnings stay.
        get_dist_logger().set_level("WARNING")
        colossalai.launch_from_torch(seed=self._seed, verbose=False)
        self._joined = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if not self._joined:
            return
        import torch.distributed

        from colossal_llama.runtime import memory
        from colossal_llama.runtime.failures import plainly

        plain = None if error is None else plainly(error)
        if plain is not None or isinstance(error, KeyboardInterrupt):
            # Nobody will read where it came from, and the functions there hold process groups.
            del where
            _forget_traceback(error)
        # Plugins destroy their process groups when they are collected; that has to happen
        # while there is still a group to destroy, or the interpreter's exit prints tracebacks.
        # And the threads of a group that is still there can abort the process at its exit.
        memory.let_go()
        torch.distributed.destroy_process_group()
        if plain is not None and plain is not error:
            raise plain from None


def _forget_traceback(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def patient_group() -> Any:
    """A process group of all, in which one may wait long for another's file.

    NCCL ends whoever waits for 10 minutes; None stands for the default group where that is gloo's.
    """
    import torch.distributed

    if torch.distributed.get_backend() == "gloo":
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def _check_environment() -> None:
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if not present or present == ["MASTER_ADDR"]:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    elif len(present) < len(LAUNCHER_VARIABLES):
        missing = ", ".join(sorted(set(LAUNCHER_VARIABLES) - set(present)))
        raise UsageError(
            [f"the launcher did not set {missing}; start with torchrun or colossalai run"]
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _prepare() -> None:
    """Installs the accelerator object, the kernels and the patches."""
    import torch
    from colossalai.accelerator import set_accelerator

    from colossal_llama.runtime import adam, memory, overhead, patches

    if not torch.cuda.is_available():
        memory.keep_freed_memory()
        from colossal_llama.runtime.accelerator import HostAccelerator

        set_accelerator(HostAccelerator())
    adam.register()
    patches.apply_all()
    overhead.apply_all()


def _quieten() -> None:
    """Silences what libraries say at import that no user of ours can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings(
        "ignore", message=".*TypedStorage.*|.*NVMe.*|.*apex.*|.*flash.?attn.*|.*ninja.*"
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
