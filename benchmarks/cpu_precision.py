"""Which precision to train in on a CPU.

    python benchmarks/cpu_precision.py

Times forward and backward of the demo's model (vocabulary 6,000, 4 rows of 256 tokens, one
thread) in bf16 and fp32, as this CPU is and with torch and oneDNN held to AVX2, as an older
laptop has it, and prints the medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS, STEPS = 3, 5
PRESET = Path(__file__).parents[1] / "colossal_llama/model/presets/demo.json"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

STEP = """
import sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from colossal_llama.runtime.memory import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
config = LlamaConfig.from_json_file(sys.argv[2])
config.vocab_size = 6000
model = LlamaForCausalLM(config).to(getattr(torch, sys.argv[1]))
ids = torch.randint(0, 6000, (4, 256))
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    print(time.perf_counter() - started)
"""


def measure(dtype: str, environment: dict[str, str]) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    command = [sys.executable, "-c", STEP, dtype, str(PRESET), str(STEPS)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return [float(line) for line in done.stdout.split()][1:]


def main() -> None:
    rows: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, environment in (("as it is", {}), ("AVX2", AVX2)):
            for dtype in ("float32", "bfloat16"):
                rows.setdefault((name, dtype), []).extend(measure(dtype, environment))
    print("CPU        precision   seconds a step (median)")
    for (name, dtype), seconds in rows.items():
        print(f"{name:<10} {dtype:<11} {statistics.median(seconds):.3f}")


if __name__ == "__main__":
    main()
