"""Checkpoints: complete, self-contained, and exact to resume from.

<save_dir>/epoch-0_step-100/
    modeling/               a Hugging Face model directory, tokenizer included
    optimizer/rank-00000.safetensors ...   master weights, moments, loss scale
    rng/rank-00000.safetensors ...         random states
    lr_scheduler            the schedule (JSON)
    running_states.json     position in the data, layout, fingerprints
<save_dir>/latest           the name of the newest complete checkpoint
"""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from colossal_llama import storage
from colossal_llama.errors import DataError
from colossal_llama.tokenizer.settings import drop_prefix_setting
from colossal_llama.training.optimizer_state import load_optimizer_state, save_optimizer_state
from colossal_llama.training.plugins import Layout

FORMAT_VERSION = 1


@dataclass
class RunningState:
    """Where a run is. ``samples`` counts rows over all processes since the run began."""

    epoch: int = 0
    step: int = 0
    samples: int = 0
    tokens: int = 0
    world_size: int = 1
    plugin: str = ""
    layout: dict[str, int] = field(default_factory=dict)
    mixed_precision: str = ""
    config_fingerprint: str = ""
    dataset_fingerprints: list[str] = field(default_factory=list)
    version: int = FORMAT_VERSION

    def identity(self) -> str:
        """What has to be the same for an optimizer state to fit."""
        sizes = " ".join(f"{name}={size}" for name, size in sorted(self.layout.items()))
        return f"{self.plugin} ({sizes} {self.mixed_precision}) on {self.world_size} processes"


def save_checkpoint(
    save_dir: Path,
    state: RunningState,
    *,
    booster: Any,
    model: Any,
    optimizer: Any,
    schedule: Any,
    tokenizer: Any,
    layout: Layout,
) -> Path:
    """Writes a checkpoint with all processes; returns its directory.

    The name appears when everything in it is on the disk: files go to a temporary sibling,
    and the first process renames it once all are done. ``save_dir`` has to be one that every
    machine of the job sees.
    """
    final = save_dir / f"epoch-{state.epoch}_step-{state.step}"
    temporary = save_dir / f".{final.name}.tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in ("modeling", "optimizer", "rng"):
            (temporary / name).mkdir(parents=True)
    dist.barrier()
    booster.save_model(model, str(temporary / "modeling"), shard=True, use_safetensors=True)
    if layout.optimizer_owner == rank:
        save_optimizer_state(optimizer, _rank_file(temporary / "optimizer", rank))
    _save_random_states(_rank_file(temporary / "rng", rank))
    if rank == 0:
        tokenizer.save_pretrained(temporary / "modeling")
        drop_prefix_setting(temporary / "modeling" / "tokenizer_config.json")
        storage.write_json(temporary / "lr_scheduler", asdict(schedule))
        storage.write_json(temporary / "running_states.json", asdict(state))
    dist.barrier()  # other processes' temporary files come and go until they are done
    storage.fsync_tree(temporary)
    dist.barrier()
    if rank == 0:
        storage.replace_directory(temporary, final)
        with storage.atomic_file(save_dir / "latest") as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
    dist.barrier()
    return final


def read_running_state(checkpoint: Path) -> RunningState:
    """The running state of a checkpoint.

    Raises:
        DataError: it cannot be read, or is not one that this version understands.
    """
    path = checkpoint / "running_states.json"
    content = storage.read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: version {version}, this program reads {FORMAT_VERSION}")
    try:
        return RunningState(**content)
    except TypeError as error:
        raise DataError(f"{path}: not a running state ({error})") from None


def restore(checkpoint: Path, optimizer: Any, layout: Layout) -> None:
    """Restores this process's optimizer and random states, bit for bit.

    Raises:
        DataError: a file is missing, or belongs to another layout or model.
    """
    mistake = None
    optimizer_file = _rank_file(checkpoint / "optimizer", layout.optimizer_owner)
    random_file = _rank_file(checkpoint / "rng", dist.get_rank())
    try:
        load_optimizer_state(optimizer, optimizer_file)
        _load_random_states(random_file)
    except DataError as error:
        mistake = str(error)
    except (OSError, SafetensorError) as error:
        mistake = f"{checkpoint}: rank {dist.get_rank()}'s state is missing or damaged: {error}"
    # Raised by all processes: the first of a machine is the one that speaks, and each has files
    # of its own.
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake)
    for mistake in filter(None, mistakes):
        raise DataError(mistake)


def _rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.safetensors"


def _save_random_states(path: Path) -> None:
    """Saves the states of torch, CUDA, numpy and Python as byte and integer tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, internal, gauss_next = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor(
            [] if gauss_next is None else [gauss_next], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, path)


def _load_random_states(path: Path) -> None:
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    gauss_next = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss_next[0] if gauss_next else None))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
