"""The ``train`` command: checks, the process group, the loop, and always a clean end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from colossal_llama import command
from colossal_llama.runtime import memory
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.recipe import recipe_path
from colossal_llama.training.save_dir import check_save_dir, held
from colossal_llama.training.stages import run_recipe

__all__ = ["EXIT_STOPPED", "TrainOptions", "train"]

# EX_TEMPFAIL of sysexits.h: stopped early, with a checkpoint; the same command goes on from it.
EXIT_STOPPED = 75


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command: one stage, or those of a recipe; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = recipe_path(arguments)
    if path is None:
        return command.run(TrainOptions, train, arguments, prog)
    return command.exit_code(lambda: run_recipe(path, train, arguments, prog))


def train(
    options: TrainOptions, started: float | None = None, *, more_follows: bool = False
) -> int:
    """Runs one stage of training; returns 0, or EXIT_STOPPED if it was stopped before its end.

    Args:
        started: when the time of ``--max_time`` began (``time.monotonic``); None for now.
        more_follows: whether another stage is to begin after this one. It is not, if this one was
            asked to stop and was at its end then; returns EXIT_STOPPED.

    Raises:
        ColossalLlamaError: what the user can mend: data, checkpoint or flags that do not fit.
    """
    started = time.monotonic() if started is None else started
    check_save_dir(options)
    with distributed(options.seed), held(options.save_dir):
        from colossal_llama.training.assembly import build_trainer

        trainer = build_trainer(options, started)
        failed = True
        try:
            with trainer.watchdog:
                trainer.run()
            stopped = trainer.stop_reason is not None
            if trainer.state.finished:
                stopped = stopped and more_follows
            elif stopped:
                trainer.say(f"{trainer.stop_reason}; --load_checkpoint auto goes on from there")
            failed = False
        finally:
            trainer.log.close(failed=failed)
            # The plugin's process groups go with it, before the one they are made from.
            del trainer
            memory.let_go()
    return EXIT_STOPPED if stopped else 0
