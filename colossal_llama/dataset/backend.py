"""Chooses what tokenises: gigatoken only where it is proved to give the very same ids."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.sources import Chunk, ChunkReader
from colossal_llama.dataset.tokenization import GigatokenEncoder, HuggingFaceEncoder
from colossal_llama.errors import DataError, RecordError

if TYPE_CHECKING:
    import numpy as np

BACKENDS = ("auto", "hf", "gigatoken")

_SAMPLED_CHUNKS = 32
_SAMPLED_CHARACTERS = 1 << 20

# Texts on which tokenizers tend to differ: white space, controls, joined and astral characters.
_PROBES = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t\t",
        " \n \n",
        "a  b",
        " a",
        "a ",
        "\u3000全角\u3000",
        "\u00a0",
    ),
    *(
        "▁",
        "▁▁a▁",
        "\u200b\u200d\ufeff",
        "e\u0301 é",
        "ｆｕｌｌ　ｗｉｄｔｈ",
        "\x01\x7f\x85",
        "\ufffd\uffff",
    ),
    *(
        "👩‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "𠮷野家𝔘",
        "हिन्दी ไทย العربية עברית 한국어",
        "ǅ ß ﬁ İ",
        "1234567890 3.14 1,000",
    ),
    *("don't I'll we've", "CamelCase_snake-kebab", "==== ---- ....", "a" * 3000, "中" * 3000),
    *(" " * 3000, "x = {'a': [1, 2]}\n    return x\n\n\n", "https://example.org/?q=1&r=%20#top"),
]


def choose_backend(
    wanted: str,
    tokenizer_json: str,
    chunks: Sequence[Chunk],
    text_of: Callable[[dict[str, Any]], str],
) -> tuple[str, str]:
    """What to tokenise with, and why.

    Args:
        wanted: "hf"; "gigatoken"; or "auto", which takes gigatoken if it is installed and gives,
            on a sample of this input, the ids that Hugging Face's library gives.
        tokenizer_json: content of ``tokenizer.json``.
        chunks: the input.
        text_of: the text of a record; may raise RecordError.

    Returns:
        "hf" or "gigatoken", and a sentence for the user.

    Raises:
        DataError: gigatoken is asked for, and missing, or gives other ids.
    """
    if wanted == "hf":
        return "hf", "tokenizing with Hugging Face tokenizers"
    if importlib.util.find_spec("gigatoken") is None:
        reason = "gigatoken is not installed (pip install gigatoken)"
    else:
        texts = [*_PROBES, *_special_texts(tokenizer_json), *_sample(chunks, text_of)]
        difference = _first_difference(tokenizer_json, texts)
        if difference is None:
            return "gigatoken", f"tokenizing with gigatoken: the same ids on {len(texts):,} texts"
        reason = f"gigatoken cannot be used: {difference}"
    if wanted == "gigatoken":
        raise DataError(f"--tokenizer_backend gigatoken: {reason}; use hf")
    return "hf", f"tokenizing with Hugging Face tokenizers: {reason}"


def _special_texts(tokenizer_json: str) -> list[str]:
    """Texts that look like special tokens, which have to stay text, and symbols that do not."""
    tokens = [token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or []]
    return [text for token in tokens[:200] for text in (token, f"a {token} b{token}", token * 2)]


def _sample(chunks: Sequence[Chunk], text_of: Callable[[dict[str, Any]], str]) -> list[str]:
    """Texts from the beginnings of chunks that are spread over the whole input."""
    step = max(1, len(chunks) // _SAMPLED_CHUNKS)
    chosen = chunks[::step]
    each = _SAMPLED_CHARACTERS // max(1, len(chosen))
    texts: list[str] = []
    for chunk in chosen:
        taken = 0
        for _, fields in ChunkReader(chunk):
            if isinstance(fields, RecordError):
                continue
            try:
                texts.append(text_of(fields)[:_SAMPLED_CHARACTERS])
            except RecordError:
                continue
            taken += len(texts[-1])
            if taken >= each:
                break
    return texts


def _first_difference(tokenizer_json: str, texts: Sequence[str]) -> str | None:
    """Where the two libraries differ; None if they do not."""
    # Both take most of a second, much of it loading: at the same time, it is one.
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: HuggingFaceEncoder(tokenizer_json)(texts))
        return _compare(tokenizer_json, texts, waiting)


def _compare(tokenizer_json: str, texts: Sequence[str], expected: Future[Any]) -> str | None:
    import numpy as np

    try:
        found = GigatokenEncoder(tokenizer_json, parallel=True)(texts)
    # Its Rust side panics with an exception that is no Exception, for kinds it does not know.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"it does not take this tokenizer ({' '.join(str(error).split())[:100]})"
    pairs = list(zip(expected.result(), found, strict=True))
    if all(np.array_equal(*pair) for pair in pairs):
        return None
    texts_of_both = zip(_split(*expected.result()), _split(*found), strict=True)
    same = [np.array_equal(*pair) for pair in texts_of_both]
    first = texts[same.index(False)][:40]
    return f"other ids in {same.count(False)} of {len(texts)} texts, first in {first!r}"


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    import numpy as np

    return np.split(ids, np.cumsum(lengths)[:-1])
