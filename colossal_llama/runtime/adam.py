"""Adam kernels for ``HybridAdam`` where ColossalAI's own cannot be compiled.

``HybridAdam`` (the only optimizer, with its parents, that Gemini accepts) asks two kernel
loaders for compiled code: a C++ kernel for tensors on the CPU, which ColossalAI 0.5.0 offers
only where CUDA is, and a CUDA kernel that it builds with the local nvcc at first use. Both
loaders have an extension point, ``KernelLoader.register_extension``; registered here are
extensions that try ColossalAI's kernel and otherwise run torch's own fused Adam.

May go when the upstream loaders offer a kernel on every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader, KernelLoader

Tensors = Sequence[torch.Tensor]


def register() -> None:
    """Registers the extensions with both loaders; calling it again changes nothing."""
    for loader, extension in (
        (CPUAdamLoader, CpuAdamExtension),
        (FusedOptimizerLoader, CudaAdamExtension),
    ):
        if extension not in loader.REGISTRY:
            # Alone in the registry: the loader would otherwise try the upstream kernels
            # itself and stop at the first that does not compile.
            extension.upstream = list(loader.REGISTRY)
            loader.REGISTRY = [extension]


class _FallbackExtension(_Extension):
    """ColossalAI's kernel where it loads, torch's otherwise."""

    upstream: ClassVar[list[type[_Extension]]] = []

    def __init__(self) -> None:
        super().__init__(name="torch_fused_adam", support_aot=False, support_jit=False)

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None:
        return None

    def build_aot(self) -> Any:
        raise AssertionError("nothing to build: torch ships the kernel")

    build_jit = build_aot

    def fallback(self) -> Any:
        raise AssertionError

    def load(self) -> Any:
        if not torch.cuda.is_available():
            return self.fallback()
        loader = type("_Upstream", (KernelLoader,), {"REGISTRY": self.upstream})
        try:
            return loader().load()
        except Exception as error:  # nvcc missing or of another version: many exceptions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"ColossalAI's Adam kernel was not built ({reason}); using torch's fused Adam",
                stacklevel=2,
            )
            return self.fallback()


class CpuAdamExtension(_FallbackExtension):
    """For parameters on the CPU."""

    def fallback(self) -> Any:
        return SimpleNamespace(CPUAdamOptimizer=TorchCpuAdam)


class CudaAdamExtension(_FallbackExtension):
    """For parameters on a CUDA device."""

    def fallback(self) -> Any:
        return SimpleNamespace(multi_tensor_adam=multi_tensor_adam)


class TorchCpuAdam:
    """Stands in for ColossalAI's ``CPUAdamOptimizer``: one tensor a call."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw: bool
    ) -> None:
        self.adamw = adamw

    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        div_scale: float,
    ) -> None:
        """Updates parameter and moments in place; a positive scale divides the gradient."""
        assert bias_correction, "Adam without bias correction is not used here"
        _fused_step(
            [gradient], [parameter], [exp_avg], [exp_avg_sq],
            lr, (beta1, beta2), eps, step, weight_decay, div_scale, adamw=self.adamw,
        )  # fmt: skip


def multi_tensor_adam(
    chunk_size: int,
    overflow_buffer: torch.Tensor,
    tensors: Sequence[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adamw: int,
    bias_correction: int,
    weight_decay: float,
    div_scale: float,
) -> None:
    """Stands in for ColossalAI's CUDA kernel of the same name: many tensors a call.

    ``tensors`` holds gradients, parameters, first and second moments, in this order.
    """
    assert bias_correction, "Adam without bias correction is not used here"
    gradients, parameters, exp_avgs, exp_avg_sqs = tensors
    _fused_step(
        gradients, parameters, exp_avgs, exp_avg_sqs,
        lr, (beta1, beta2), eps, step, weight_decay, div_scale, adamw=bool(adamw),
    )  # fmt: skip


@torch.no_grad()
def _fused_step(
    gradients: Tensors,
    parameters: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weight_decay: float,
    div_scale: float,
    *,
    adamw: bool,
) -> None:
    """One step of (decoupled) Adam by torch's fused kernel (Kingma & Ba 2014, algorithm 1;
    Loshchilov & Hutter 2017, algorithm 2 with ``adamw``)."""
    # The kernel wants one dtype; a half-precision gradient meets an fp32 master weight here.
    grads = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
    if div_scale > 0:
        grads = [g / div_scale for g in grads]
    update = torch._fused_adamw_ if adamw else torch._fused_adam_
    # The kernel reads the number of this step; it does not count by itself.
    steps = [torch.tensor(float(step), device=p.device) for p in parameters]
    update(
        list(parameters), grads, list(exp_avgs), list(exp_avg_sqs), [], steps,
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
