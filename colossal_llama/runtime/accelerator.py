"""An accelerator object with which ColossalAI's plugins run on the CPU.

ColossalAI asks its accelerator for streams, events, random states and memory figures. Its own
``CpuAccelerator`` (``colossalai/accelerator/cpu_accelerator.py``) raises on most of them. On a
CPU every operation is synchronous, so a stream is nothing to wait for and "device memory" is
the memory of the process.

May go when the upstream class answers these calls.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import psutil
import torch
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


class _Stream:
    """A stream and an event on a device where everything has happened when a call returns."""

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


class HostAccelerator(CpuAccelerator):
    """The CPU as a device: one device, synchronous, its memory that of the process."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def synchronize(self, device: Any = None) -> None:
        return None

    # Random numbers: one generator, whatever device is named.

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return torch.initial_seed()

    # Memory, in bytes.

    def empty_cache(self) -> None:
        return None

    def memory_allocated(self, device: Any = None) -> int:
        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device: Any = None) -> int:
        # ru_maxrss counts KiB on Linux.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        return None

    # Streams and events.

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> _Stream:
        return _Stream()

    def Event(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream()

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    def set_stream(self, stream: Any) -> None:
        return None

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
