"""Whether a model with new rows still says what its source says, measured in bits per byte.

Bits per byte = sum over the text's tokens of -log2 p(token | what precedes it) / bytes of the
text in UTF-8. The bytes do not depend on the tokenizer.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json
from colossal_llama.tokenizer import corpus, fast_tokenizer
from colossal_llama.tokenizer.fingerprint import read_fast_json, vocabulary_size

_WINDOW = 1024  # tokens that the model sees at a time, bos included
_FILES = (".txt", ".jsonl", ".gz")


def problem_of(value: str) -> str | None:
    """What is wrong with a text or file to verify on, or None."""
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    if value.endswith(_FILES) and not os.path.isfile(value):
        return f"{value}: no such file"
    return None


def read_texts(value: str) -> list[str]:
    """The documents of the file that ``value`` names, or ``value`` itself.

    Raises:
        DataError: the file cannot be read, or holds no text.
    """
    if not os.path.isfile(value):
        return [value]
    texts = [text for path in corpus.text_files([Path(value)]) for text in corpus.documents(path)]
    if not any(texts):
        raise DataError(f"{value}: it holds no text")
    return texts


def report(source: Path, result: Path, texts: Sequence[str], *, same_weights: bool) -> str:
    """Bits per byte of the models in ``source`` and ``result`` on ``texts``, as a small table.

    A text without new pieces has the same ids in both. There the result is measured twice: among
    the old ids alone, which must give exactly the source's figure, and among all ids, where the
    new rows take a share of every prediction. With ``same_weights`` false (another dtype) the
    figures are only shown.

    Raises:
        DataError: a model does not load or gives no finite numbers, or the figures differ where
            they must not.
    """
    size, old_size = sum(len(text.encode("utf-8")) for text in texts), vocabulary_size(source)
    before, after = _ids(source, texts), _ids(result, texts)
    new = sum(key >= old_size for ids in after for key in ids)
    if not new and before != after:
        raise DataError(
            "the target tokenizer reads the text to verify on differently from the one in "
            f"{source}, though without a new piece; extend that one with init_tokenizer.py"
        )
    (bits,) = _bits(source, str(source), before, [old_size])
    rows = [("source", bits, f"{sum(map(len, before))} tokens")]
    tokens = f"{sum(map(len, after))} tokens, {new} of them new pieces"
    if new:
        (everything,) = _bits(result, "the result", after, [None])
    else:
        everything, restricted = _bits(result, "the result", after, [None, old_size])
        same = "identical" if restricted == bits else f"changed by {restricted - bits:+.3g} bits"
        if restricted != bits and same_weights:
            raise DataError(
                f"on a text without new pieces the result does not predict what {source} predicts "
                f"({same}); is the source being written to?"
            )
        rows.append(("result, old ids only", restricted, same))
    rows.append(("result", everything, tokens))
    lines = [f"  {name:<22}{value / size:>8.4f}  {note}" for name, value, note in rows]
    return "\n".join([f"bits per byte on {size:,} bytes of text:", *lines])


def _ids(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids of plain text: no bos or eos, and no part of it read as a special token."""
    tokenizer = fast_tokenizer.load(read_fast_json(directory))
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _bits(
    directory: Path, name: str, documents: Sequence[list[int]], sizes: Sequence[int | None]
) -> list[float]:
    """For each of ``sizes``, the bits of all documents when only so many first ids can follow.

    Documents longer than a window are read in consecutive windows, each after a bos of its own.
    A model without bos does not have its windows' first tokens scored.
    """
    from tqdm import tqdm

    config = read_json(directory / "config.json")
    bos = config.get("bos_token_id")
    start = [bos] if isinstance(bos, int) else []
    width = min(_WINDOW, config.get("max_position_embeddings", _WINDOW)) - len(start)
    windows = [
        [*start, *ids[at : at + width]] for ids in documents for at in range(0, len(ids), width)
    ]
    model, found = _load(directory, name), []
    with tqdm(
        desc=f"reading the text with {name}",
        total=sum(map(len, windows)) * len(sizes),
        unit="token",
        delay=1,
    ) as progress:
        for size in sizes:
            if size is not None:
                _keep_ids(model, size)
            found.append(math.fsum(_window_bits(model, ids, progress) for ids in windows))
    del model
    gc.collect()  # before the next one is loaded
    if not all(map(math.isfinite, found)):
        raise DataError(f"{name}: the model's output is not finite; are the weights intact?")
    return found


def _load(directory: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, torch_dtype="auto"
        )
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, ... by what is broken
        raise DataError(f"{name}: it does not load: {' '.join(str(error).split())}") from None
    return model.eval()


def _keep_ids(model: Any, size: int) -> None:
    """Cuts the output to the first ``size`` ids.

    The matrix is cut, not its product: with other shapes a library may add in another order.
    """
    import torch

    head = torch.nn.Linear(1, 1, bias=False)
    weight = model.get_output_embeddings().weight
    head.weight = torch.nn.Parameter(weight[:size], requires_grad=False)
    model.set_output_embeddings(head)


def _window_bits(model: Any, ids: list[int], progress: Any) -> float:
    """Sum of -log2 p of each token after the first, in float32 whatever the model's dtype."""
    import torch

    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    progress.update(len(ids))
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    return loss.item() / math.log(2)
