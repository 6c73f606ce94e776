"""Shows for each change to ColossalAI what happens without it and with it.

    torchrun --nproc_per_node 2 tests/runtime/patch_worker.py

All in one process group, because importing ColossalAI takes longer than everything else. The
first process prints a line of JSON a check: {"name", "without", "with"}. What a check raises is
its result, as text.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.runtime import adam, patches
from colossal_llama.runtime.distributed import distributed
from colossal_llama.runtime.rope import restore_rope_frequencies

WIDTH = 32
LAST = "--- all that is meant to fail has failed"


def attempt(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()


def report(name: str, without: Any, with_it: Any) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"name": name, "without": without, "with": with_it}), flush=True)


def layers(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).to(dtype)


def inputs() -> torch.Tensor:
    """The same on every rank: averaging over ranks changes nothing."""
    torch.manual_seed(1)
    return torch.randn(4, WIDTH, dtype=torch.bfloat16)


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = LlamaConfig(**sizes | changes)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def boosted(plugin: Any, model: nn.Module) -> tuple[Any, Any, Any]:
    from colossalai.booster import Booster
    from colossalai.nn.optimizer import HybridAdam

    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.01))
    return booster, model, optimizer


def losses(plugin: Any, steps: int = 3, micro_batches: int = 1) -> list[float]:
    """The loss of each step, or what its micro-batches add up to."""
    booster, model, optimizer = boosted(plugin, layers())
    found = []
    for _ in range(steps):
        parts = []
        for _ in range(micro_batches):
            loss = model(inputs()).float().square().mean()
            booster.backward(loss / micro_batches, optimizer)
            parts.append(float(loss.detach()) / micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(parts))
    return found


def pipeline_backend_check() -> list[float] | None:
    """The first of two stages sends a tensor to the second; returns what arrives."""
    from colossalai.cluster import ProcessGroupMesh
    from colossalai.pipeline.p2p import PipelineP2PCommunication
    from colossalai.pipeline.stage_manager import PipelineStageManager

    stages = PipelineStageManager(ProcessGroupMesh(2), pipeline_axis=0)
    channel = PipelineP2PCommunication(stages, overlap_p2p=False)
    arrived = torch.zeros(2)
    if stages.is_first_stage():
        channel.send_forward(torch.tensor([1.0, 2.0]))
    else:
        received, _ = channel.recv_forward()
        arrived.copy_(received)
    dist.broadcast(arrived, src=1)
    return arrived.tolist()


def zero2() -> Any:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(stage=2, precision="bf16", overlap_communication=False)


def zero_device_check() -> list[float]:
    return losses(zero2())


def zero_dtype_check() -> None:
    """What the check of the device stood beside, and has to stay: weights of one dtype."""
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.zero import LowLevelZeroOptimizer

    model = nn.Sequential(layers(torch.bfloat16), layers(torch.float32))
    LowLevelZeroOptimizer(HybridAdam(model.parameters()))


def gemini(chunks: str, **settings: Any) -> Any:
    """A plugin whose chunks are divided over the ranks ("sharded") or whole ("gathered")."""
    from colossalai.booster.plugin import GeminiPlugin

    # Models smaller than one chunk of the smallest size are kept whole.
    smallest = 32 if chunks == "gathered" else WIDTH * WIDTH / 2**20
    return GeminiPlugin(
        placement_policy="static", pin_memory=False, enable_async_reduce=False,
        min_chunk_size_m=smallest, search_range_m=1, hidden_dim=WIDTH,
        **{"precision": "bf16", **settings},
    )  # fmt: skip


def gemini_chunk_placement() -> list[list[float]]:
    """Several steps, and several micro-batches: shards are missed at different moments."""
    return [
        losses(gemini("sharded")),
        losses(gemini("sharded", enable_gradient_accumulation=True), micro_batches=2),
    ]


def accumulated_norm(chunks: str, micro_batches: int) -> float:
    booster, model, optimizer = boosted(
        gemini(chunks, enable_gradient_accumulation=True, max_norm=1.0), layers()
    )
    assert {chunk.keep_gathered for chunk in optimizer.chunk16_set} == {chunks == "gathered"}
    for _ in range(micro_batches):
        booster.backward(model(inputs()).float().square().mean(), optimizer)
    optimizer.step()
    return float(optimizer.get_grad_norm())


def gemini_accumulation() -> dict[str, float]:
    """How much larger the gradient of two equal micro-batches is than that of one."""
    return {
        chunks: accumulated_norm(chunks, 2) / accumulated_norm(chunks, 1)
        for chunks in ("gathered", "sharded")
    }


def gemini_skipped_step() -> list[bool]:
    """A loss too large for fp16 at the first step, of two micro-batches, then sound ones."""
    plugin = gemini("gathered", precision="fp16", enable_gradient_accumulation=True)
    booster, model, optimizer = boosted(plugin, layers(torch.float16))
    chunks = optimizer.chunk_manager
    overflows = []
    for factor in (1e5, 1.0, 1.0):
        for _ in range(2):
            booster.backward(model(inputs().half()).float().square().mean() * factor, optimizer)
        overflows.append(int(chunks.overflow_counter) > 0)
        optimizer.step()
        optimizer.zero_grad()
    return overflows


def gemini_saved_dtype() -> dict[str, list[str]]:
    """The dtypes of what is saved, where master weights stand in for the working ones."""
    found = {}
    for chunks in ("gathered", "sharded"):
        _, model, _ = boosted(gemini(chunks), layers())
        found[chunks] = sorted({str(tensor.dtype) for tensor in model.state_dict().values()})
    return found


def gemini_offloaded_weights() -> bool:
    """Whether what is saved is what the masters became in host memory."""
    _, model, _ = boosted(gemini("sharded", enable_gradient_accumulation=True), layers())
    chunk = model.chunk_manager.get_chunk(next(iter(model.fp16_params)))
    for one in (chunk, chunk.paired_chunk):
        assert not one.is_gathered
        one.cpu_shard, one.cuda_shard = one.cuda_shard, None
    chunk.paired_chunk.cpu_shard.fill_(2)
    chunk.optim_sync_flag = False  # as ``optim_update`` leaves it, which looks at device types
    saved = model._get_chunk_to_save_data(chunk, False)
    return all(bool((tensor == 2).all()) for tensor in saved.values())


def detached_padding() -> list[int]:
    from colossalai.tensor.padded_tensor import to_padded_tensor, to_unpadded_tensor

    padded = to_padded_tensor(torch.ones(5, 2), 8, 0)
    return list(to_unpadded_tensor(padded.detach()).shape)


def adam_drift(grad_dtype: torch.dtype, div_scale: float) -> float:
    """Largest difference of ``HybridAdam`` to torch's AdamW after four steps.

    As in Gemini, master weights are fp32, gradients of a lower precision, and the scale (loss
    scale times clipping) is handed to the step. Gradients differ in size by step: Adam would
    not notice a scale that is always the same.
    """
    from colossalai.nn.optimizer import HybridAdam

    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(300)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = HybridAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(4):
        gradient = (torch.randn(300) * 10**step).to(grad_dtype)
        scale = div_scale * 10**step
        master, ours.data = ours.data, gradient
        ours.grad = gradient
        ours.data = master
        theirs.grad = gradient.float() / (scale if scale > 0 else 1)
        optimizer.step(div_scale=scale if scale > 0 else -1)
        reference.step()
    return float((ours.detach() - theirs.detach()).abs().max())


def adam_kernels() -> dict[str, float]:
    return {
        f"{name} {scale}": adam_drift(dtype, scale)
        for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16))
        for scale in (-1.0, 3.0)
    }


def scaled_bf16_gradients() -> dict[str, float]:
    return {f"bf16 {scale}": adam_drift(torch.bfloat16, scale) for scale in (-1.0, 3.0)}


def norm_of_a_frozen_stage() -> dict[str, float]:
    """What a stage without gradients takes for the norm, which is that of the other one's: 5."""
    from colossalai.booster.plugin import hybrid_parallel_plugin as hybrid

    pipeline = dist.group.WORLD
    stage = SimpleNamespace(tp_pg=None, pp_pg=pipeline, tp_size=1, pp_size=2, shared_params=[])
    found = {}
    for kind in ("Naive", "AMP", "Zero"):
        compute = getattr(hybrid, f"HybridParallel{kind}Optimizer")._compute_grad_norm
        if dist.get_rank() == 0:
            found[kind] = compute(stage, None, []) if kind == "Zero" else compute(stage, [])
        if dist.get_rank() == 1 or found[kind] == 0:  # which left the other one waiting
            dist.all_reduce(torch.full((1,), 25.0 * dist.get_rank()), group=pipeline)
    return found


