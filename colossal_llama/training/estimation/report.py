"""Says an estimate to the user: as a table, as a verdict, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from colossal_llama.training.estimation.estimate import Estimate
from colossal_llama.training.estimation.peak import Moment, micro_batches

if TYPE_CHECKING:
    from colossal_llama.training.estimate import EstimateOptions
    from colossal_llama.training.estimation.advice import Change

GIB = 2**30
# What torch's allocator does not count: the CUDA context, cuBLAS's and NCCL's buffers. A context
# alone takes about half a GiB.
BESIDE_THE_ALLOCATOR = 1 * GIB
PARTS = ("weights", "gradients", "optimizer", "activations", "transient")


def as_text(options: EstimateOptions, fields: dict[str, Any], found: Estimate) -> str:
    """The tables of ``estimate``."""
    lines = [
        _run(options, fields, found),
        "",
        *_memory_table(options, found),
        "",
        *_host_lines(options, found),
        *_disk_lines(options, found),
        "",
        *_assumptions(options),
    ]
    return "\n".join(lines)


def fits(peak: int, device_memory_gib: float) -> bool:
    """Whether a device of this size holds ``peak`` bytes and what is beside the allocator."""
    return peak + BESIDE_THE_ALLOCATOR <= device_memory_gib * GIB


def verdict(device_memory_gib: float, found: Estimate, changes: Sequence[Change]) -> str:
    """Whether the run fits, and what to change."""
    need = f"{size(found.peak)} and 1 GiB beside torch's allocator, of {device_memory_gib:g} GiB"
    if fits(found.peak, device_memory_gib):
        return f"It fits: {need}."
    lines = [f"It does not fit: {need}. In this order, one on top of the other:"]
    width = max((len(change.flags) for change in changes), default=0)
    for change in changes:
        mark = "  fits" if fits(change.peak, device_memory_gib) else ""
        lines.append(f"  {change.flags:<{width}}  {size(change.peak):>10}{mark}  ({change.price})")
    if not changes or not fits(changes[-1].peak, device_memory_gib):
        lines.append("Even so it does not: take larger devices, or a shorter --max_length.")
    return "\n".join(lines)


def as_json(
    options: EstimateOptions, fields: dict[str, Any], found: Estimate, changes: Sequence[Change]
) -> dict[str, Any]:
    """All numbers, in bytes."""

    def moments(stage: dict[str, Moment]) -> dict[str, dict[str, int]]:
        return {name: {**asdict(m), "total": m.total} for name, m in stage.items()}

    memory = options.device_memory_gib
    return {
        "plugin": options.plugin,
        "world_size": options.processes,
        "vocab_size": fields["vocab_size"],
        "parameters": found.parameters,
        "trained_parameters": found.trained,
        "peak_per_device": found.peak,
        "worst_stage": found.worst_stage,
        "stages": [moments(stage) for stage in found.stages],
        "host_per_process": found.host,
        "host_per_process_while_loading": found.host_loading,
        "checkpoint": {**asdict(found.checkpoint), "total": found.checkpoint.total},
        "disk": found.checkpoint.total * (options.keep_last + 1) if options.keep_last else None,
        "fits": None if memory is None else fits(found.peak, memory),
        "changes": [asdict(change) for change in changes],
    }


def size(count: int) -> str:
    """Bytes for people."""
    if count == 0:
        return "0"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 2**10:,.2f} KiB"


def _run(options: EstimateOptions, fields: dict[str, Any], found: Estimate) -> str:
    sizes = "".join(
        f", {name} {value}"
        for name, value in (("tp", options.tp), ("pp", options.pp), ("sp", options.sp))
        if value > 1
    )
    zero = f", ZeRO {options.zero_stage}" if options.plugin == "3d" else ""
    share = "" if found.trained == found.parameters else f", {found.trained:,} of them trained"
    return (
        f"{options.pretrained}: {found.parameters:,} parameters{share}, "
        f"{fields['vocab_size']:,} ids\n"
        f"{options.plugin}{sizes}{zero}, {options.mixed_precision}, "
        f"processes on {options.device}: {options.processes}\n"
        f"tokens a row: {options.max_length:,}, rows a micro-batch: {options.micro_batch_size}, "
        f"micro-batches a step: {micro_batches(options)}"
    )


def _memory_table(options: EstimateOptions, found: Estimate) -> list[str]:
    """A column for each phase of the stage that holds the most."""
    stage = found.stages[found.worst_stage]
    where = f", stage {found.worst_stage} of the pipeline" if options.pp > 1 else ""
    most = found.most(found.worst_stage)
    rows = [[f"per device{where}", *stage]]
    for part in PARTS:
        rows.append([part, *(size(getattr(moment, part)) for moment in stage.values())])
    rows.append(["total", *(size(moment.total) for moment in stage.values())])
    rows.append(["", *("the most" if moment is most else "" for moment in stage.values())])
    if options.pp > 1:
        for index in range(len(found.stages)):
            rows.append([f"most on stage {index}", size(found.most(index).total)])
    first = max(len(row[0]) for row in rows)
    return [
        "  ".join([f"{row[0]:<{first}}", *(f"{c:>16}" for c in row[1:])]).rstrip() for row in rows
    ]


def _host_lines(options: EstimateOptions, found: Estimate) -> list[str]:
    lines = [
        f"host memory of each process: {size(found.host_loading)} while the model is loaded"
        + (f", {size(found.host)} for the optimizer in training" if found.host else "")
    ]
    if options.async_save:
        copy = found.checkpoint.optimizer // options.processes
        lines.append(
            f"  and {size(copy)} while a checkpoint is written in the background, "
            f"{size(found.checkpoint.modeling)} more on the first"
        )
    return lines


def _disk_lines(options: EstimateOptions, found: Estimate) -> list[str]:
    checkpoint = found.checkpoint
    lines = [
        f"checkpoint: {size(checkpoint.total)} (model {size(checkpoint.modeling)}, "
        f"optimizer {size(checkpoint.optimizer)}, other {size(checkpoint.other)})"
    ]
    if options.keep_last:
        disk = checkpoint.total * (options.keep_last + 1)
        lines.append(
            f"disk: {size(disk)} with --keep_last {options.keep_last}: one more is there while it "
            "is written"
        )
    else:
        lines.append("disk: that for every checkpoint; --keep_last removes old ones")
    return lines


def _assumptions(options: EstimateOptions) -> list[str]:
    notes = ["every row is full, and all processes have the same load"]
    if options.accumulation_steps is None:
        notes.append("data are not conversations, which by default take 8 micro-batches a step")
    if options.plugin == "gemini_auto" and options.device == "cuda":
        notes.append(
            "gemini_auto: the least that the device has to hold; it fills what there is more"
        )
    if options.torch_compile:
        notes.append("torch_compile is not counted: it mostly saves activations")
    if options.use_flash_attn and options.sp > 1:
        notes.append("flash attention is not counted with --sp: it saves the matrices of scores")
    notes.append("what torch's allocator loses to fragmentation is not counted")
    return ["Assumed: " + notes[0], *(f"  {note}" for note in notes[1:])]
