"""What is exported: plain transformers loads it, and generation ends where answers do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colossal_llama import storage
from colossal_llama.dataset.chat import templates
from colossal_llama.training.export import finish_model_directory

CHAT_TEMPLATES = Path(templates.__file__).parent / "chat_templates"


def chatml_tokenizer(directory: Path) -> Any:
    """A tokenizer with the two special tokens of ChatML, and its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = (CHAT_TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


def model_directory(path: Path, vocabulary: int, **generation: Any) -> Path:
    """As Booster leaves it: the configuration has what training needed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    settings = storage.read_json(path / "generation_config.json")
    storage.write_json(path / "generation_config.json", {**settings, **generation})
    return path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_generation_ends_with_a_turn(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = chatml_tokenizer(tmp_path)
    directory = model_directory(tmp_path / "modeling", len(tokenizer), temperature=0.6)
    finish_model_directory(directory, tokenizer)
    settings = read(directory / "generation_config.json")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert settings["eos_token_id"] == [tokenizer.eos_token_id, end]
    assert settings["temperature"] == 0.6, "what was there is kept"
    assert read(directory / "config.json")["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    assert model.config.use_cache
    again = AutoTokenizer.from_pretrained(directory)
    assert again.chat_template == tokenizer.chat_template
    text = "Grüße <|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids


def test_generation_config_is_made_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer(tmp_path)
    directory = model_directory(tmp_path / "modeling", len(tokenizer))
    (directory / "generation_config.json").unlink()
    finish_model_directory(directory, tokenizer)
    assert len(read(directory / "generation_config.json")["eos_token_id"]) == 2


@pytest.mark.parametrize("case", ["no template", "turns end with eos"])
def test_otherwise_generation_is_as_it_was(tmp_path: Path, case: str) -> None:
    tokenizer = chatml_tokenizer(tmp_path)
    if case == "no template":
        tokenizer.chat_template = None
    else:
        tokenizer.eos_token = "<|im_end|>"
    directory = model_directory(tmp_path / "modeling", len(tokenizer))
    before = read(directory / "generation_config.json")
    finish_model_directory(directory, tokenizer)
    assert read(directory / "generation_config.json") == before


def test_prefix_setting_is_dropped(tmp_path: Path) -> None:
    """With it transformers may put another space before a text than the tokenizer's files do."""

    def save_pretrained(path: Path) -> None:
        config = {"add_prefix_space": None, "legacy": False}
        storage.write_json(Path(path) / "tokenizer_config.json", config)

    tokenizer = SimpleNamespace(save_pretrained=save_pretrained, chat_template=None)
    directory = model_directory(tmp_path / "modeling", 10)
    finish_model_directory(directory, tokenizer)
    assert read(directory / "tokenizer_config.json") == {"legacy": False}


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The tokenizers library raises a plain Exception, which would pass for a mistake of ours."""
    tokenizer = chatml_tokenizer(tmp_path)
    directory = model_directory(tmp_path / "modeling", len(tokenizer))
    (directory / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        finish_model_directory(directory, tokenizer)
