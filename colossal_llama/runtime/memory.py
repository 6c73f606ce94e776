"""Memory of the process on a CPU: kept, not handed back after every operation.

glibc serves each large block by ``mmap`` and returns it to the kernel when it is freed, so a
training step whose tensors are megabytes in size spends most of its time on page faults:
measured with ``benchmarks/cpu_allocation.py``.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for the next allocation; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, musl for one
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
