"""Text to token ids with a fast tokenizer; control tokens never come out of text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json

if TYPE_CHECKING:
    import numpy as np


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
    """Yields the backend in the mode in which ``</s>`` in a text is five characters, not eos.

    Nor is a text cut or padded, for which a ``tokenizer.json`` may have settings: transformers
    saves those of the last call.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    truncation, padding = backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


class TextTokenizer(NamedTuple):
    """What a worker needs of a tokenizer: its ``tokenizer.json`` and two ids."""

    json: str
    bos_id: int
    eos_id: int


def text_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a directory, exactly as transformers' ``AutoTokenizer`` would have it.

    Importing transformers takes seconds, and it changes a ``tokenizer.json`` on loading only
    where the settings beside it say so; it is left out where they do not.

    Raises:
        DataError: see ``load_tokenizer``.
    """
    try:
        plain = _plain_tokenizer(directory)
    except (AttributeError, KeyError, TypeError, ValueError):
        plain = None  # files of another shape are for transformers to judge
    if plain is not None:
        return plain
    loaded = load_tokenizer(directory)
    return TextTokenizer(
        loaded.backend_tokenizer.to_str(), loaded.bos_token_id, loaded.eos_token_id
    )


def _plain_tokenizer(directory: Path) -> TextTokenizer | None:
    """The tokenizer if ``tokenizer.json`` alone decides about ids, else None."""
    from tokenizers import Tokenizer

    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not (path.is_file() and config_path.is_file()):
        return None
    content, config = read_json(path), read_json(config_path)
    if not isinstance(content, dict) or not isinstance(config, dict):
        return None
    added = {(token["id"], token["content"]) for token in content.get("added_tokens") or []}
    wanted = {
        (int(number), token["content"])
        for number, token in (config.get("added_tokens_decoder") or {}).items()
    }
    rewritten = (
        config.get("add_prefix_space") is not None
        or config.get("split_special_tokens")
        or config.get("additional_special_tokens")
        or (content.get("pre_tokenizer") or {}).get("add_prefix_space")
        or (directory / "added_tokens.json").is_file()
        or not wanted <= added
    )
    if rewritten:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # what is wrong with it is for transformers to say
        return None
    ids = [_control_id(tokenizer, config.get(name)) for name in ("bos_token", "eos_token")]
    if None in ids:
        return None
    return TextTokenizer(tokenizer.to_str(), *ids)


def _control_id(tokenizer: Any, token: Any) -> Any:
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


class Encoder(Protocol):
    """Turns texts into ids."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, int32 [tokens], and their numbers, int64 [texts]."""


class HuggingFaceEncoder:
    """Encodes with the library ``tokenizers``, in as many threads as RAYON_NUM_THREADS says."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer_json)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Encoder``."""
        import numpy as np

        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        return np.concatenate([np.empty(0, dtype=np.int32), *ids]), lengths


class GigatokenEncoder:
    """Encodes with gigatoken, in one thread or all.

    It reads special tokens wherever they stand in a text; here they are taken out of its
    ``tokenizer.json`` first, so that text stays text.
    """

    def __init__(self, tokenizer_json: str, *, parallel: bool = False) -> None:
        import gigatoken

        content = json.loads(tokenizer_json)
        content["added_tokens"] = [
            token for token in content.get("added_tokens") or [] if not token["special"]
        ]
        content["truncation"] = content["padding"] = None
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
            file.flush()
            self._backend = gigatoken.Tokenizer(file.name)
        self._parallel = parallel

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Encoder``."""
        import numpy as np

        if not texts:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        layout = self._backend.encode_batch(list(texts), parallel=self._parallel).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets)


BACKENDS = {"hf": HuggingFaceEncoder, "gigatoken": GigatokenEncoder}
