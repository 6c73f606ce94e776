"""Failures that PyTorch tells in a page of calls, and that a line can say."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from colossal_llama.errors import LostPeerError, ProcessError

# What gloo, NCCL and the store say when the process at the other end is gone.
_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|remote process exited|"
    r"ncclRemoteError|no longer connected",
    re.IGNORECASE,
)
# CUDA has a type of exception for it.
_FULL = re.compile(r"DefaultCPUAllocator|(can't|cannot) allocate memory", re.IGNORECASE)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turns a lost connection and a full memory into an error of one line.

    Raises:
        LostPeerError: another process of the job is gone.
        ProcessError: the memory of this process's device, or of the machine, is not enough.
    """
    try:
        yield
    except MemoryError:
        raise ProcessError(_full("the machine")) from None
    except RuntimeError as error:
        text = str(error).strip()
        if isinstance(error, torch.cuda.OutOfMemoryError) or _FULL.search(text):
            raise ProcessError(_full(text.split("\n")[0])) from None
        if _LOST.search(text):
            # Without the library's source file, and its advice.
            what = re.sub(r"^\[\S+\] ", "", text).split(". ")[0].split("\n")[0]
            raise LostPeerError(
                f"{_who()} lost the connection to another process, which is gone: its last lines, "
                f"or the launcher's table, say why ({what})"
            ) from None
        raise


def _full(what: str) -> str:
    return (
        f"{_who()}: the memory is not enough: {what}; colossal-llama estimate, with the same "
        "flags, says how much is needed and what to change (--use_grad_checkpoint, a smaller "
        "--micro_batch_size, another --plugin)"
    )


def _who() -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return f"rank {rank} on {socket.gethostname()}"
