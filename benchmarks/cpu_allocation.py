"""What keeping freed memory is worth to a training step on a CPU.

    python benchmarks/cpu_allocation.py

Times forward and backward of the demo's model (vocabulary 8,000, 8 rows of 256 tokens, bf16)
in processes with and without ``runtime.memory.keep_freed_memory``, in turns, and prints the
median of each and their ratio.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS, STEPS = 3, 6
PRESET = Path(__file__).parents[1] / "colossal_llama/model/presets/demo.json"

STEP = """
import sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from colossal_llama.runtime.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(), "no glibc here: nothing to measure"
torch.set_num_threads(1)
config = LlamaConfig.from_json_file(sys.argv[2])
config.vocab_size = 8000
model = LlamaForCausalLM(config).to(torch.bfloat16)
ids = torch.randint(0, 8000, (8, 256))
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    print(time.perf_counter() - started)
"""


def measure(mode: str) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    command = [sys.executable, "-c", STEP, mode, str(PRESET), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()][1:]


def main() -> None:
    times: dict[str, list[float]] = {"returned": [], "kept": []}
    for _ in range(ROUNDS):
        for mode, seconds in times.items():
            seconds += measure(mode)
    medians = {mode: statistics.median(seconds) for mode, seconds in times.items()}
    print("freed memory   seconds a step (median)")
    for mode, seconds in medians.items():
        print(f"{mode:<14} {seconds:.3f}")
    print(f"ratio          {medians['returned'] / medians['kept']:.2f}")


if __name__ == "__main__":
    main()
