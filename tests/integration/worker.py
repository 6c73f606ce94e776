"""Runs several trainings in one process group: importing ColossalAI takes longer than they do.

    torchrun --nproc_per_node 2 tests/integration/worker.py jobs.json

or, forked from a process that has imported it, by ``tests/nursery.py``.
``jobs.json`` is a list of flag lists for ``train.py``. A job that fails stops the group.
"""

import functools
import gc
import json
import os
import sys
import traceback
import weakref

import torch

from colossal_llama import command
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training import plugins
from colossal_llama.training.train import TrainOptions, train
from colossal_llama.training.trainer import Trainer

# So high that a small model's gradients overflow: the search for a scale is part of a run.
plugins.INITIAL_LOSS_SCALE = 2.0**19
# Layers are captured and differentiated as with any backend, but no C++ is made: that takes a
# minute. (With it losses were found to differ by 4e-8.)
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
# Nothing of these runs has to outlive a power failure, and each has a hundred small files.
os.fsync = lambda descriptor: None


def weights_of_runs() -> list[weakref.ref[torch.Tensor]]:
    """A list to which each run adds its model's weights."""
    found: list[weakref.ref[torch.Tensor]] = []
    original = Trainer.run

    def run(trainer: Trainer) -> None:
        found.extend(map(weakref.ref, trainer.model.unwrap().parameters()))
        original(trainer)

    Trainer.run = run  # type: ignore[method-assign]
    return found


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as stream:
        jobs = json.load(stream)
    weights = weights_of_runs()
    with distributed(seed=0):
        for number, flags in enumerate(jobs):
            # A job starts from the same random state wherever it stands in the list.
            torch.manual_seed(0)
            try:
                train(command.parse(TrainOptions, flags))
            except Exception:
                print(f"failed: train.py {' '.join(flags)}", file=sys.stderr)
                traceback.print_exc()
                sys.exit(1)
            # The next stage of a recipe needs their room.
            assert weights, "the run has begun without this list"
            assert all(weight() is None for weight in weights), f"a model stays: {flags}"
            if number == 0:
                # What was imported stays: looking through it takes each job half a second.
                gc.freeze()


if __name__ == "__main__":
    main()
