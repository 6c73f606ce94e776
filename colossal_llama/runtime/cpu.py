"""What this CPU can compute quickly."""

from __future__ import annotations

from pathlib import Path


def bf16_is_fast() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX).

    Elsewhere torch emulates it: a training step of the demo's model takes ten times as long as
    in fp32 (``benchmarks/cpu_precision.py``).
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
