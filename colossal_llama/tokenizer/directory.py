"""Tokenizer directories in Hugging Face format: which kind, which files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.fingerprint import read_fast_json
from colossal_llama.tokenizer.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    read_sentencepiece,
)
from colossal_llama.tokenizer.settings import SETTINGS_FILES

# Everything that belongs to a tokenizer in a model directory.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", *SETTINGS_FILES)


def read_tokenizer(directory: Path) -> ExtensibleTokenizer:
    """Reads and checks a BPE tokenizer directory, SentencePiece or byte-level.

    Raises:
        DataError: it is missing, of another kind, or its two halves disagree.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such tokenizer directory")
    if not (directory / "tokenizer.model").is_file():
        raise DataError(_why_no_model(directory))
    return read_sentencepiece(directory)


def _why_no_model(directory: Path) -> str:
    if not (directory / "tokenizer.json").is_file():
        return f"{directory}: no tokenizer here: tokenizer.model is missing"
    fast = read_fast_json(directory)
    kind = str(fast["model"].get("type"))
    if "ByteLevel" in json.dumps([fast.get("pre_tokenizer"), fast.get("decoder")]):
        kind = f"byte-level {kind}"
    return (
        f"{directory}: a {kind} tokenizer without tokenizer.model; only SentencePiece BPE "
        "tokenizers (Llama 2, Mistral, InternLM) are supported"
    )


def write_tokenizer(
    target: Path, model: Any, fast: dict[str, Any], *, settings_from: Path | None
) -> None:
    """Writes slow and fast files into ``target``; all settings come from ``settings_from``."""
    SentencePieceTokenizer(target, model, fast, {}).write(target, settings_from=settings_from)
