"""What does the trainer cost beside a bare PyTorch loop, and what does a checkpoint cost?

    python benchmarks/train_step.py                 steps, then checkpoints
    python benchmarks/train_step.py --steps 0       checkpoints only

On a CPU: one process holds a bare loop (Hugging Face's model, torch's fused AdamW) and a trainer
for each plugin. They take turns, step by step, over the same batches, and every step of a trainer
is divided by the bare loop's step beside it: what else the machine does weighs on both. Then
checkpoints of the same model: the trainer's, a plain safetensors write of the same tensors, and
how long training waits with --async_save.

On CUDA: tokens/s, model FLOPs utilisation and memory with each of --use_flash_attn,
--torch_compile and --fused_loss on and off, beside the bare loop.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from training_world import OWN_SHAPE, BareLoop, OurLoop, World, collated, make_world

from colossal_llama.model.configuration import preset_names
from colossal_llama.storage import fsync_file

PLUGINS = {
    "zero2": ["--plugin", "zero2"],
    "3d --zero 0": ["--plugin", "3d", "--zero", "0"],
    "gemini": ["--plugin", "gemini"],
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WARM_UP = 3  # steps that are not counted
CUDA_PRESETS = {"tinyllama-1.1b": 32_000, "hammerllm-1.4b": 105_789}  # and their ids
CUDA_LENGTH = 2048
CUDA_FLAGS = ("--use_flash_attn", "--torch_compile", "--fused_loss")


@dataclass
class Seconds:
    """Wall clock and CPU time of all threads, of one repetition after the other."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Times the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def main() -> None:
    arguments = parse()
    import torch

    from colossal_llama.runtime.distributed import distributed

    temporary = tempfile.TemporaryDirectory(dir=arguments.directory)
    # What the trainer says goes where the progress bars go.
    with temporary as work, distributed(0), redirect_stdout(sys.stderr):
        if torch.cuda.is_available():
            tell(CUDA_HEADER)
            for preset, ids in CUDA_PRESETS.items():
                measure_cuda(Path(work) / preset, preset, ids, arguments)
            return
        tell(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {work}\n")
        if arguments.steps:
            tell(STEP_HEADER)
            for precision in arguments.precisions:
                measure_steps(Path(work), precision, arguments)
        if arguments.saves:
            measure_saves(Path(work), arguments.precisions[0], arguments)


def tell(line: str) -> None:
    """Prints a line of a table."""
    print(line, file=sys.__stdout__, flush=True)


def parse() -> argparse.Namespace:
    """The flags."""
    from colossal_llama.runtime.cpu import bf16_is_fast

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of each loop; 0: none")
    parser.add_argument("--saves", type=int, default=8, help="checkpoints of each kind; 0: none")
    parser.add_argument("--preset", default=OWN_SHAPE, choices=[OWN_SHAPE, *preset_names()])
    parser.add_argument("--vocab_size", type=int, default=16_000, help="of the model (CPU)")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (CPU)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=DTYPES,
        default=["fp32", "bf16"] if bf16_is_fast() else ["fp32"],
    )
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, default=["zero2", "3d --zero 0"])
    parser.add_argument("--directory", help="where to write checkpoints (default: as tempfile)")
    return parser.parse_args()


def world_of(work: Path, precision: str, arguments: argparse.Namespace) -> World:
    """The model and data of the measurements on a CPU."""
    directory = work / precision
    directory.mkdir(parents=True)
    return make_world(
        directory,
        arguments.preset,
        DTYPES[precision],
        vocab_size=arguments.vocab_size,
        rows=(arguments.steps + 4 * arguments.saves + 10) * arguments.rows,
        length=arguments.length,
    )


# Steps on a CPU.

STEP_HEADER = (
    "| precision | loop | s a step: median | least | wall / bare: median (quartiles) | least "
    "| CPU / bare: median | loss differs by |\n|---|---|---|---|---|---|---|---|"
)


def measure_steps(work: Path, precision: str, arguments: argparse.Namespace) -> None:
    """Prints a row for the bare loop and for each plugin."""
    world = world_of(work, precision, arguments)
    flags = ["--mixed_precision", precision, "--micro_batch_size", str(arguments.rows)]
    ours = {
        name: OurLoop(world, work / f"{precision}-{n}", [*PLUGINS[name], *flags])
        for n, name in enumerate(arguments.plugins)
    }
    bare = BareLoop(world, DTYPES[precision], "cpu")
    batches = collated(world, arguments.rows, WARM_UP + arguments.steps)
    seconds = {name: Seconds() for name in ("bare", *ours)}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    for number, batch in enumerate(batches):
        steps: dict[str, Callable[[], float]] = {"bare": lambda batch=batch: bare.step(batch)}
        steps |= {name: loop.step for name, loop in ours.items()}
        # Every second round backwards: none is always the one that follows another.
        for name in list(steps)[:: 1 if number % 2 else -1]:
            counted = seconds[name] if number >= WARM_UP else Seconds()
            with counted.measured():
                losses[name].append(steps[name]())
    for loop in ours.values():
        loop.close()
    for name, own in seconds.items():
        apart = max(abs(a - b) for a, b in zip(losses[name], losses["bare"], strict=True))
        tell(step_row(precision, name, own, seconds["bare"], apart))


