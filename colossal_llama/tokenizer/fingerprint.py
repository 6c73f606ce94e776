"""What a tokenizer directory says about itself: its pieces by id, their number, a fingerprint.

Read from ``tokenizer.json`` as plain JSON, so that a check at a stage's door costs no import of
a tokenizer library. A directory that only holds ``tokenizer.model`` is converted in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json


def tokenizer_fingerprint(directory: Path) -> str:
    """SHA-256 (hexadecimal) over id -> piece, added tokens included, and the merge order.

    Two tokenizers with the same fingerprint give the same ids, their normaliser apart. It does
    not depend on how the JSON is laid out.

    Raises:
        DataError: ``directory`` holds no tokenizer.
    """
    fast = read_fast_json(directory)
    content = {"pieces": _pieces(directory, fast), "merges": _merges(fast)}
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def vocabulary_size(directory: Path) -> int:
    """The number of ids, added tokens included: an embedding needs at least so many rows.

    Raises:
        DataError: ``directory`` holds no tokenizer.
    """
    return len(id_to_piece(directory))


def id_to_piece(directory: Path) -> list[str | None]:
    """The piece of every id from 0; None for an id that no piece uses.

    Raises:
        DataError: ``directory`` holds no tokenizer.
    """
    return _pieces(directory, read_fast_json(directory))


def read_fast_json(directory: Path) -> dict[str, Any]:
    """The content of ``tokenizer.json``, or what it would be where there is only a slow model.

    Raises:
        DataError: ``directory`` holds no tokenizer, or its JSON is not a tokenizer's.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return _convert(directory)
    fast = read_json(path)
    if not isinstance(fast, dict) or not isinstance(fast.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer: it has no model section")
    if not isinstance(fast["model"].get("vocab"), dict | list):
        raise DataError(f"{path}: not a tokenizer: its model has no vocab")
    return fast


def added_tokens(directory: Path, fast: dict[str, Any]) -> dict[int, str]:
    """Id -> text of the tokens that are matched before the model sees the text.

    Raises:
        DataError: a file that lists them is not built as transformers builds it.
    """
    try:
        return _added_tokens(directory, fast)
    except (AttributeError, TypeError, ValueError, KeyError):
        raise DataError(
            f"{directory}: its added tokens cannot be read; look at added_tokens in "
            "tokenizer.json, tokenizer_config.json and added_tokens.json"
        ) from None


def _added_tokens(directory: Path, fast: dict[str, Any]) -> dict[int, str]:
    tokens = {int(token["id"]): str(token["content"]) for token in fast.get("added_tokens") or []}
    config = directory / "tokenizer_config.json"
    if config.is_file():
        decoder = read_json(config).get("added_tokens_decoder") or {}
        tokens.update({int(key): str(token["content"]) for key, token in decoder.items()})
    extra = directory / "added_tokens.json"
    if extra.is_file():
        tokens.update({int(key): str(text) for text, key in read_json(extra).items()})
    return tokens


def _pieces(directory: Path, fast: dict[str, Any]) -> list[str | None]:
    vocabulary = fast["model"]["vocab"]
    if isinstance(vocabulary, dict):
        by_id = {int(key): str(piece) for piece, key in vocabulary.items()}
    else:  # Unigram: [[piece, log probability], ...]
        by_id = {key: str(entry[0]) for key, entry in enumerate(vocabulary)}
    by_id.update(added_tokens(directory, fast))
    return [by_id.get(key) for key in range(max(by_id, default=-1) + 1)]


def _merges(fast: dict[str, Any]) -> list[list[str]]:
    """Merges as pairs; on disk they are "a b" (tokenizers < 0.20) or ["a", "b"]."""
    merges = fast["model"].get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def _convert(directory: Path) -> dict[str, Any]:
    if not (directory / "tokenizer.model").is_file():
        what = (
            "has no tokenizer.json and no tokenizer.model" if directory.is_dir() else "is missing"
        )
        raise DataError(f"{directory}: no tokenizer here: the directory {what}")
    from colossal_llama.tokenizer.directory import read_tokenizer

    return read_tokenizer(directory).fast
