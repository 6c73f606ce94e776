"""Where a run is: what a checkpoint says about itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama import storage
from colossal_llama.errors import DataError

STATE_FILE = "running_states.json"
FORMAT_VERSION = 2
_NAME = re.compile(r"epoch-(\d+)_step-(\d+)", re.ASCII)


@dataclass
class RunningState:
    """Where a run is. ``samples`` counts rows over all processes since the run began.

    ``order`` has what the order of the data depends on, ``callbacks`` what each callback wants to
    find again. A ``finished`` run took all its steps.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    tokens: int = 0
    finished: bool = False
    world_size: int = 1
    plugin: str = ""
    layout: dict[str, int] = field(default_factory=dict)
    mixed_precision: str = ""
    trained: str = ""
    order: dict[str, Any] = field(default_factory=dict)
    config_fingerprint: str = ""
    dataset_fingerprints: list[str] = field(default_factory=list)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def identity(self) -> str:
        """What has to be the same for an optimizer state to fit."""
        sizes = " ".join(f"{name}={size}" for name, size in sorted(self.layout.items()))
        return (
            f"{self.plugin} ({sizes} {self.mixed_precision}, {self.trained}) "
            f"on {self.world_size} processes"
        )

    def can_become(self, other: RunningState) -> bool:
        """Whether the optimizer's state is one for ``other``, if it can be divided so."""
        return (self.mixed_precision, self.trained) == (other.mixed_precision, other.trained)


def is_checkpoint(directory: Path | str) -> bool:
    """Whether ``directory`` is a full checkpoint; its content decides, not its name."""
    return (Path(directory) / STATE_FILE).is_file()


def goes_on_in(save_dir: Path, load: str | None) -> bool:
    """Whether ``--load_checkpoint`` is a checkpoint of the run that ``save_dir`` holds."""
    if load is None or load == "auto":
        return load is not None
    return is_checkpoint(load) and Path(load).resolve().parent == save_dir.resolve()


def checkpoints(save_dir: Path) -> list[Path]:
    """The complete checkpoints of ``save_dir``, from the fewest steps to the most.

    A directory under its final name is complete, whether or not ``latest`` was written in time.
    Copies under names like ``epoch-0_step-9.good`` are somebody's own.
    """
    found = [
        (int(match[2]), int(match[1]), path)
        for path in save_dir.glob("epoch-*_step-*")
        if (match := _NAME.fullmatch(path.name)) and is_checkpoint(path)
    ]
    return [path for _, _, path in sorted(found)]


def newest_checkpoint(save_dir: Path) -> Path | None:
    """The complete checkpoint of ``save_dir`` with the most steps; None if there is none."""
    return next(reversed(checkpoints(save_dir)), None)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("step-")[2])


def checkpoint_name(state: RunningState) -> str:
    """The name of the checkpoint's directory."""
    return f"epoch-{state.epoch}_step-{state.step}"


def read_running_state(checkpoint: Path) -> RunningState:
    """The running state of a checkpoint.

    Raises:
        DataError: it cannot be read, or is not one that this version understands.
    """
    path = checkpoint / STATE_FILE
    content = storage.read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: version {version}, this program reads {FORMAT_VERSION}")
    try:
        return RunningState(**content)
    except TypeError as error:
        raise DataError(f"{path}: not a running state ({error})") from None
