"""A small tokenizer learned from English, and the same extended with Chinese pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from colossal_llama import command
from colossal_llama.tokenizer.init_tokenizer import InitTokenizerOptions, init_tokenizer
from colossal_llama.tokenizer.train_tokenizer import TrainTokenizerOptions, train_tokenizer
from tests.model.converting import SHAPE

NEW_PIECES = ["你好", "世界", "你好世界", "，", "▁señor", "▁functional", "程序"]


@pytest.fixture(scope="session")
def old_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    text = directory / "text.txt"
    text.write_text("\n".join(sorted(topics.topics.values())), encoding="utf-8")
    flags = ["--data_input_dirs", text, "--target_tokenizer_dir", directory / "tokenizer"]
    flags += ["--vocab_size", 700]
    assert command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, flags))) == 0
    return directory / "tokenizer"


@pytest.fixture(scope="session")
def new_tokenizer(old_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("new")
    pieces = directory / "pieces.jsonl"
    lines = (json.dumps({"piece": piece}) + "\n" for piece in NEW_PIECES)
    pieces.write_text("".join(lines), encoding="utf-8")
    flags = ["--source_tokenizer_dir", old_tokenizer, "--expand_tokens_file", pieces]
    flags += ["--target_tokenizer_dir", directory / "tokenizer"]
    assert command.run(InitTokenizerOptions, init_tokenizer, list(map(str, flags))) == 0
    return directory / "tokenizer"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the shape of this file's models as a config.json somewhere else."""

    def write(**changes: object) -> Path:
        path = tmp_path / "settings" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(SHAPE.config(**changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def original(old_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model with its tokenizer, that others have wrapped and saved."""
    path = tmp_path_factory.mktemp("original") / "model"
    torch.manual_seed(3)
    config = AutoConfig.for_model(**SHAPE.config(initializer_range=0.3))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    shutil.copytree(old_tokenizer, path, dirs_exist_ok=True)
    return path
