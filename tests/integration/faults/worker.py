"""Trains in short-lived processes that meet with faults: signals, full disks, NaN, lost files.

    python tests/integration/faults/worker.py

Importing ColossalAI takes longer than a training of this size, so it is done once: the ranks of
every case are forked from this process. A case is a line of JSON on stdin, the answer a line of
JSON on stdout; ``lab.py`` is the other end. Nobody ends a rank whose peer died: one that
has not ended by itself after LONGEST seconds counts as hung.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama import command
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training import resuming
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.optimizer_shares import named_shares, write_shares
from colossal_llama.training.optimizer_state import optimizer_tensors
from colossal_llama.training.state import checkpoints
from colossal_llama.training.tensor_file import save_file
from colossal_llama.training.train import train
from colossal_llama.training.trainer import StepMetrics, Trainer
from tests.nursery_worker import warm_up

LONGEST = 120.0  # seconds
FULL_DISK_BLOCK = "block"  # the file that fills a disk

Action = Callable[[Trainer], None]


def at_steps(steps: list[int], action: Action) -> None:
    """Does ``action`` at the beginning of each of ``steps``."""
    original = Trainer.train_step

    def train_step(trainer: Trainer) -> StepMetrics:
        if trainer.state.step + 1 in steps:
            action(trainer)
        return original(trainer)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def on_save_operations(action: Callable[[str], None]) -> None:
    """Calls ``action`` before each thing that this process does to files of a checkpoint it saves.

    In any thread, and from the first file on: what a killed run left behind is removed before.
    Python tells of most operations before it does them. Libraries written in C or Rust, such as
    safetensors, are not among these: see ``kill_in_write``.
    """
    began = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal began
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            return
        names = [os.fspath(name) for name in arguments if isinstance(name, str | Path)]
        began = began or any(".tmp/" in name for name in names)
        # shutil.rmtree names files relative to an open directory, the last argument.
        inside_rmtree = event in ("os.remove", "os.rmdir") and arguments[-1] >= 0
        if began and (
            inside_rmtree or any("epoch-" in name or ".latest" in name for name in names)
        ):
            action(" ".join([event, *names]))

    sys.addaudithook(watch)


def list_operations(to: str) -> None:
    """Writes a line for each operation on the files of saves."""

    def note(operation: str) -> None:
        with open(to, "a", encoding="utf-8") as stream:
            print(operation, file=stream)

    on_save_operations(note)


def kill_in_save(operation: int) -> None:
    """SIGKILL before the ``operation``-th operation, from 1, on the files of saves."""
    count = 0

    def act(name: str) -> None:
        nonlocal count
        count += 1
        if count == operation:
            print(f"killed before: {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    on_save_operations(act)


def kill_in_write(step: int, bytes: int) -> None:
    """The first file that grows beyond ``bytes`` ends the process, in the midst of a write."""

    def act(trainer: Trainer) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))

    at_steps([step], act)


def limit_files(step: int, bytes: int) -> None:
    """From ``step`` on no file of this process can grow beyond ``bytes``."""
    at_steps([step], lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes)))


def fill_disk(path: str, free: dict[str, int]) -> None:
    """Leaves ``free[step]`` bytes on the file system of ``path`` at the beginning of ``step``."""
    block = Path(path) / FULL_DISK_BLOCK

    def fill(left: int) -> None:
        disk = os.statvfs(path)
        with block.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, disk.f_bavail * disk.f_frsize - left)

    def act(trainer: Trainer) -> None:
        block.unlink(missing_ok=True)
        left = free[str(trainer.state.step + 1)]
        while True:
            # A checkpoint that is being written in the background takes space from us.
            with suppress(OSError):
                return fill(left)

    at_steps([int(step) for step in free], act)


def send(step: int, signals: list[str]) -> None:
    """Sends signals to this process, as ``kill`` does."""

    def act(trainer: Trainer) -> None:
        for name in signals:
            os.kill(os.getpid(), signal.Signals[name])

    at_steps([step], act)


def remove(step: int, path: str) -> None:
    """Removes a directory, or cuts a file to its first page."""

    def act(trainer: Trainer) -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.truncate(path, 4096)

    at_steps([step], act)


def slow(seconds: float) -> None:
    """Every forward pass takes that much longer."""

    def wait(trainer: Trainer) -> None:
        layer = next(m for m in trainer.model.unwrap().modules() if hasattr(m, "o_proj"))
        layer.register_forward_pre_hook(lambda *_: time.sleep(seconds))

    at_steps([1], wait)


def dump_optimizer(step: int, to: str) -> None:
    """Writes the optimizer's state at the beginning of ``step`` as a checkpoint has it."""

    def act(trainer: Trainer) -> None:
        if trainer.layout.optimizer_owner == dist.get_rank():
            path = Path(to) / f"rank-{dist.get_rank():05d}.safetensors"
            save_file(optimizer_tensors(trainer.optimizer), path)
            group = trainer.layout.tensor_group
            shares = named_shares(trainer.model, trainer.optimizer, group)
            write_shares(shares, path.with_suffix(".json"))

    at_steps([step], act)


