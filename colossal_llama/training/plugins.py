"""The plugins: a table from name to Booster plugin, and where this process stands in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import is_flash_attn_2_available

from colossal_llama.training.arguments import TrainOptions

logger = logging.getLogger(__name__)

# Where the search for a good loss scale starts (Micikevicius et al. 2017, section 3.2).
INITIAL_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Layout:
    """What this process does in the job."""

    data_size: int
    data_rank: int
    # Among the processes that share a data rank, exactly one counts its tokens. Those that
    # report a loss have a part of it each; with pipeline parallelism only the last stage has one.
    counts_tokens: bool
    reports_loss: bool
    # The process whose file of optimizer state is also this one's (itself if it is sharded).
    optimizer_owner: int
    pipeline: bool
    # Sequences are padded to a multiple of this, so that they can be split.
    sequence_multiple: int
    # Over how many ranks the plugin averages gradients.
    gradient_ranks: int
    # The processes among which the vocabulary, or the tokens of a row, are divided.
    tensor_group: Any = None
    sequence_group: Any = None


def build_plugin(options: TrainOptions, accumulation_steps: int) -> Any:
    """The Booster plugin that ``options`` ask for."""
    return BUILDERS[options.plugin](options, accumulation_steps)


def build_layout(options: TrainOptions, plugin: Any) -> Layout:
    """Where this process stands in ``plugin``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if options.plugin != "3d":
        return Layout(
            size, rank, True, True, rank, pipeline=False, sequence_multiple=1, gradient_ranks=size
        )
    mesh = plugin.pg_mesh
    tensor, pipe, sequence = (
        int(mesh.coordinate(axis)) for axis in (plugin.tp_axis, plugin.pp_axis, plugin.sp_axis)
    )
    first = tensor == 0 and sequence == 0
    owner = rank
    if plugin.zero_stage == 0:
        # Data and sequence parallel ranks hold the same state; the first of them keeps it.
        coordinates = list(mesh.coordinate())
        coordinates[plugin.dp_axis] = coordinates[plugin.sp_axis] = 0
        owner = int(mesh.ravel(tuple(coordinates), mesh.shape))
    return Layout(
        data_size=size // (options.tp * options.pp * options.sp),
        data_rank=int(mesh.coordinate(plugin.dp_axis)),
        counts_tokens=first and pipe == 0,
        reports_loss=tensor == 0 and pipe == options.pp - 1,
        optimizer_owner=owner,
        pipeline=options.pp > 1,
        sequence_multiple=options.sp,
        gradient_ranks=size // (options.tp * options.pp),
        tensor_group=plugin.tp_group if options.tp > 1 else None,
        sequence_group=plugin.sp_group if options.sp > 1 else None,
    )


def _common(options: TrainOptions) -> dict[str, Any]:
    return {
        "precision": options.mixed_precision,
        "initial_scale": INITIAL_LOSS_SCALE,
        "max_norm": options.grad_clip,
    }


def _uses_flash_attention(options: TrainOptions) -> bool:
    """Whether ColossalAI's own attention takes the place of transformers'.

    Without flash-attn it wants a full mask, which transformers' SDPA does not; only sequence
    parallelism is better off with it all the same.
    """
    worth_it = is_flash_attn_2_available() or options.sp > 1
    return options.use_flash_attn and torch.cuda.is_available() and worth_it


def _gemini(options: TrainOptions, accumulation_steps: int, placement: str = "static") -> Any:
    from colossalai.booster.plugin import GeminiPlugin

    on_cuda = torch.cuda.is_available()
    return GeminiPlugin(
        **_common(options),
        placement_policy=placement,
        # Costs a second set of gradients, so only where it is used.
        enable_gradient_accumulation=accumulation_steps > 1,
        pin_memory=on_cuda,
        # It frees chunks while another stream still reads them (zero/gemini/chunk/chunk.py,
        # ``reduce``), which torch no longer notices (its pull request 148590).
        enable_async_reduce=False,
        enable_flash_attention=_uses_flash_attention(options),
    )


def _gemini_auto(options: TrainOptions, accumulation_steps: int) -> Any:
    if torch.cuda.is_available():
        return _gemini(options, accumulation_steps, "auto")
    warn = logger.warning if dist.get_rank() == 0 else logger.debug
    warn(
        "gemini_auto balances device memory against host memory; on a CPU there is nothing to "
        "balance, so the placement is static, as with --plugin gemini"
    )
    return _gemini(options, accumulation_steps)


def _zero2(options: TrainOptions, accumulation_steps: int, offload: bool = False) -> Any:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        **_common(options),
        stage=2,
        cpu_offload=offload,
        # Overlapping needs streams, which a CPU does not have.
        overlap_communication=torch.cuda.is_available(),
    )


def _zero2_cpu(options: TrainOptions, accumulation_steps: int) -> Any:
    return _zero2(options, accumulation_steps, offload=True)


def _three_d(options: TrainOptions, accumulation_steps: int) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin

    on_cuda = torch.cuda.is_available()
    sharing = dist.get_world_size() // (options.tp * options.pp)
    return HybridParallelPlugin(
        **_common(options),
        tp_size=options.tp,
        pp_size=options.pp,
        sp_size=options.sp if options.sp > 1 else None,
        enable_sequence_parallelism=options.sp > 1,
        sequence_parallelism_mode="all_to_all" if options.sp > 1 else None,
        # ZeRO shards over data and sequence parallel ranks; over one there is nothing to shard.
        zero_stage=options.zero_stage if sharing > 1 else 0,
        # A pipeline reduces after its last pass, and nobody waits for the other stream then
        # (zero/low_level/low_level_optim.py, ``_sync_grad``).
        overlap_communication=on_cuda and options.pp == 1,
        enable_flash_attention=_uses_flash_attention(options),
        microbatch_size=options.micro_batch_size,
        # Rows differ in length from step to step, so shapes have to be sent every time.
        enable_metadata_cache=False,
    )


BUILDERS: dict[str, Callable[[TrainOptions, int], Any]] = {
    "gemini": _gemini,
    "gemini_auto": _gemini_auto,
    "zero2": _zero2,
    "zero2_cpu": _zero2_cpu,
    "3d": _three_d,
}
