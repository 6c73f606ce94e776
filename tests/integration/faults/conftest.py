"""The process that forks the trainings of this folder, and a run to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import World
from tests.integration.faults.lab import FULL_LENGTH, LAST, Lab, checkpoints


@pytest.fixture(scope="package")
def lab(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    found = Lab(world, tmp_path_factory.mktemp("lab"))
    yield found
    found.close()


@pytest.fixture(scope="package")
def straight(lab: Lab) -> Path:
    """A run without a fault, with a checkpoint of every step."""
    save_dir = lab.root / "straight"
    done = lab.run(FULL_LENGTH, save_dir)
    assert done.codes == [0, 0], done
    assert sorted(checkpoints(save_dir)) == list(range(1, LAST + 1))
    return save_dir
