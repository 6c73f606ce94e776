"""Failures that PyTorch tells in a page of calls, and that a line can say."""

from __future__ import annotations

import re
import socket

import torch
import torch.distributed as dist

from colossal_llama.errors import ColossalLlamaError, LostPeerError, ProcessError

# What gloo, NCCL and the store say when the process at the other end is gone.
_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|remote process exited|"
    r"ncclRemoteError|no longer connected",
    re.IGNORECASE,
)
# CUDA has a type of exception for it.
_FULL = re.compile(r"DefaultCPUAllocator|(can't|cannot) allocate memory", re.IGNORECASE)


def plainly(error: BaseException) -> ColossalLlamaError | None:
    """The error that says in one line what ``error`` says in a page; ours say it themselves.

    Returns LostPeerError where another process of the job is gone, ProcessError where the memory
    of this process's device, or of the machine, is not enough; None for what has to keep its page.
    """
    if isinstance(error, ColossalLlamaError):
        return error
    if isinstance(error, MemoryError):
        return ProcessError(_full("the machine"))
    if not isinstance(error, RuntimeError):
        return None
    text = str(error).strip()
    if isinstance(error, torch.cuda.OutOfMemoryError) or _FULL.search(text):
        return ProcessError(_full(text.split("\n")[0]))
    if _LOST.search(text):
        # Without the library's source file, and its advice.
        what = re.sub(r"^\[\S+\] ", "", text).split(". ")[0].split("\n")[0]
        return LostPeerError(
            f"{_who()} lost the connection to another process, which is gone: its last lines, "
            f"or the launcher's table, say why ({what})"
        )
    return None


def _full(what: str) -> str:
    return (
        f"{_who()}: the memory is not enough: {what}; colossal-llama estimate, with the same "
        "flags, says how much is needed and what to change (--use_grad_checkpoint, a smaller "
        "--micro_batch_size, another --plugin)"
    )


def _who() -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return f"rank {rank} on {socket.gethostname()}"
