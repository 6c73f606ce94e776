"""Changes to ColossalAI 0.5.0 that its extension points do not reach.

One function a patch. Each docstring names the upstream file, the reason, and when the patch
may go; ``tests/runtime/test_patches.py`` shows for each what fails without it. A patch may be
applied again without effect.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def apply_all() -> None:
    """Applies every patch that this device needs."""
    for patch in ALWAYS:
        patch()
    if not torch.cuda.is_available():
        for patch in ON_CPU:
            patch()


def pipeline_backend_check() -> None:
    """``pipeline/p2p.py``, ``_check_for_nccl_hccl_backend``: asks torch for HCCL (Ascend).

    Stock torch has neither ``torch.distributed.is_hccl_available`` nor ``Backend.HCCL``, so
    pipeline parallelism over gloo dies with an AttributeError.
    May go when upstream asks only where HCCL can be.
    """
    from colossalai.pipeline import p2p
    from torch.distributed import distributed_c10d as c10d

    def is_nccl(group: Any) -> bool:
        return (group or c10d._get_default_group()).name() == c10d.Backend.NCCL

    p2p._check_for_nccl_hccl_backend = is_nccl


def zero_device_check() -> None:
    """``zero/low_level/low_level_optim.py``, ``_sanity_checks``: insists on cuda or npu.

    ZeRO 1 and 2 need nothing of the kind. The check of the parameters' dtype stays.
    May go when upstream drops the device assertion.
    """
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    def check_dtypes(self: Any) -> None:
        for group in self.optim.param_groups:
            for parameter in group["params"]:
                if not getattr(parameter, "skip_zero_check", False):
                    assert parameter.dtype == self._dtype, (
                        f"expected parameters of {self._dtype}, got {parameter.dtype}"
                    )

    LowLevelZeroOptimizer._sanity_checks = check_dtypes


def gemini_chunk_placement() -> None:
    """``zero/gemini/chunk/chunk.py``, ``Chunk``: tells shards apart by device *type*.

    "On the compute device" and "offloaded to the CPU" are both ``cpu`` here: Gemini would move
    every shard to the offloaded side and then miss it, in the first step, in the next, or
    between two micro-batches. There is one memory, so every closed chunk reports the placement
    name ``cuda``, as one that computes does on a GPU, and moving a shard does nothing; no
    tensor is put anywhere by that name.
    May go when upstream keeps the placement apart from the device type.
    """
    from colossalai.zero.gemini.chunk.chunk import Chunk

    def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.shard_device = torch.device("cuda")

    def device_type(self: Any) -> str:
        return "cuda" if self.chunk_temp is None else str(self.chunk_temp.device.type)

    def stay(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        assert self.cuda_shard is not None, "a shard is where it computes"

    wrap(Chunk, "__init__", init)
    wrap(Chunk, "shard_move", stay)
    Chunk.device_type = property(device_type)


def gemini_accumulation() -> None:
    """``zero/gemini/chunk/manager.py``, ``rearrange_accumulated_grad_chunk``.

    Gradients of earlier micro-batches are added to those of the next before the reduction,
    which divides by the group's size, so they are multiplied by it first. In a chunk that
    every rank keeps whole, all ranks bring the same sum, and the all-reduce counts it once
    per rank: with two ranks and two equal micro-batches the gradient comes out 1.5 times too
    large. Dividing such a chunk once undoes it.
    May go when upstream leaves gathered chunks unscaled.
    """
    from colossalai.zero.gemini.chunk.manager import ChunkManager

    def rearrange(original: Callable[..., Any], self: Any, chunk: Any) -> Any:
        if chunk.grad_chunk.is_gathered:
            chunk.grad_chunk.cuda_global_chunk.div_(chunk.pg_size)
        return original(self, chunk)

    wrap(ChunkManager, "rearrange_accumulated_grad_chunk", rearrange)


def gemini_skipped_step() -> None:
    """``zero/gemini/gemini_optimizer.py``, ``GeminiOptimizer.step``: forgets that it skipped.

    When an update is left out because gradients overflowed, the mark "gradients are being
    accumulated" stays. The next step adds its gradients to the infinite ones, overflows too, and
    so on for ever: with fp16 and accumulation the first overflow ends the training.
    May go when upstream clears the mark on that path, too.
    """
    from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer

    def step(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        self.module.chunk_manager.accumulating_grads = False
        return result

    wrap(GeminiOptimizer, "step", step)


def gemini_saved_dtype() -> None:
    """``zero/gemini/gemini_ddp.py``, ``_get_chunk_to_save_data``: saves what the chunk holds.

    Without accumulation Gemini saves from the fp32 master weights, to be rounded on the way. A
    chunk that every rank keeps whole is handed out as it is: the model comes out in fp32, twice
    as large as its configuration says and as the same run with accumulation writes.
    May go when upstream rounds gathered chunks, too.
    """
    from colossalai.zero.gemini import GeminiDDP

    def collect(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return {parameter: data.to(self.mixed_precision) for parameter, data in found.items()}

    wrap(GeminiDDP, "_get_chunk_to_save_data", collect)


def gemini_offloaded_weights() -> None:
    """``zero/gemini/gemini_ddp.py``, ``_get_chunk_to_save_data``: saves weights one update old.

    With accumulation Gemini saves the half-precision chunks. One whose master weights are in host
    memory gets the last update only when it is next moved to the device
    (``chunk/chunk.py``, ``optim_update``, ``shard_move``); until then the master has it alone.
    May go when upstream takes such a chunk from its ``paired_chunk``.
    """
    from colossalai.zero.gemini import GeminiDDP

    def collect(original: Callable[..., Any], self: Any, chunk: Any, *args: Any, **kw: Any) -> Any:
        if not chunk.optim_sync_flag:
            chunk.cpu_shard.copy_(chunk.paired_chunk.cpu_shard)
        return original(self, chunk, *args, **kw)

    wrap(GeminiDDP, "_get_chunk_to_save_data", collect)


def detached_padding() -> None:
    """``tensor/padded_tensor/api.py``, ``_hijack_back_detach_and_clone``.

    A pipeline pads the vocabulary to a multiple of 64 and, to save the model, removes the
    padding from a *detached* embedding. Detaching copies the padding's size but not the saved
    methods that removing it wants to put back: AttributeError ``_unpad_detach``.
    May go when upstream gives a detached tensor its methods.
    """
    from colossalai.tensor.padded_tensor import api

    def restore(original: Callable[..., torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        return original(tensor) if hasattr(tensor, "_unpad_detach") else tensor

    wrap(api, "_hijack_back_detach_and_clone", restore)


def scaled_bf16_gradients() -> None:
    """``nn/optimizer/hybrid_adam.py``, ``HybridAdam.step``: drops the scale of bf16 gradients.

    Gemini clips by handing the step a divisor for its gradients. For a parameter on the CPU
    whose gradient is bf16, ``step`` takes a path that never looks at it: the gradient norm is
    reported and nothing is clipped.
    May go when upstream divides on that path, too.
    """
    from colossalai.nn.optimizer import HybridAdam

    def step(
        original: Callable[..., Any], self: Any, closure: Any = None, div_scale: float = -1
    ) -> Any:
        self._div_scale = div_scale
        return original(self, closure, div_scale)

    def update(
        original: Callable[..., None],
        self: Any,
        data: torch.Tensor,
        gradient: torch.Tensor,
        *args: Any,
    ) -> None:
        gradient = gradient.to(data.dtype)
        if self._div_scale > 0:
            gradient = gradient / self._div_scale
        original(self, data, gradient, *args)

    wrap(HybridAdam, "step", step)
    wrap(HybridAdam, "torch_adam_update", update)


def norm_of_a_frozen_stage() -> None:
    """``booster/plugin/hybrid_parallel_plugin.py``, ``_compute_grad_norm``: leaves stages waiting.

    The norm is summed over the stages of a pipeline. One that has no gradient, because all its
    weights are frozen, or all those of a parameter group, whose norms ZeRO takes one by one,
    returns 0 before the sum, for which the others wait for ever. Here it adds 0 to the sum.
    May go when upstream lets every stage enter the sum.
    """
    from colossalai.accelerator import get_accelerator
    from colossalai.booster.plugin import hybrid_parallel_plugin as hybrid

    def norm_of_others(*groups: Any) -> float:
        squares = torch.zeros(1, device=get_accelerator().get_current_device())
        for group in groups:
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(squares, group=group)
        return math.sqrt(squares.item())

    def norm(original: Callable[..., float], self: Any, pairs: Any, norm_type: int = 2) -> float:
        if pairs or norm_type != 2:
            return original(self, pairs, norm_type)
        return norm_of_others(self.tp_pg, self.pp_pg)

    def zero_norm(
        original: Callable[..., float], self: Any, dp_pg: Any, gradients: Any, norm_type: int = 2
    ) -> float:
        if gradients or norm_type != 2:
            return original(self, dp_pg, gradients, norm_type)
        return norm_of_others(dp_pg, self.tp_pg, self.pp_pg)  # in upstream's order

    wrap(hybrid.HybridParallelNaiveOptimizer, "_compute_grad_norm", norm)
    wrap(hybrid.HybridParallelAMPOptimizer, "_compute_grad_norm", norm)
    wrap(hybrid.HybridParallelZeroOptimizer, "_compute_grad_norm", zero_norm)


def zero_on_a_frozen_stage() -> None:
    """``zero/low_level/low_level_optim.py``, ``LowLevelZeroOptimizer``: asks the first weight.

    It takes its dtype from the first weight of the first parameter group. Where a stage of a
    pipeline trains none of that group, there is none: IndexError. Here there is an empty one,
    which is frozen, and so goes the way of all frozen weights: it is left out.
    May go when upstream looks no further than ``forced_dtype``, which a pipeline gives.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    def init(
        original: Callable[..., None], self: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        weights = optimizer.param_groups[0]["params"]
        if not weights:
            weights.append(torch.nn.Parameter(torch.empty(0), requires_grad=False))
        original(self, optimizer, *args, **kwargs)

    wrap(LowLevelZeroOptimizer, "__init__", init)


def frozen_shared_weights() -> None:
    """``booster/plugin/hybrid_parallel_plugin.py``, ``HybridParallelModule``: adds up no gradients.

    The embeddings of a tied model are on two stages of a pipeline, which add up their gradients,
    and ask ZeRO for them to take the norm. Where they are frozen there are none: TypeError and
    KeyError. Here only what trains counts as shared.
    May go when upstream leaves frozen weights out.
    """
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

    def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # The same on every stage, also on those that have none of the weights.
        trains = [all(w.requires_grad for w in weights.values()) for weights in self.shared_params]
        for name in ("shared_params", "shared_param_process_groups"):
            setattr(self, name, list(itertools.compress(getattr(self, name), trains)))

    wrap(HybridParallelModule, "__init__", init)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces ``owner.name`` by ``wrapper(original, *args)``, once for each wrapper."""
    original = getattr(owner, name)
    already = getattr(original, "_patched_by", ())
    if wrapper.__qualname__ in already:
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patched._patched_by = (*already, wrapper.__qualname__)  # type: ignore[attr-defined]
    setattr(owner, name, patched)


ALWAYS = (
    pipeline_backend_check,
    gemini_accumulation,
    gemini_skipped_step,
    gemini_saved_dtype,
    gemini_offloaded_weights,
    detached_padding,
    scaled_bf16_gradients,
    norm_of_a_frozen_stage,
    zero_on_a_frozen_stage,
    frozen_shared_weights,
)
ON_CPU = (zero_device_check, gemini_chunk_placement)
