"""One of several processes that save a checkpoint, fail to save one, and read damaged ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from colossal_llama.training import file_writer
from colossal_llama.training.checkpoint import restore, verify
from colossal_llama.training.file_writer import FileWriter
from tests.training.stand_ins import STATE, Optimizer, checkpoint_files, in_process


def attempt(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def disk_full(*arguments: Any, **settings: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def run(directory: Path) -> dict[str, Any]:
    rank, results = dist.get_rank(), {}
    save_dir = directory / "saved"
    files = checkpoint_files(save_dir)
    writer = FileWriter()
    files.collect(STATE, writer)
    saved = files.publish(STATE, writer)
    results["saved"] = saved.name
    results["files"] = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    results["verified"] = attempt(lambda: verify(saved))

    original = file_writer.save_file
    if rank == 1:
        file_writer.save_file = disk_full
    for late in (False, True):
        state, writer = replace(STATE, step=8), FileWriter(late=late)
        files.collect(state, writer)
        if late:
            writer.start()
        name = "unwritable late" if late else "unwritable"
        results[name] = attempt(lambda state=state, writer=writer: files.publish(state, writer))
    file_writer.save_file = original
    dist.barrier()
    results["left"] = sorted(path.name for path in save_dir.iterdir())

    path = saved / "modeling" / "model.safetensors"
    content = path.read_bytes()
    dist.barrier()
    if rank == 0:
        path.write_bytes(content[:-1])
    dist.barrier()
    results["damaged"] = attempt(lambda: verify(saved))
    dist.barrier()
    if rank == 0:
        path.write_bytes(content)
        (saved / "optimizer" / "rank-00001.safetensors").unlink()
    dist.barrier()
    results["missing"] = attempt(lambda: verify(saved))
    optimizer = Optimizer(nn.Linear(3, 2))
    results["restored"] = attempt(lambda: restore(saved, optimizer, files.layout))
    return results


if __name__ == "__main__":
    in_process(run)
