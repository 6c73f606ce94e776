"""What to change in a run that does not fit: the cheapest change first, each on top of the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from colossal_llama.training.estimate import EstimateOptions
from colossal_llama.training.estimation.estimate import Estimate, make_estimate
from colossal_llama.training.estimation.peak import micro_batches
from colossal_llama.training.estimation.report import fits


@dataclass(frozen=True)
class Change:
    """Flags to change, why, and the bytes of the fullest device with them."""

    flags: str
    price: str
    peak: int


def suggest(options: EstimateOptions, fields: dict[str, Any], found: Estimate) -> list[Change]:
    """Changes that save memory, until the run fits or nothing is left to change."""
    assert options.device_memory_gib is not None
    changes: list[Change] = []
    best = found.peak
    while not fits(best, options.device_memory_gib):
        step = next(_possible(options), None)
        if step is None:
            break
        flags, price, options = step
        peak = make_estimate(options, fields, options.processes, cuda=options.device == "cuda").peak
        changes.append(Change(flags, price, peak))
        best = peak
    return changes


def _possible(options: EstimateOptions) -> Iterator[tuple[str, str, EstimateOptions]]:
    """Each change that is still open: its flags, its price, and the options with it."""
    if not options.use_grad_checkpoint:
        yield (
            "--use_grad_checkpoint",
            "a step takes about a third longer",
            replace(options, use_grad_checkpoint=True),
        )
    if options.micro_batch_size > 1:
        steps = micro_batches(options) * options.micro_batch_size
        yield (
            f"--micro_batch_size 1 --accumulation_steps {steps}",
            "the same batch in more, smaller pieces",
            replace(options, micro_batch_size=1, accumulation_steps=steps),
        )
    if options.plugin == "3d" and options.zero_stage == 0:
        yield ("--zero 1", "the optimizer is divided", replace(options, zero_stage=1))
    half = options.mixed_precision != "fp32" and not options.fused_loss and not options.lora_rank
    if options.plugin in ("zero2", "zero2_cpu") and options.processes > 1 and half:
        yield (
            "--plugin gemini",
            "weights are divided, too, and gathered for each use",
            replace(options, plugin="gemini"),
        )
    if options.plugin == "zero2":
        yield (
            "--plugin zero2_cpu",
            "the update runs on the CPU",
            replace(options, plugin="zero2_cpu"),
        )
    if options.plugin == "gemini":
        yield (
            "--plugin gemini_auto",
            "masters and moments are in host memory",
            replace(options, plugin="gemini_auto"),
        )
    if options.processes < 1024:
        more = options.processes * 2
        yield (f"--world_size {more}", "twice as many devices", replace(options, world_size=more))
