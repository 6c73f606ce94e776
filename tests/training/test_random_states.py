"""Random states: after they are restored, every generator goes on as it would have."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from colossal_llama.training.random_states import load_random_states, random_state_tensors


def draw() -> list[Any]:
    """The next numbers of every generator whose state is kept."""
    return [
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(5).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.randint(2**31, size=3).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
        [random.random() for _ in range(3)],
    ]


@pytest.mark.parametrize("in_store", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_restored_exactly(tmp_path: Path, seed: int, in_store: bool) -> None:
    """Python and numpy draw normal deviates in pairs, and keep the second of each."""
    torch.manual_seed(seed)
    np.random.seed(seed + 2**31)
    random.seed(seed)
    draw()
    if not in_store:
        random.gauss(0, 1)
        np.random.standard_normal()
    assert (random.getstate()[2] is not None) == in_store
    assert bool(np.random.get_state()[3]) == in_store
    save_file(random_state_tensors(), tmp_path / "states")
    wanted = draw()
    draw()
    random.seed(0)
    load_random_states(tmp_path / "states")
    assert draw() == wanted


def test_reading_states_disturbs_none() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    wanted = draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    random_state_tensors()
    assert draw() == wanted
