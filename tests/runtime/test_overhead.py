"""What is left out changes nothing: losses, norms and weights with and without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_llama.runtime import overhead
from tests.nursery import run_group

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    f"{kind} {precision}" for kind in ("zero1", "zero2", "3d") for precision in ("fp32", "bf16")
]


@pytest.fixture(scope="session")
def reports() -> dict[tuple[str, str], dict[str, Any]]:
    """What the worker says, by plugin and side."""
    done = run_group("tests/runtime/overhead_worker.py", processes=1)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["name"], line["side"]): line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_same_losses_norms_and_weights(
    reports: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    without, with_it = reports[name, "without"], reports[name, "with"]
    assert min(without["norms"]) > 0.5, "clipping should bite"
    assert with_it["losses"] == without["losses"]
    assert with_it["norms"] == without["norms"]
    assert with_it["weights"] == without["weights"]


@pytest.mark.parametrize("name", NAMES)
def test_one_process_sends_itself_nothing(
    reports: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    without, with_it = reports[name, "without"], reports[name, "with"]
    assert without["ddp"] or without["calls"], "there was nothing to leave out"
    assert not with_it["ddp"]
    assert not with_it["calls"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2**17, 2**17 + 1, 3 * 2**17 + 5])
def test_norm_of_blocks(dtype: torch.dtype, size: int) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = float(gradient.double().norm())
    assert math.isclose(float(overhead._shortened(gradient).double().norm()), wanted, rel_tol=1e-13)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_of_blocks_tells_what_is_not_finite(value: float) -> None:
    gradient = torch.ones(2**18)
    gradient[-1] = value
    assert not torch.isfinite(overhead._shortened(gradient)).any()


def test_norm_of_a_gradient_that_is_not_contiguous() -> None:
    gradient = torch.randn(600, 500).t()
    wanted = float(gradient.double().norm())
    assert math.isclose(float(overhead._shortened(gradient)), wanted, rel_tol=1e-13)
