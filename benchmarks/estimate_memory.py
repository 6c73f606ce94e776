"""Does ``colossal-llama estimate`` predict what a run needs?

    python benchmarks/estimate_memory.py

Trains three steps of a random model for each line and prints the most memory that any process
held in a step, and the size of the checkpoint, each beside the prediction. With GPUs the model is
tinyllama-1.1b on all of them, without it is a tiny one on two CPU processes.

On a CPU torch's profiler records what its allocator gives and takes back, from before the model
is loaded: resident memory would say little of a model this small. On CUDA the allocator's own
peak is read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

STEPS = 3
STEP = "measured step"
# On all processes: flags beside --pretrained and --dataset.
CPU_CASES = {
    "zero2": "--plugin zero2 --micro_batch_size 8",
    "zero2, recomputed": "--plugin zero2 --micro_batch_size 8 --use_grad_checkpoint",
    "zero2, few tokens": "--plugin zero2 --micro_batch_size 1",
    "zero2, frozen": "--plugin zero2 --micro_batch_size 4 --freeze_non_embeds_params",
    "zero2, LoRA": "--plugin zero2 --micro_batch_size 4 --lora_rank 8",
    "zero2, fused loss": "--plugin zero2 --micro_batch_size 8 --fused_loss",
    "zero2, documents": "--plugin zero2 --micro_batch_size 8 --attention_across_documents false",
    "gemini": "--plugin gemini --micro_batch_size 8",
    "gemini, recomputed": "--plugin gemini --micro_batch_size 8 --use_grad_checkpoint",
    "gemini, accumulated": "--plugin gemini --micro_batch_size 1 --accumulation_steps 4",
    "3d zero 0": "--plugin 3d --zero 0 --micro_batch_size 2",
    "3d zero 1": "--plugin 3d --zero 1 --micro_batch_size 2",
    "3d tp 2": "--plugin 3d --tp 2 --micro_batch_size 8",
    "3d tp 2, recomputed": "--plugin 3d --tp 2 --micro_batch_size 8 --use_grad_checkpoint",
    "3d pp 2": "--plugin 3d --pp 2 --micro_batch_size 4 --accumulation_steps 4",
    "3d pp 2, recomputed": "--plugin 3d --pp 2 --micro_batch_size 4 --accumulation_steps 4 "
    "--use_grad_checkpoint",
    "3d sp 2": "--plugin 3d --sp 2 --micro_batch_size 8",
}
CUDA_CASES = {
    "zero2": "--plugin zero2 --micro_batch_size 4",
    "zero2, recomputed": "--plugin zero2 --micro_batch_size 8 --use_grad_checkpoint",
    "zero2_cpu": "--plugin zero2_cpu --micro_batch_size 4",
    "gemini": "--plugin gemini --micro_batch_size 4",
    "gemini, accumulated": "--plugin gemini --micro_batch_size 1 --accumulation_steps 4",
    "3d zero 0": "--plugin 3d --zero 0 --micro_batch_size 1",
}


@dataclass(frozen=True)
class Measured:
    """Bytes: the most that each process held in a step, and those of the checkpoint on disk."""

    peaks: list[int]
    checkpoint: int

    @property
    def peak(self) -> int:
        """Of the fullest process."""
        return max(self.peaks)


def measure(jobs: Sequence[Sequence[str]], directory: Path, processes: int) -> list[Measured]:
    """Trains with each list of flags in turn, all in one group of processes."""
    jobs_file = directory / "jobs.json"
    jobs_file.write_text(json.dumps([list(job) for job in jobs]), encoding="utf-8")
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), __file__, "--jobs", str(jobs_file)]
    # Threads of two processes would only wait for each other on a model of this size.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    ranks = [
        json.loads(_result_file(jobs_file, rank).read_text(encoding="utf-8"))
        for rank in range(processes)
    ]
    sizes = [_checkpoint_size(Path(job[job.index("--save_dir") + 1])) for job in map(list, jobs)]
    return [Measured([peaks[index] for peaks in ranks], size) for index, size in enumerate(sizes)]


def predict(job: Sequence[str], processes: int, *, cuda: bool) -> tuple[list[int], int]:
    """The estimate for these flags: the peak of each stage, and the checkpoint's size, in bytes."""
    from colossal_llama import command
    from colossal_llama.model.configuration import read_fields
    from colossal_llama.training.estimate import EstimateOptions, configuration_path
    from colossal_llama.training.estimation.estimate import complete_fields, make_estimate

    options = command.parse(EstimateOptions, [*job, "--world_size", str(processes)])
    path = configuration_path(options)
    found = make_estimate(options, complete_fields(read_fields(path), path), processes, cuda=cuda)
    peaks = [found.most(stage).total for stage in range(len(found.stages))]
    return peaks, found.checkpoint.total


