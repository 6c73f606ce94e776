"""How well a model predicts text it has not seen, in bits per byte.

    colossal-llama evaluate --model_path model --data_input_dirs held_out

Bits per byte = sum over the text's tokens of -log2 p(token | what precedes it) / bytes of the
text in UTF-8. The bytes do not depend on the tokenizer, so models with different vocabularies
can be compared, which loss per token and perplexity do not allow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.dataset.records import pretrain_records
from colossal_llama.dataset.sources import input_files
from colossal_llama.errors import DataError
from colossal_llama.inference.loading import DTYPES, load_model_and_tokenizer, text_ids
from colossal_llama.storage import write_json


@dataclass
class EvaluateOptions:
    """Measures bits per byte of a model on text, for each category of it."""

    model_path: Path = option(help="model directory in Hugging Face format")
    data_input_dirs: list[Path] = option(
        help="files or directories of JSON lines with source, target and category; "
        "source and target together are the text",
        comma=True,
    )
    max_length: int = option(1024, help="tokens the model sees at a time, bos included")
    batch_size: int = option(8, help="sequences computed at once")
    device: str = option("auto", help="cpu, cuda, cuda:1, ...; auto: an accelerator if there is")
    dtype: str = option("auto", choices=DTYPES, help="auto: float32 on a CPU, else the weights'")
    output: Path | None = option(None, help="also write the figures to this JSON file")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if self.max_length < 2:
            found.append("--max_length must be at least 2")
        if self.batch_size < 1:
            found.append("--batch_size must be positive")
        return found


@dataclass
class Score:
    """What was measured on one category of text.

    ``loss`` is the sum of -ln p over ``tokens``, in nats; ``windowed`` counts the documents that
    were longer than a window and therefore read in several, each without what came before it.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    windowed: int = 0
    loss: float = 0.0

    def figures(self) -> dict[str, float]:
        """The counts and the ratios between them, as plain values."""
        return {
            **asdict(self),
            "bytes_per_token": self.bytes / self.tokens,
            "loss_per_token": self.loss / self.tokens,
            "bits_per_byte": self.loss / math.log(2) / self.bytes,
        }


def evaluate(options: EvaluateOptions) -> None:
    """Prints a table, one row per category, and writes it as JSON where asked to."""
    texts = read_texts(options.data_input_dirs)
    model, tokenizer = load_model_and_tokenizer(options.model_path, options.device, options.dtype)
    figures = evaluate_model(
        model, tokenizer, texts, max_length=options.max_length, batch_size=options.batch_size
    )
    print(_table(figures))
    if any(row["windowed"] for row in figures["categories"].values()):
        print(f"windowed: documents read in windows of {figures['max_length']} tokens")
    if options.output is not None:
        write_json(options.output, {"model_path": str(options.model_path), **figures})


def read_texts(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The texts of the files under ``paths``, by category in alphabetical order."""
    texts: dict[str, list[str]] = {}
    for record in pretrain_records(input_files(paths)):
        texts.setdefault(record.category, []).append(record.source + record.target)
    return dict(sorted(texts.items()))


def evaluate_model(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Iterable[str]],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Bits per byte of ``model`` on the texts of each category.

    Every token of a text is scored exactly once. A text is read after bos; one longer than
    ``max_length`` - 1 tokens is read in consecutive windows without overlap, each after a bos of
    its own. The eos after a text is not part of it and is not scored.

    Returns:
        ``max_length`` (cut to the model's own), and under ``categories`` per category what
        ``Score.figures`` gives.

    Raises:
        DataError: there is no text, the tokenizer has no bos, or the model's output is not finite.
    """
    if tokenizer.bos_token_id is None:
        raise DataError("the tokenizer has no bos token, after which a text could begin")
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    scores: dict[str, Score] = {}
    windows: list[tuple[str, list[int]]] = []
    for category, documents in texts.items():
        score = scores.setdefault(category, Score())
        for text in documents:
            ids = text_ids(tokenizer, text)
            cut = [ids[i : i + max_length - 1] for i in range(0, len(ids), max_length - 1)]
            windows += [(category, [tokenizer.bos_token_id, *window]) for window in cut]
            score.documents += 1
            score.bytes += len(text.encode("utf-8"))
            score.tokens += len(ids)
            score.windowed += len(cut) > 1
    empty = [category for category, score in scores.items() if not score.tokens]
    if empty or not scores:
        raise DataError(
            f"there is no text to evaluate{' in category ' if empty else ''}" + ", ".join(empty)
        )
    _add_losses(model, windows, scores, batch_size)
    figures = {category: score.figures() for category, score in scores.items()}
    return {"max_length": max_length, "categories": figures}


def _add_losses(
    model: Any,
    windows: list[tuple[str, list[int]]],
    scores: dict[str, Score],
    batch_size: int,
) -> None:
    """Adds each window's loss to its category's score.

    Windows of like length share a batch, so that little is computed for padding; the longest
    come first, so that what does not fit into memory fails at once.
    """
    from tqdm import tqdm

    windows = sorted(windows, key=lambda window: -len(window[1]))
    with tqdm(total=sum(len(ids) for _, ids in windows), unit="token", unit_scale=True) as bar:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            losses = _losses(model, [ids for _, ids in batch])
            for (category, ids), loss in zip(batch, losses, strict=True):
                if not math.isfinite(loss):
                    raise DataError(
                        f"the model's output on {category} is not finite; are the weights intact?"
                    )
                scores[category].loss += loss
                bar.update(len(ids))


def _losses(model: Any, rows: list[list[int]]) -> list[float]:
    """Sum of -ln p of each row's tokens after its first, in float32 whatever the model's dtype."""
    import torch
    from torch.nn.functional import cross_entropy

    lengths = [len(row) for row in rows]
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    with torch.inference_mode():
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        # Row by row: a float32 copy of all logits could be larger than the model.
        return [
            cross_entropy(
                output.logits[index, : length - 1].float(),
                input_ids[index, 1:length],
                reduction="sum",
            ).item()
            for index, length in enumerate(lengths)
        ]


def _table(figures: dict[str, Any]) -> str:
    columns = ("documents", "windowed", "bytes", "tokens")
    ratios = ("bytes_per_token", "loss_per_token", "bits_per_byte")
    rows = [["category", *columns, *(name.replace("_per_", "/") for name in ratios)]]
    for category, row in figures["categories"].items():
        counts = [str(row[name]) for name in columns]
        rows.append([category, *counts, *(f"{row[name]:.4f}" for name in ratios)])
    return "\n".join("  ".join(f"{cell:>11}" for cell in row) for row in rows)


if __name__ == "__main__":
    sys.exit(run(EvaluateOptions, evaluate))
