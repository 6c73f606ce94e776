"""The ``train`` command: checks, the process group, the loop, and always a clean end."""

from __future__ import annotations

import gc

from colossal_llama.errors import UsageError
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training.arguments import TrainOptions, is_checkpoint

__all__ = ["TrainOptions", "train"]


def train(options: TrainOptions) -> None:
    """Runs one stage of training.

    Raises:
        ColossalLlamaError: what the user can mend: data, checkpoint or flags that do not fit.
    """
    check_save_dir(options)
    with distributed(options.seed):
        from colossal_llama.training.assembly import build_trainer

        trainer = build_trainer(options)
        try:
            trainer.run()
        finally:
            trainer.metrics.close()
            # The plugin's process groups go with it, before the one they are made from.
            del trainer
            gc.collect()


def check_save_dir(options: TrainOptions) -> None:
    """Refuses to mix two runs in one directory."""
    holds_run = (options.save_dir / "latest").exists()
    resumes_it = options.load_checkpoint is not None and is_checkpoint(options.load_checkpoint)
    if holds_run and not resumes_it and not options.overwrite:
        raise UsageError(
            [
                f"--save_dir {options.save_dir} holds the checkpoints of another run; choose "
                "another directory, resume with --load_checkpoint, or give --overwrite"
            ]
        )