def _checkpoint_size(save_dir: Path) -> int:
    newest = save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def _result_file(jobs_file: Path, rank: int) -> Path:
    return jobs_file.with_suffix(f".rank-{rank}.json")


def work(jobs_file: Path) -> None:
    """One process of the group: trains, and writes what it held beside the jobs."""
    from colossal_llama import command
    from colossal_llama.runtime.distributed import distributed
    from colossal_llama.training.train import TrainOptions, train

    _let_this_thread_free_last()
    peaks = []
    with distributed(seed=0):
        for flags in json.loads(jobs_file.read_text(encoding="utf-8")):
            options = command.parse(TrainOptions, flags)
            with _watched_steps() as steps:
                train(options)
            # Adam's moments appear in the first.
            peaks.append(steps[-1])
    result = _result_file(jobs_file, int(os.environ["RANK"]))
    result.write_text(json.dumps(peaks), encoding="utf-8")


@contextmanager
def _watched_steps() -> Iterator[list[int]]:
    """Gives a list that holds, after the block, the most bytes of each step."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from colossal_llama.training.trainer import Trainer

    original, peaks = Trainer.train_step, []

    def on_cuda(trainer: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        metrics = original(trainer)
        peaks.append(torch.cuda.max_memory_allocated())
        return metrics

    def on_cpu(trainer: Any) -> Any:
        with record_function(STEP):
            return original(trainer)

    cuda = torch.cuda.is_available()
    Trainer.train_step = on_cuda if cuda else on_cpu  # type: ignore[method-assign]
    try:
        if cuda:
            yield peaks
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield peaks
        peaks += _peaks(profiler)
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]


def _peaks(profiler: Any) -> list[int]:
    """The most bytes held within each step."""
    events = profiler.profiler.kineto_results.events()
    steps = [(event.start_ns(), event.end_ns()) for event in events if event.name() == STEP]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks, held = [0] * len(steps), 0
    for moment, change in changes:
        held += change
        for index, (start, end) in enumerate(steps):
            if start <= moment <= end:
                peaks[index] = max(peaks[index], held)
    return peaks


def _let_this_thread_free_last() -> None:
    """Waits after a collective until gloo's thread has let go of its tensors.

    The profiler sees what its own thread frees; what another one freed would seem held for ever.
    """
    from torch.distributed import Work

    wait = Work.wait

    def patient(work: Any, *args: Any) -> Any:
        result = wait(work, *args)
        time.sleep(0.001)
        return result

    Work.wait = patient  # type: ignore[method-assign]


def job_flags(case: str, model: Path, data: Path, save_dir: Path, length: int) -> list[str]:
    """The flags of ``train`` for one of the cases."""
    return [
        *["--pretrained", str(model), "--dataset", str(data), "--save_dir", str(save_dir)],
        *["--max_length", str(length), "--max_steps", str(STEPS), "--mixed_precision", "bf16"],
        *["--save_interval", "0", *case.split()],
    ]


def main() -> None:
    """Prints the table."""
    import torch
    from training_world import make_world

    cuda = torch.cuda.is_available()
    processes = torch.cuda.device_count() if cuda else 2
    cases = CUDA_CASES if cuda else CPU_CASES
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # Weights in fp32: what is read in the working dtype is mapped from the file, not allocated.
        world = (
            make_world(root, "tinyllama-1.1b", "bfloat16", vocab_size=32_000, rows=256, length=2048)
            if cuda
            else make_world(root, "demo", "float32", vocab_size=2_000, rows=128, length=128)
        )
        jobs = [
            job_flags(case, world.model, world.data, root / str(number), world.length)
            for number, case in enumerate(cases.values())
        ]
        found = measure(jobs, root, processes)
        print(f"{'':20} {'memory, MiB':>28} {'checkpoint, MiB':>28}")
        print(f"{'':20} {'predicted  measured':>28} {'predicted  measured':>28}")
        for name, job, measured in zip(cases, jobs, found, strict=True):
            peaks, checkpoint = predict(job, processes, cuda=cuda)
            print(
                f"{name:20} {_row(max(peaks), measured.peak)} "
                f"{_row(checkpoint, measured.checkpoint)}"
            )


def _row(predicted: int, measured: int) -> str:
    error = f"{100 * (predicted / measured - 1):+.1f}%"
    return f"{predicted / 2**20:10,.2f}{measured / 2**20:10,.2f}{error:>8}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        work(arguments.jobs)
    else:
        main()
