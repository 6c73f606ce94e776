"""A loop of four steps under the watchdog; imports torch, not ColossalAI.

    torchrun ... watchdog_worker.py TIMEOUT TROUBLE

Rank 1 gets into the trouble of that name in step 2; the parent reads pids from stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from colossal_llama.runtime.watchdog import Watchdog, open_store

STEPS = 4


def main() -> None:
    timeout, trouble = float(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Watchdog(timeout, rank, dist.get_world_size(), open_store()) as watchdog:
        for step in range(1, STEPS + 1):
            victim = rank == (0 if trouble.endswith("of rank 0") else 1) and step == 2
            watchdog.beat(step, "data")
            if victim:
                get_into(trouble, "data")
            watchdog.beat(step, "forward and backward")
            if victim:
                get_into(trouble, "forward and backward")
            dist.all_reduce(torch.ones(1))
            watchdog.beat(step, "checkpoint", timeout=60.0 if "told" in trouble else None)
            if victim:
                get_into(trouble, "checkpoint")
    dist.destroy_process_group()
    assert "colossalai" not in sys.modules
    print("finished", flush=True)


def get_into(trouble: str, phase: str) -> None:
    """Does what ``trouble`` says, if it is of this ``phase``."""
    name, _, rest = trouble.partition(" in ")
    if rest.partition(" of ")[0] != phase:
        return
    if name == "sleep":
        time.sleep(3600)
    elif name == "stop":
        time.sleep(0.5)  # until it has published where it is
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "die silently":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name.startswith("told to take"):
        time.sleep(float(name.split()[-1]))
    else:
        raise AssertionError(f"no trouble {name}")


if __name__ == "__main__":
    main()
