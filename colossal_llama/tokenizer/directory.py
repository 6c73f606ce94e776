"""Tokenizer directories in Hugging Face format: which kind, which files."""

from __future__ import annotations

from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.byte_level import SLOW_FILES
from colossal_llama.tokenizer.byte_level_files import read_byte_level
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.sentencepiece_tokenizer import read_sentencepiece
from colossal_llama.tokenizer.settings import SETTINGS_FILES

# Everything that belongs to a tokenizer in a model directory.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", *SLOW_FILES, *SETTINGS_FILES)


def read_tokenizer(directory: Path) -> ExtensibleTokenizer:
    """Reads and checks a BPE tokenizer directory, SentencePiece or byte-level.

    Raises:
        DataError: it is missing, of another kind, or its two halves disagree.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such tokenizer directory")
    if (directory / "tokenizer.model").is_file():
        return read_sentencepiece(directory)
    if (directory / "tokenizer.json").is_file():
        return read_byte_level(directory)
    raise DataError(
        f"{directory}: no tokenizer here: tokenizer.model and tokenizer.json are both missing"
    )
