"""Work that ColossalAI 0.5.0 does at every step to no effect, left out.

One function a patch, as in ``patches.py``: nothing fails without these, but a step takes longer
(``benchmarks/train_step.py``). Weights, gradients and losses are the same to the last bit;
``tests/runtime/test_overhead.py`` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.runtime.patches import wrap

# Numbers that are converted to float64 at a time: a mebibyte, which stays in a core's cache.
_BLOCK = 2**17


def apply_all() -> None:
    """Applies every patch."""
    for patch in ALL:
        patch()


def data_parallel_of_one() -> None:
    """``booster/plugin/hybrid_parallel_plugin.py``, ``HybridParallelModule``: DDP around one.

    A process that shares its gradients with nobody gets a DistributedDataParallel all the same,
    which copies every gradient into a bucket and back.
    May go when upstream asks for the group's size.
    """
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

    def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["use_ddp"] = kwargs["use_ddp"] and kwargs["dp_group"].size() > 1
        original(self, *args, **kwargs)

    wrap(HybridParallelModule, "__init__", init)


def reduction_of_one() -> None:
    """``zero/low_level/low_level_optim.py``, ``_run_reduction``: averages over one process.

    With a single process in the group, gradients are copied into a bucket, divided by one, copied
    by a reduce-scatter, and copied back.
    May go when upstream leaves that out.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    def reduce(original: Callable[..., None], self: Any) -> None:
        buckets = self.pg_to_bucket_store.values()
        converts = self._communication_dtype is not None or self._fp8_communication
        if converts or any(bucket.world_size > 1 for bucket in buckets):
            original(self)
            return
        for bucket in buckets:
            if bucket.num_elements_in_bucket() <= 0:
                continue
            bucket.build_grad_in_bucket()
            bucket.reset_num_elements_in_bucket()
            group, gradients = bucket.current_group_id, bucket.get_grad()[0]
            for gradient in gradients:
                parameter = bucket.get_param_id_of_grad(gradient)
                self._add_grad(gradient, 1, group, parameter)
            bucket.reset()

    wrap(LowLevelZeroOptimizer, "_run_reduction", reduce)


def gathering_of_one() -> None:
    """``zero/low_level``, ``TensorBucket.all_gather`` and ``all_gather_into_flat_tensor_nd``.

    With a single process in the group, new weights are copied into a bucket, gathered into
    another, and copied out of it.
    May go when upstream leaves that out.
    """
    from colossalai.zero.low_level import low_level_optim
    from colossalai.zero.low_level.bookkeeping import TensorBucket

    def of_bucket(
        original: Callable[..., None], self: Any, group: Any = None, **kwargs: Any
    ) -> None:
        if not _is_alone(group):
            original(self, group, **kwargs)
            return
        for new, weights in self._write_back_pairs.items():
            weights.data.copy_(new.view_as(weights))
        self.empty()

    def of_tensor(
        original: Callable[..., Any],
        gathered: torch.Tensor,
        own: torch.Tensor,
        group: Any,
        async_op: bool = False,
    ) -> Any:
        if async_op or not _is_alone(group):
            return original(gathered, own, group, async_op)
        gathered.view(-1).copy_(own.view(-1))
        return None

    wrap(TensorBucket, "all_gather", of_bucket)
    wrap(low_level_optim, "all_gather_into_flat_tensor_nd", of_tensor)


def norm_in_blocks() -> None:
    """``_compute_grad_norm`` of the optimizers: a copy of every gradient in float64.

    The norm of a gradient is taken of a copy that is twice or four times as large as itself. On a
    CPU, here, it is added up from blocks that are. (A pipeline's optimizers recognise gradients
    by their identity: these keep the way they have.)
    May go when upstream does not copy.
    """
    from colossalai.booster.plugin import hybrid_parallel_plugin as hybrid
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    def of_list(
        original: Callable[..., float],
        self: Any,
        dp_pg: Any,
        gradients: Sequence[torch.Tensor],
        norm_type: int = 2,
    ) -> float:
        if norm_type == 2:
            gradients = [_shortened(gradient) for gradient in gradients]
        return original(self, dp_pg=dp_pg, gradients=gradients, norm_type=norm_type)

    def of_pairs(
        original: Callable[..., float],
        self: Any,
        pairs: Sequence[tuple[Any, torch.Tensor]],
        norm_type: int = 2,
    ) -> float:
        if norm_type == 2 and self.pp_size == 1:
            pairs = [(parameter, _shortened(gradient)) for parameter, gradient in pairs]
        return original(self, pairs, norm_type)

    wrap(LowLevelZeroOptimizer, "_compute_grad_norm", of_list)
    for optimizer in (hybrid.HybridParallelNaiveOptimizer, hybrid.HybridParallelAMPOptimizer):
        wrap(optimizer, "_compute_grad_norm", of_pairs)


def _shortened(gradient: torch.Tensor) -> torch.Tensor:
    """A tensor of the same Euclidean norm: the norm itself if the gradient is a large one."""
    if gradient.device.type != "cpu" or gradient.numel() <= _BLOCK:
        return gradient
    wide = torch.empty(_BLOCK, dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    for block in gradient.detach().reshape(-1).split(_BLOCK):
        own = wide[: len(block)].copy_(block)
        total += own.dot(own)
    return total.sqrt_()


def _is_alone(group: Any) -> bool:
    groups = group if isinstance(group, tuple) else (group,)
    return all(dist.get_world_size(one) == 1 for one in groups)


ALL = (data_parallel_of_one, reduction_of_one, gathering_of_one, norm_in_blocks)
