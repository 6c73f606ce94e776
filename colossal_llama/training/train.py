"""The ``train`` command: checks, the process group, the loop, and always a clean end."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Sequence

from colossal_llama import command
from colossal_llama.errors import UsageError
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.recipe import recipe_path
from colossal_llama.training.stages import run_recipe
from colossal_llama.training.state import goes_on_in, newest_checkpoint

__all__ = ["EXIT_STOPPED", "TrainOptions", "train"]

# EX_TEMPFAIL of sysexits.h: stopped early, with a checkpoint; the same command goes on from it.
EXIT_STOPPED = 75

# Of the disk of SAVE_DIR, in bytes: less is as good as full.
_LEAST_SPACE = 1 << 16


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command: one stage, or those of a recipe; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = recipe_path(arguments)
    if path is None:
        return command.run(TrainOptions, train, arguments, prog)
    return command.exit_code(lambda: run_recipe(path, train, arguments, prog))


def train(options: TrainOptions, started: float | None = None) -> int:
    """Runs one stage of training; returns 0, or EXIT_STOPPED if it was stopped before its end.

    Args:
        started: when the time of ``--max_time`` began (``time.monotonic``); None for now.

    Raises:
        ColossalLlamaError: what the user can mend: data, checkpoint or flags that do not fit.
    """
    started = time.monotonic() if started is None else started
    check_save_dir(options)
    with distributed(options.seed):
        from colossal_llama.training.assembly import build_trainer

        trainer = build_trainer(options, started)
        failed = True
        try:
            with trainer.watchdog:
                trainer.run()
            stopped = trainer.stop_reason is not None and not trainer.state.finished
            if stopped:
                trainer.say(f"{trainer.stop_reason}; --load_checkpoint auto goes on from there")
            failed = False
        finally:
            trainer.log.close(failed=failed)
            # The plugin's process groups go with it, before the one they are made from.
            del trainer
            gc.collect()
    return EXIT_STOPPED if stopped else 0


def check_save_dir(options: TrainOptions) -> None:
    """Refuses to mix two runs in one directory, and to train what cannot be saved.

    Raises:
        UsageError: naming the reason, before the model is loaded; nothing was written.
    """
    own = options.overwrite or goes_on_in(options.save_dir, options.load_checkpoint)
    if newest_checkpoint(options.save_dir) and not own:
        raise UsageError(
            [
                f"--save_dir {options.save_dir} holds the checkpoints of another run; choose "
                "another directory, resume with --load_checkpoint auto, or give --overwrite"
            ]
        )
    place = options.save_dir
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as probe:
            probe.write(bytes(_LEAST_SPACE))
    except OSError as error:
        raise UsageError(
            [f"--save_dir {options.save_dir}: cannot write to {place}: {error.strerror}"]
        ) from None
