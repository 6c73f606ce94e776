"""Memory of the process: what is kept when it is free, and what is let go of.

On a CPU glibc serves each large block by ``mmap`` and returns it to the kernel when it is freed,
so a training step whose tensors are megabytes in size spends most of its time on page faults:
measured with ``benchmarks/cpu_allocation.py``.
"""

from __future__ import annotations

import ctypes
import gc
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


def let_go() -> None:
    """Frees what is left of a model that was trained, process groups included.

    ColossalAI keeps chunks of Gemini (weights and moments), and groups of tensor parallelism, in
    caches that live as long as the process: a recipe would need the memory of all its stages
    together. And the threads of a group that is still there at the interpreter's exit can abort it.
    """
    from colossalai.tensor.d_tensor.api import clear_layout_converter
    from colossalai.zero.gemini.gemini_mgr import GeminiManager
    from colossalai.zero.gemini.placement_policy import AutoPlacementPolicy

    clear_layout_converter()
    GeminiManager._get_layout_info.cache_clear()
    AutoPlacementPolicy._sort_can_evict_chunks.cache_clear()
    # One round may let go of tensors whose hooks, in C++, are what held the next round's garbage.
    while gc.collect():
        pass
