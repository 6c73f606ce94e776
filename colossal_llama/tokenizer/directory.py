"""Tokenizer directories in Hugging Face format: which kind, which files."""

from __future__ import annotations

from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.byte_level import SLOW_FILES
from colossal_llama.tokenizer.byte_level_files import is_byte_level, read_byte_level
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.fingerprint import read_fast_json
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
    has_fast, has_slow = (
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )
    # Llama 3's tokenizer.model, where it is there, is none of SentencePiece's.
    if has_fast and (not has_slow or is_byte_level(read_fast_json(directory))):
        return read_byte_level(directory)
    if has_slow:
        return read_sentencepiece(directory)
    raise DataError(
        f"{directory}: no tokenizer here: tokenizer.model and tokenizer.json are both missing"
    )
