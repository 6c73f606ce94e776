"""What a run may write to: a directory of its own, which no other run is writing to."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama import command
from colossal_llama.errors import DataError, UsageError
from colossal_llama.storage import read_json
from colossal_llama.training.state import goes_on_in, is_checkpoint, newest_checkpoint

if TYPE_CHECKING:
    from colossal_llama.training.arguments import TrainOptions

# Of the disk of SAVE_DIR, in bytes: less is as good as full.
_LEAST_SPACE = 1 << 16
# What other directories hold that users may name by mistake.
_FOREIGN = {
    "dataset_manifest.json": "a prepared dataset",
    "*.arrow": "a part of a dataset",
    "*.safetensors": "a model",
    "tokenizer_config.json": "a model or tokenizer",
}

# Settings that change how a run is computed, written or watched, not what it learns.
_NO_MATTER = {
    *("load_checkpoint", "save_dir", "save_interval", "keep_last", "async_save", "on_save_error"),
    *("max_time", "hang_timeout", "overwrite", "config_file", "report_to", "tensorboard_dir"),
    *("eval_dataset", "eval_interval", "verify_data", "plugin", "tp", "pp", "sp", "zero_stage"),
    *("use_grad_checkpoint", "use_flash_attn", "torch_compile", "fused_loss"),
}


def check_save_dir(options: TrainOptions) -> None:
    """Refuses to write over what is not this run's, and to train what cannot be saved.

    Raises:
        UsageError: naming the reason, before the model is loaded; nothing was written.
    """
    found = [_foreign(options.save_dir), _other_run(options), _config_file(options)]
    if problems := list(filter(None, found)):
        raise UsageError(problems)
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


def config_file(options: TrainOptions) -> Path:
    """Where a run writes its resolved flags."""
    return options.config_file or options.save_dir / "config.json"


def changed_settings(options: TrainOptions) -> list[str]:
    """The settings that a run was begun with and that are others now: ``lr 0.1 -> 0.2``.

    Raises:
        DataError: the file with the former is damaged.
    """
    path = options.save_dir / "config.json"
    if not path.is_file():
        return []
    then, now = read_json(path), command.as_dict(options)
    if not isinstance(then, dict):
        raise DataError(f"{path}: not the flags of a run")
    return [
        f"{name} {_text(then[name])} -> {_text(value)}"
        for name, value in now.items()
        if name in then and name not in _NO_MATTER and then[name] != value
    ]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def held(save_dir: Path) -> Iterator[None]:
    """Keeps other runs out of ``save_dir``, also on other machines, as far as its disk can.

    All processes call it; the first holds the lock. Directories that are made for it and stay
    empty are removed.

    Raises:
        DataError: on all processes, if another run holds it.
    """
    import torch.distributed as dist

    from colossal_llama.training.checkpoint import raise_on_all

    problem, descriptor, made = None, None, []
    if dist.get_rank() == 0:
        made = [path for path in (save_dir, *save_dir.parents) if not path.exists()]
        try:
            save_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(save_dir, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"--save_dir {save_dir}: another run is writing to it; choose another"
        except OSError:
            pass  # a disk without locks; if it cannot be written to, that is said elsewhere
    try:
        raise_on_all(problem, DataError)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def run_directory(path: Path) -> str | None:
    """What to say to somebody who gives a run's directory for a model's; None for others."""
    newest = newest_checkpoint(path) if path.is_dir() else None
    if newest is not None:
        return f"{path} is the directory of a run: its newest model is {newest / 'modeling'}"
    if is_checkpoint(path):
        return f"{path} is a checkpoint: its model is {path / 'modeling'}"
    return None


def _foreign(save_dir: Path) -> str | None:
    kinds = [kind for pattern, kind in _FOREIGN.items() if any(save_dir.glob(pattern))]
    if is_checkpoint(save_dir):
        kinds.insert(0, "a checkpoint")
    if not kinds:
        return None
    return f"--save_dir {save_dir} is {kinds[0]}: a run has to have a directory of its own"


def _other_run(options: TrainOptions) -> str | None:
    if options.overwrite or goes_on_in(options.save_dir, options.load_checkpoint):
        return None
    if newest_checkpoint(options.save_dir) is None:
        return None
    return (
        f"--save_dir {options.save_dir} holds the checkpoints of another run; choose another "
        "directory, resume with --load_checkpoint auto, or give --overwrite"
    )


def _config_file(options: TrainOptions) -> str | None:
    path = options.config_file
    if path is None or options.overwrite or not path.exists():
        return None
    content: Any = None
    with suppress(DataError):
        content = read_json(path)
    if isinstance(content, dict) and "save_dir" in content:
        return None  # resolved flags, of this run or another
    return (
        f"--config_file {path} exists, and is not what a run has written there; flags are read "
        "with --config"
    )
