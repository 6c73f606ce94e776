"""What the flags of ``train.py`` can point at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

# Sizes of the model: divided by 2, 3, 4 and 8.
SIZES = {"num_attention_heads": 48, "num_key_value_heads": 24, "num_hidden_layers": 8}


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Directories that pass for a model, a dataset, a checkpoint and weights of another model."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = {name: tmp_path / name for name in ("model", "data", "checkpoint", "weights")}
    for path in found.values():
        path.mkdir()
    for name, file in (
        ("model", "config.json"),
        ("weights", "config.json"),
        ("checkpoint", "running_states.json"),
    ):
        (found[name] / file).write_text(json.dumps(SIZES), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
