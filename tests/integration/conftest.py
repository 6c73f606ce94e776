"""A small world to train in: tokenizer, model and data made from text of this Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAX_LENGTH = 64


@dataclass(frozen=True)
class World:
    """Paths of what the trainings of this folder start from."""

    model: Path
    pretrain: Path
    sft: Path
    out: Path


def call(
    command: list[str], *, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs a command, by default in the repository's root; on failure shows what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def _make(command: str) -> None:
    call([sys.executable, *command.split()])


def train_group(jobs: list[list[str]], out: Path, processes: int = 2) -> str:
    """Runs trainings one after the other in one group of processes; returns what they print."""
    out.mkdir(parents=True, exist_ok=True)
    listing = out / "jobs.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    done = call([*launcher, "tests/integration/worker.py", str(listing)])
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made by the commands a user would call."""
    root = tmp_path_factory.mktemp("world")
    text, chat = root / "text.jsonl", root / "chat.jsonl"
    documents = [text for text in sorted(topics.values()) if len(text) > 2000][:12]
    with text.open("w", encoding="utf-8") as stream:
        for document in documents:
            record = {"source": "", "target": document[:2000], "category": "en"}
            stream.write(json.dumps(record) + "\n")
    with chat.open("w", encoding="utf-8") as stream:
        for number, document in enumerate(documents * 3):
            # Answers of many lengths: batches of rows that need padding.
            answer = document[200 : 230 + 3 * number]
            turns = [
                {"from": "human", "content": document[100:120]},
                {"from": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    tokenizer, model = root / "tokenizer", root / "model"
    _make(f"colossal_llama/tokenizer/train_tokenizer.py --data_input_dirs {text} "
          f"--target_tokenizer_dir {tokenizer} --vocab_size 600")  # fmt: skip
    _make(f"colossal_llama/model/init_model.py --preset tiny "
          f"--target_tokenizer_path {tokenizer} --target_model_path {model}")  # fmt: skip
    _make(f"prepare_pretrain_dataset.py --data_input_dirs {text} --tokenizer_dir {tokenizer} "
          f"--data_arrow_output_dir {root / 'pretrain'} --max_length {MAX_LENGTH} "
          "--num_spliced_dataset_bins 8")  # fmt: skip
    _make(f"prepare_sft_dataset.py --data_input_dirs {chat} --tokenizer_dir {tokenizer} "
          f"--data_arrow_output_dir {root / 'sft'} --max_length 512 "
          "--num_spliced_dataset_bins 2")  # fmt: skip
    return World(model, root / "pretrain", root / "sft", root / "out")
