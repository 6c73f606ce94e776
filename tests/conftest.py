"""Fixtures that several rooms share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Lets Ctrl-C through to the processes that tests start.

    A shell without job control has what it runs in the background ignore it, and children inherit
    that: tests of an interruption would wait for what never comes.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers and corpora beside the checkout; a test that wants them skips without."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real tokenizers and corpora at {path}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: two random layers, a 400-piece SentencePiece tokenizer, 128 positions."""
    import torch
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

    torch.set_num_threads(1)  # more only wait for each other on a model of this size
    path = tmp_path_factory.mktemp("tiny") / "model"
    text = tmp_path_factory.mktemp("tiny-text") / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(text.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    LlamaTokenizerFast(str(text.with_suffix(".model"))).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        torch_dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path
