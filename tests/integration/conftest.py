"""A small world to train in: tokenizer, models and data, the same on every machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.seeded_text import code, prose
from tests.nursery import run_group

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAX_LENGTH = 64
# As many key-value heads as heads: tensor and sequence parallelism together divide them by 4.
TIED = {"tie_word_embeddings": True, "num_key_value_heads": 4}


@dataclass(frozen=True)
class World:
    """Paths of what the trainings of this folder start from."""

    model: Path
    tied: Path  # one matrix is input and output embedding
    pretrain: Path
    sft: Path
    out: Path


def call(
    command: list[str], *, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs a command, by default in the repository's root; on failure shows what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def _make(command: str) -> None:
    call([sys.executable, *command.split()])


def train_group(jobs: list[list[str]], out: Path, processes: int = 2) -> str:
    """Runs trainings one after the other in one group of processes; returns what they print."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=out, suffix=".json", encoding="utf-8") as listing:
        json.dump(jobs, listing)
        listing.flush()
        done = run_group("tests/integration/worker.py", listing.name, processes=processes)
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made by the commands a user would call."""
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> World:
    """Makes the world in the empty directory ``root``."""
    text, chat = root / "text.jsonl", root / "chat.jsonl"
    _write_lines(text, _documents())
    _write_lines(chat, _conversations())
    tokenizer = root / "tokenizer"
    _make(f"colossal_llama/tokenizer/train_tokenizer.py --data_input_dirs {text} "
          f"--target_tokenizer_dir {tokenizer} --vocab_size 600")  # fmt: skip
    commands = [
        f"prepare_pretrain_dataset.py --data_input_dirs {text} --tokenizer_dir {tokenizer} "
        f"--data_arrow_output_dir {root / 'pretrain'} --max_length {MAX_LENGTH} "
        "--num_spliced_dataset_bins 8",
        f"prepare_sft_dataset.py --data_input_dirs {chat} --tokenizer_dir {tokenizer} "
        f"--data_arrow_output_dir {root / 'sft'} --max_length 512 --num_spliced_dataset_bins 2",
    ]
    for name, changes in {"model": {}, "tied": TIED}.items():
        preset = root / f"{name}.json"
        preset.write_text(json.dumps(_preset() | changes), encoding="utf-8")
        commands.append(
            f"colossal_llama/model/init_model.py --preset {preset} "
            f"--target_tokenizer_path {tokenizer} --target_model_path {root / name}"
        )
    with ThreadPoolExecutor() as pool:  # none of them needs another's output
        list(pool.map(_make, commands))
    return World(root / "model", root / "tied", root / "pretrain", root / "sft", root / "out")


def _documents() -> list[dict[str, Any]]:
    """Of two categories; long ones, and short ones of which several share a row."""
    sizes = [2000] * 8 + [20, 45, 70, 110] * 12
    return [
        {"source": "", "target": write(size, seed), "category": category}
        for category, write in (("en", prose), ("code", code))
        for seed, size in enumerate(sizes)
    ]


def _conversations() -> list[dict[str, Any]]:
    """Answers of many lengths: batches of rows that need padding."""
    return [
        {
            "messages": [
                {"from": "human", "content": prose(20, seed)},
                {"from": "assistant", "content": prose(500, 100 + seed)[: 30 + 12 * seed]},
            ]
        }
        for seed in range(36)
    ]


def _preset() -> dict[str, Any]:
    """The preset ``tiny`` with weights so large that it matters where attention looks."""
    presets = ROOT / "colossal_llama" / "model" / "presets"
    tiny = json.loads((presets / "tiny.json").read_text(encoding="utf-8"))
    return {**tiny, "initializer_range": 0.1}


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