def see_old_directory() -> None:
    """The file system does not show this process the newest checkpoint yet."""
    resuming.newest_checkpoint = lambda save_dir: checkpoints(save_dir)[-2]


def spoil(steps: list[int], value: str, forward: bool) -> None:
    """One number in the last layer that this process has: of its output, or of its gradient."""
    active = False

    def hurt(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[1] = float(value)
        return tensor

    def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if active and forward:
            return hurt(output)
        if active:
            output.register_hook(hurt)
        return output

    def begin(trainer: Trainer) -> None:
        nonlocal active
        active = True
        modules = trainer.model.unwrap().named_modules()
        last = [module for name, module in modules if name.endswith("mlp.down_proj")][-1]
        handles.append(last.register_forward_hook(hook))

    def end(trainer: Trainer) -> None:
        nonlocal active
        active = False
        while handles:
            handles.pop().remove()

    handles: list[Any] = []
    at_steps(steps, begin)
    at_steps([step + 1 for step in steps], end)  # of what is done at a step, the last comes first


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        list_operations, kill_in_save, kill_in_write, limit_files, fill_disk, send, remove, slow,
        see_old_directory, spoil, dump_optimizer,
    )
}  # fmt: skip


def serve() -> int:
    """Answers case after case; in a rank of a case, returns its exit code."""
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.update(WORLD_SIZE=str(case["ranks"]), MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
        case["jobs"] = [command.parse(TrainOptions, flags) for flags in case["jobs"]]
        ranks = {}
        for rank in range(case["ranks"]):
            pid = os.fork()
            if pid == 0:
                return run_rank(case, rank)
            ranks[pid] = rank
        codes, hung = wait_for(ranks)
        print(json.dumps({"codes": codes, "hung": hung}), flush=True)
    return 0


def wait_for(ranks: dict[int, int]) -> tuple[list[int], list[int]]:
    """Exit codes by rank (a signal's are negative), and the ranks that had to be killed."""
    codes, hung = [0] * len(ranks), []
    deadline = time.monotonic() + LONGEST
    running = dict(ranks)
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if running and time.monotonic() > deadline and not hung:
            hung = sorted(running.values())
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes, hung


def run_rank(case: dict[str, Any], rank: int) -> int:
    """Runs the case's trainings one after the other; the exit code is the first that is not 0."""
    said = os.open(f"{case['out']}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    for fault in case["faults"]:
        if fault.pop("rank", rank) == rank:
            FAULTS[fault.pop("do")](**fault)
    if len(case["jobs"]) == 1:  # as train.py does, process group and all
        code = command.exit_code(lambda: train(case["jobs"][0]))
        for task in Path("/proc/self/task").iterdir():  # Linux only
            if "gloo" in (task / "comm").read_text(encoding="utf-8"):
                print("left behind: a thread of a process group")
        return code
    codes = []
    with distributed(seed=0):
        for options in case["jobs"]:
            torch.manual_seed(0)
            codes.append(command.exit_code(lambda options=options: train(options)))
    return next(filter(None, codes), 0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    warm_up()
    print("ready", flush=True)
    sys.exit(serve())
