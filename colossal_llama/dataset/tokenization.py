"""Text to token ids with a fast tokenizer; control tokens never come out of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.records import PretrainRecord
from colossal_llama.dataset.spool import Document
from colossal_llama.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_BATCH_CHARACTERS = 1 << 20


def load_tokenizer(directory: Path) -> Any:
    """Loads the fast tokenizer of a local directory (a ``PreTrainedTokenizerFast``).

    Raises:
        DataError: there is none, it cannot be loaded, it is slow, or it lacks bos or eos.
    """
    import transformers

    if not directory.is_dir():
        raise DataError(f"{directory}: no such tokenizer directory")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    # The Rust side raises plain Exception for a broken file; nothing of ours runs in here.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{directory}: not a tokenizer that can be loaded: {reason}") from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if not tokenizer.is_fast:
        raise DataError(f"{directory}: no fast tokenizer (tokenizer.json); convert it first")
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise DataError(f"{directory}: the tokenizer has no {name}; set it in its config")
    return tokenizer


@contextmanager
def text_only(tokenizer: Any) -> Iterator[Any]:
    """Yields the backend in the mode in which ``</s>`` in a text is five characters, not eos."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before


def tokenize_documents(tokenizer: Any, records: Iterable[PretrainRecord]) -> Iterator[Document]:
    """Tokenises documents as bos + source + target + eos.

    bos and source carry no loss where there is a source. Source and target are tokenised
    apart, so that no token crosses the border between them; with a SentencePiece tokenizer the
    target then starts with its usual dummy prefix, as any text does.
    """
    for batch in _batches(records):
        texts = [text for record in batch for text in record[:2]]
        with text_only(tokenizer) as backend:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = iter([encoding.ids for encoding in encodings])
        for record, source, target in zip(batch, ids, ids, strict=True):
            yield _document(tokenizer, record.category, source, target)


def _document(tokenizer: Any, category: str, source: list[int], target: list[int]) -> Document:
    import numpy as np

    ids: np.ndarray = np.array(
        [tokenizer.bos_token_id, *source, *target, tokenizer.eos_token_id], dtype=np.int32
    )
    loss = np.ones(len(ids), dtype=np.bool_)
    if source:
        loss[: 1 + len(source)] = False
    return Document(category, ids, loss)


def _batches(records: Iterable[PretrainRecord]) -> Iterator[list[PretrainRecord]]:
    """Groups records until their text is long enough to keep every core busy."""
    batch: list[PretrainRecord] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.source) + len(record.target)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