def zero_on_a_frozen_stage() -> bool:
    """Whether ZeRO trains the second parameter group where the first one has become empty."""
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.zero import LowLevelZeroOptimizer

    model = layers()
    before = model[1].weight.clone()
    adam = HybridAdam([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    adam.param_groups[0]["params"] = []
    optimizer = LowLevelZeroOptimizer(adam, forced_dtype=torch.bfloat16)
    optimizer.backward(model(inputs()).float().square().mean())
    optimizer.step()
    return adam.param_groups[0]["params"] == [] and not torch.equal(before, model[1].weight)


def frozen_shared_weights() -> list[int]:
    """How many weights of a tied model two stages share, with and without the frozen one."""
    from colossalai.booster.plugin import HybridParallelPlugin

    found = []
    for trains in (True, False):
        model = llama(num_hidden_layers=2, tie_word_embeddings=True)
        model.get_input_embeddings().weight.requires_grad = trains
        plugin = HybridParallelPlugin(
            tp_size=1, pp_size=2, num_microbatches=2, zero_stage=0, precision="bf16"
        )
        _, model, _ = boosted(plugin, model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        model.sync_shared_params()
        found.append(len(model.shared_params))
    return found


def multi_tensor_kernel() -> float:
    """The stand-in for the CUDA kernel, which runs on any device, against torch's AdamW."""
    torch.manual_seed(0)
    ours = [torch.ones(7), torch.ones(3, 5)]
    theirs = [nn.Parameter(tensor.clone()) for tensor in ours]
    moments = [[torch.zeros_like(tensor) for tensor in ours] for _ in range(2)]
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 5):
        gradients = [torch.randn_like(tensor).bfloat16() * step for tensor in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.float() / (2.0 * step * step)
        reference.step()
        adam.multi_tensor_adam(
            0, torch.zeros(1), [gradients, ours, *moments],
            0.1, 0.9, 0.95, 1e-8, step, 1, 1, 0.1, 2.0 * step * step,
        )  # fmt: skip
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def accelerator_calls() -> list[str]:
    """What ColossalAI asks of its accelerator that the one installed does not answer."""
    from colossalai.accelerator import get_accelerator

    silent = []
    for name, *arguments in (
        ("current_device",), ("device_count",), ("get_device_name",), ("synchronize",),
        ("get_rng_state",), ("manual_seed", 0), ("manual_seed_all", 0), ("initial_seed",),
        ("empty_cache",), ("memory_allocated",), ("max_memory_allocated",),
        ("reset_peak_memory_stats",), ("Stream",), ("Event",), ("current_stream",),
        ("default_stream",), ("set_stream", None), ("stream", None),
    ):  # fmt: skip
        try:
            getattr(get_accelerator(), name)(*arguments)
        except Exception:
            silent.append(name)
    return silent


def rope_after_boost() -> list[float]:
    """Relative error of the inverse frequencies: as a plugin leaves them, and restored."""
    exact = llama().float()
    restore_rope_frequencies(exact)
    wanted = exact.model.rotary_emb.inv_freq
    _, model, _ = boosted(zero2(), llama())
    errors = []
    for _ in range(2):
        found = model.unwrap().model.rotary_emb.inv_freq
        errors.append(float(((found.float() - wanted) / wanted).abs().max()))
        restore_rope_frequencies(model.unwrap())
    return errors


def step_with_tensor_parallelism() -> float:
    from colossalai.booster.plugin import HybridParallelPlugin

    booster, model, optimizer = boosted(
        HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="bf16"), llama()
    )
    ids = torch.arange(16).repeat(2, 1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    booster.backward(loss, optimizer)
    optimizer.step()
    return float(loss.detach())


CHECKS = (
    (pipeline_backend_check, patches.pipeline_backend_check),
    (zero_device_check, patches.zero_device_check),
    (gemini_chunk_placement, patches.gemini_chunk_placement),
    (gemini_accumulation, patches.gemini_accumulation),
    (gemini_skipped_step, patches.gemini_skipped_step),
    (gemini_saved_dtype, patches.gemini_saved_dtype),
    (gemini_offloaded_weights, patches.gemini_offloaded_weights),
    (detached_padding, patches.detached_padding),
    (scaled_bf16_gradients, patches.scaled_bf16_gradients),
    (norm_of_a_frozen_stage, patches.norm_of_a_frozen_stage),
    (zero_on_a_frozen_stage, patches.zero_on_a_frozen_stage),
    (frozen_shared_weights, patches.frozen_shared_weights),
)


def main() -> None:
    from colossalai.accelerator import get_accelerator, set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    # The process group starts without what is tested, which then comes piece by piece.
    apply_all, patches.apply_all = patches.apply_all, lambda: None
    register, adam.register = adam.register, lambda: None
    with distributed(seed=0):
        ours = get_accelerator()
        set_accelerator(CpuAccelerator())
        without = attempt(accelerator_calls)
        set_accelerator(ours)
        report("accelerator", without, attempt(accelerator_calls))
        without = attempt(adam_kernels)
        register()
        report("adam_kernels", without, attempt(adam_kernels))
        report("multi_tensor_kernel", None, attempt(multi_tensor_kernel))
        for check, patch in CHECKS:
            without = attempt(check)
            patch()
            report(check.__name__, without, attempt(check))
        report("zero_dtype_check", None, attempt(zero_dtype_check))
        report("rope", *attempt(rope_after_boost))
        for _ in range(2):
            register()
            apply_all()
        report("again", None, {check.__name__: attempt(check) for check, _ in CHECKS})
        # Plugins that did not come to life complain when they are collected; what follows
        # this line is said by the last training and by the end of the process.
        print(LAST, file=sys.stderr, flush=True)
        report("tensor_parallel", None, attempt(step_with_tensor_parallelism))


if __name__ == "__main__":
    main()
