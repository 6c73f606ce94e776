"""Whether gradients are finite, where each kind of optimizer keeps them.

With the real optimizers: ``tests/integration/test_skipped_updates.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_llama.training import gradients

BAD = [float("nan"), float("inf"), float("-inf")]
# 60000 is finite in half precision, the sum of two is not.
GOOD = [[0.0, 0.0], [60000.0, 60000.0], [-60000.0, 60000.0], [1e-7, -1e-7]]


def plain(grads: list[torch.Tensor | None]) -> Any:
    """Full precision without ZeRO: gradients lie with the parameters."""
    parameters = []
    for gradient in grads:
        parameter = nn.Parameter(torch.zeros(2 if gradient is None else len(gradient)).half())
        parameter.grad = gradient
        parameters.append(parameter)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    return SimpleNamespace(optim=SimpleNamespace(param_groups=groups))


def half_precision(grads: list[torch.Tensor | None]) -> Any:
    """The optimizer's own parameters are masters; the gradients lie with the working ones."""
    working = [p for group in plain(grads).optim.param_groups for p in group["params"]]
    masters = [nn.Parameter(torch.zeros(2)) for _ in working]
    return SimpleNamespace(
        optim=SimpleNamespace(param_groups=[{"params": masters}]),
        working_to_master_map=dict(zip(working, masters, strict=True)),
    )


def zero(grads: list[torch.Tensor | None]) -> Any:
    """Gradients lie in a store for each process group, by parameter group."""
    held = [gradient for gradient in grads if gradient is not None]

    class Store:
        def __init__(self, groups: list[list[torch.Tensor]]) -> None:
            self.groups = groups

        def get_working_grads_by_group_id(self, group: int) -> list[torch.Tensor]:
            return self.groups[group]

    stores = {"data": Store([[], held[:1]]), "others": Store([held[1:], []])}
    return SimpleNamespace(pg_to_grad_store=stores, num_param_groups=2)


KINDS = [plain, half_precision, zero]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", range(4))
def test_one_bad_number_anywhere_is_found(
    kind: Callable[[list[torch.Tensor | None]], Any], place: int, bad: float
) -> None:
    values = torch.ones(4, dtype=torch.float16)
    values[place] = bad
    assert not gradients.are_finite(kind([values[:2].clone(), values[2:].clone()]))
    assert gradients.are_finite(kind([torch.ones(2).half(), torch.ones(2).half()]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", GOOD)
def test_large_and_small_numbers_are_finite(
    kind: Callable[[list[torch.Tensor | None]], Any], values: list[float]
) -> None:
    gradient = torch.tensor(values, dtype=torch.float16)
    assert gradients.are_finite(kind([gradient, gradient.clone()]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_gradient_is_passed_over(
    kind: Callable[[list[torch.Tensor | None]], Any],
) -> None:
    """Frozen parameters; a shard that is another process's."""
    assert gradients.are_finite(kind([None, None]))
    assert gradients.are_finite(kind([torch.empty(0).half(), None]))
    assert not gradients.are_finite(kind([None, torch.tensor([torch.nan]).half()]))


def scaled(optimizer: Any, scale: float, least: float | None) -> Any:
    least_scale = None if least is None else torch.tensor([least])
    scaler = SimpleNamespace(scale=torch.tensor([scale]), _min_scale=least_scale)
    optimizer.mixed_precision_mixin = SimpleNamespace(grad_scaler=scaler)
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_overflow_counts_only_at_the_least_loss_scale(
    kind: Callable[[list[torch.Tensor | None]], Any],
) -> None:
    """Above it the optimizer leaves out the update itself, and lowers the scale."""

    def finite(value: float, scale: float, least: float | None) -> bool:
        return gradients.are_finite(scaled(kind([torch.tensor([value]).half()]), scale, least))

    assert finite(torch.inf, 2.0**16, 1)
    assert finite(torch.inf, 2.0, 1)
    assert finite(torch.inf, 2.0, None)
    assert not finite(torch.inf, 1.0, 1)
    assert not finite(torch.inf, 1.0, None)
    assert not finite(torch.inf, 8.0, 8)
    assert finite(3.0, 1.0, 1)


def test_updates_left_out_for_the_loss_scale_are_counted() -> None:
    scaler = SimpleNamespace(_hysteresis_step=2)
    assert gradients.overflows(plain([])) == 0
    for name in ("mixed_precision_mixin", "mixed_precision", "mix_precision_mixin"):
        optimizer = SimpleNamespace(**{name: SimpleNamespace(grad_scaler=scaler)})
        assert gradients.overflows(optimizer) == 2


class Gemini:
    """Counts overflows itself, and clears its chunks only in ``step``."""

    def __init__(self, overflows: int) -> None:
        self.chunk_manager = SimpleNamespace(overflow_counter=torch.tensor([overflows]))
        self.mix_precision_mixin = Mixin()
        self.steps: list[str] = []

    def step(self) -> None:
        self.steps.append("skipped" if self.mix_precision_mixin.should_skip_step() else "made")


class Mixin:
    def should_skip_step(self) -> bool:
        return False


@pytest.mark.parametrize("overflows", [0, 1, 3])
def test_gemini_is_asked_for_its_own_count(overflows: int) -> None:
    assert gradients.are_finite(Gemini(overflows)) == (overflows == 0)


def test_gemini_discards_by_its_own_way_of_leaving_out() -> None:
    optimizer = Gemini(2)
    gradients.discard(optimizer)
    assert optimizer.steps == ["skipped"]
    assert gradients.are_finite(optimizer), "the next step starts from zero"
    optimizer.step()
    assert optimizer.steps == ["skipped", "made"], "the way out is closed again"


def test_others_discard_without_a_step() -> None:
    class Other:
        cleared = 0

        def zero_grad(self) -> None:
            self.cleared += 1

    optimizer = Other()
    gradients.discard(optimizer)
    assert optimizer.cleared == 1