def step_row(precision: str, name: str, own: Seconds, bare: Seconds, apart: float) -> str:
    """A row of the table of steps."""
    wall = [a / b for a, b in zip(own.wall, bare.wall, strict=True)]
    cpu = [a / b for a, b in zip(own.cpu, bare.cpu, strict=True)]
    low, middle, high = quartiles(wall)
    return (
        f"| {precision} | {name} | {statistics.median(own.wall):.3f} | {min(own.wall):.3f} "
        f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {min(own.wall) / min(bare.wall):.3f} "
        f"| {statistics.median(cpu):.3f} | {apart:.1e} |"
    )


# Checkpoints on a CPU.

CYCLE = 6  # steps from one checkpoint in the background to the next: it is written by then


def measure_saves(work: Path, precision: str, arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint takes, at once and in the background, beside a plain write."""
    world = world_of(work / "saves", precision, arguments)
    flags = [*PLUGINS[arguments.plugins[0]], "--mixed_precision", precision]
    flags += ["--micro_batch_size", "1", "--save_interval"]
    now = SaveClock(OurLoop(world, work / "now", [*flags, "2"]))
    late = SaveClock(OurLoop(world, work / "late", [*flags, str(CYCLE), "--async_save"]))
    plain: list[float] = []
    for _ in range(arguments.saves):
        now.steps(1)
        plain.append(plain_write(now.loop, work / "plain"))
        remove(work / "plain")
        now.steps(1)  # saves
        late.steps(CYCLE)
    late.steps(1)  # the last one gets its name
    for clock in (now, late):
        clock.loop.close()
    print_saves(now, late, plain)


class SaveClock:
    """Takes steps, and times what the checkpointer does at the end of each."""

    def __init__(self, loop: OurLoop) -> None:
        from colossal_llama.training.checkpointing import Checkpointer

        self.loop = loop
        self.held: list[float] = []  # seconds in the checkpointer at the end of each step
        self.stepping: list[float] = []  # seconds of each step before that
        self.bytes = 0  # of the last checkpoint
        callbacks = loop.trainer.callbacks
        (self._checkpointer,) = (c for c in callbacks if isinstance(c, Checkpointer))

    def steps(self, number: int) -> None:
        """As ``OurLoop.step``; removes, unmeasured, checkpoints that have their name."""
        trainer = self.loop.trainer
        for _ in range(number):
            metrics = trainer.train_step()
            for callback in trainer.callbacks:
                started = time.perf_counter()
                callback.step_ended(trainer, metrics)
                if callback is self._checkpointer:
                    self.held.append(time.perf_counter() - started)
            self.stepping.append(metrics.seconds)
            for checkpoint in self.loop.save_dir.glob("epoch-*"):
                self.bytes = sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors"))
                remove(checkpoint)


def plain_write(loop: OurLoop, directory: Path) -> float:
    """Writes a checkpoint's tensors with safetensors, and flushes them; seconds."""
    from safetensors.torch import save_file

    from colossal_llama.training.optimizer_state import optimizer_tensors
    from colossal_llama.training.random_states import random_state_tensors

    directory.mkdir(exist_ok=True)
    started = time.perf_counter()
    files = {
        "model": loop.trainer.model.unwrap().state_dict(),
        "optimizer": optimizer_tensors(loop.trainer.optimizer),
        "rng": random_state_tensors(),
    }
    for name, tensors in files.items():
        save_file(tensors, directory / name, {"format": "pt"})
        fsync_file(directory / name)
    return time.perf_counter() - started


def remove(directory: Path) -> None:
    """Removes a directory; the disk has forgotten it before what comes next is timed."""
    shutil.rmtree(directory)
    fsync_file(directory.parent)


def print_saves(now: SaveClock, late: SaveClock, plain: list[float]) -> None:
    """Prints the table of checkpoints; the first save of each kind is not counted."""
    cycles = [slice(n - 1, n - 1 + CYCLE) for n in range(CYCLE, len(late.held), CYCLE)]
    held = [sum(late.held[cycle]) for cycle in cycles]
    # In a cycle's last step nothing is written any more; in its second (the first after the
    # copies are taken) it is.
    usual = [late.stepping[cycle][0] for cycle in cycles]
    slowed = [sum(late.stepping[cycle]) for cycle in cycles]
    rows = {
        "plain safetensors write": plain,
        "checkpoint": now.held[1::2],
        "--async_save: training waits": held,
        "--async_save: steps take longer by": [
            total - CYCLE * own for total, own in zip(slowed, usual, strict=True)
        ],
    }
    tell(f"\n{now.bytes / 1e6:.0f} MB of tensors")
    tell("| | median s | least | / plain: median (quartiles) | least |\n|---|---|---|---|---|")
    for name, seconds in rows.items():
        tell(save_row(name, seconds[1:], plain[1:]))


def save_row(name: str, own: list[float], plain: list[float]) -> str:
    """A row of the table of checkpoints."""
    low, middle, high = quartiles([a / b for a, b in zip(own, plain, strict=True)])
    return (
        f"| {name} | {statistics.median(own):.3f} | {min(own):.3f} "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {min(own) / min(plain):.2f} |"
    )


def quartiles(values: Sequence[float]) -> list[float]:
    """The quartiles of ``values``, thrice the only value of one."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3


# Tokens a second on CUDA.

CUDA_HEADER = "| model | loop | tokens/s | / bare | MFU | memory, GiB |\n|---|---|---|---|---|---|"


def measure_cuda(work: Path, preset: str, ids: int, arguments: argparse.Namespace) -> None:
    """Prints a row for the bare loop, for every choice of flags, and for the bare loop again."""
    work.mkdir()
    steps = WARM_UP + arguments.steps
    world = make_world(
        work, preset, "bfloat16", vocab_size=ids, rows=steps * arguments.rows, length=CUDA_LENGTH
    )
    tokens = arguments.rows * CUDA_LENGTH
    bare = run_cuda(bare_loop(world, arguments.rows, steps), arguments.steps)
    tell(cuda_row(world, preset, "bare", tokens, bare, bare))
    choices = itertools.product((False, True), repeat=len(CUDA_FLAGS))
    for number, (chosen, plugin) in enumerate(itertools.product(choices, arguments.plugins)):
        on = [flag for flag, wanted in zip(CUDA_FLAGS, chosen, strict=True) if wanted]
        flags = [*PLUGINS[plugin], "--mixed_precision", "bf16", "--save_interval", "0", *on]
        flags += ["--micro_batch_size", str(arguments.rows)]
        found = run_cuda(our_loop(world, work / f"run-{number}", flags), arguments.steps)
        tell(cuda_row(world, preset, " ".join([plugin, *on]), tokens, found, bare))
    again = run_cuda(bare_loop(world, arguments.rows, steps), arguments.steps)
    tell(cuda_row(world, preset, "bare, again", tokens, again, bare))


@contextmanager
def bare_loop(world: World, rows: int, steps: int) -> Iterator[Callable[[], float]]:
    """Gives a function that takes a step of the bare loop."""
    loop, batches = BareLoop(world, "bfloat16", "cuda"), collated(world, rows, steps)
    yield lambda: loop.step(next(batches))


@contextmanager
def our_loop(world: World, save_dir: Path, flags: Sequence[str]) -> Iterator[Callable[[], float]]:
    """Gives a function that takes a step of the trainer."""
    loop = OurLoop(world, save_dir, flags)
    try:
        yield loop.step
    finally:
        loop.close()


def run_cuda(
    loop: AbstractContextManager[Callable[[], float]], steps: int
) -> tuple[float, int] | None:
    """Seconds a step, and the most bytes that were allocated; None if memory did not suffice."""
    import torch

    # Of the loop before: what an exception held on to is free only now.
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with loop as step:
            for _ in range(WARM_UP):
                step()
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / steps
            return seconds, torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def cuda_row(
    world: World,
    preset: str,
    name: str,
    tokens: int,
    found: tuple[float, int] | None,
    bare: tuple[float, int] | None,
) -> str:
    """A row of the table, for steps of ``tokens`` tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from colossal_llama.training.throughput import flops_per_token, peak_flops

    if found is None:
        return f"| {preset} | {name} | out of memory | | | |"
    seconds, memory = found
    per_second = tokens / seconds
    ratio = "" if bare is None else f"{bare[0] / seconds:.2f}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(world.model))
    flops = flops_per_token(model, world.length)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    share = "" if peak is None else f"{per_second * flops / peak:.1%}"
    return f"| {preset} | {name} | {per_second:,.0f} | {ratio} | {share} | {memory / 2**30:.1f} |"


if __name__ == "__main__":
    main()
