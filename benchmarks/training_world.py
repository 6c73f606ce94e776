"""A model and data to time training with, and two loops over them: ours, and a bare one.

For ``train_step.py``. Weights and tokens are random: how long a step takes depends on neither.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from colossal_llama import storage  # noqa: E402
from colossal_llama.dataset import manifest as manifests  # noqa: E402
from colossal_llama.dataset.writer import ARROW_FILE, IGNORE_INDEX, RowBatch, write_part  # noqa: E402
from colossal_llama.model.configuration import preset_path, read_fields, token_fields  # noqa: E402

OWN_SHAPE = "40m"
# 40 million weights with 16,000 ids: on two cores a step of 2,048 tokens takes some seconds.
OWN_FIELDS = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP, BETAS = 1e-4, 0.1, 1.0, (0.9, 0.95)
SEED = 42


@dataclass(frozen=True)
class World:
    """Directories of a model and of its data, whose rows have ``length`` tokens each."""

    model: Path
    data: Path
    length: int


def make_world(
    directory: Path, preset: str, dtype: str, *, vocab_size: int, rows: int, length: int
) -> World:
    """Writes a tokenizer, a random model of torch's ``dtype`` and a dataset of random rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = _tokenizer(directory / "tokenizer")
    fields = OWN_FIELDS if preset == OWN_SHAPE else read_fields(preset_path(preset))
    config = AutoConfig.for_model(**{**fields, **token_fields(tokenizer), "vocab_size": vocab_size})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=getattr(torch, dtype))
    model.save_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory / "model")
    _write_dataset(directory / "data", directory / "model", vocab_size, rows, length)
    return World(directory / "model", directory / "data", length)


def _tokenizer(directory: Path) -> Path:
    """A tokenizer of 600 pieces; the model may have more ids, and the data has random ones."""
    text = directory.with_suffix(".txt")
    text.write_text("\n".join(sorted(topics.values())[:40]), encoding="utf-8")
    command = [sys.executable, "-m", "colossal_llama.tokenizer.train_tokenizer"]
    flags = {"data_input_dirs": text, "target_tokenizer_dir": directory, "vocab_size": 600}
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return directory


def _write_dataset(
    directory: Path, tokenizer: Path, vocab_size: int, rows: int, length: int
) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, rows * length, dtype=np.int32)
    offsets = np.arange(rows + 1, dtype=np.int32)
    lengths, categories = np.full(rows, length, np.int32), np.zeros(rows, np.int32)
    batch = RowBatch(ids, ids, offsets * length, lengths, offsets, categories)
    directory.mkdir()
    write_part(directory / "part-00000", [batch], ["text"])
    file = directory / "part-00000" / ARROW_FILE
    entry = manifests.ArrowFile(file.stat().st_size, storage.sha256_file(file))
    tokens = rows * length
    manifests.Manifest(
        schema_version=manifests.SCHEMA_VERSION,
        kind="pretrain",
        tokenizer=manifests.tokenizer_identity(tokenizer),
        tokenizer_backend="hf",
        max_length=length,
        seed=0,
        documents=manifests.DocumentCount(rows, rows, 0, 0),
        rejected={},
        filtered={},
        notes={},
        categories={"text": manifests.CategoryCount(rows, tokens, training_tokens=tokens)},
        padding_share=0.0,
        chat_template=None,
        settings={},
        parts={
            "part-00000": manifests.Part(
                rows, tokens, length, {"text": tokens}, {ARROW_FILE: entry}
            )
        },
    ).write(directory)


class OurLoop:
    """The trainer with all its callbacks, a step at a time. Needs a process group."""

    def __init__(self, world: World, save_dir: Path, flags: Sequence[str]) -> None:
        from colossal_llama import command
        from colossal_llama.training.arguments import TrainOptions
        from colossal_llama.training.assembly import build_trainer

        self.save_dir = save_dir
        paths = {"pretrained": world.model, "dataset": world.data, "save_dir": save_dir}
        numbers = {
            "max_length": world.length,
            "lr": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "grad_clip": GRAD_CLIP,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "max_steps": 10**6,
            "seed": SEED,
        }
        given = [str(x) for name, v in {**paths, **numbers}.items() for x in (f"--{name}", v)]
        with contextlib.redirect_stdout(sys.stderr):
            options = command.parse(TrainOptions, [*given, *flags])
            self.trainer = build_trainer(options, time.monotonic())
        self.trainer.model.train()
        for callback in self.trainer.callbacks:
            callback.run_begins(self.trainer)

    def step(self) -> float:
        """What ``Trainer.run`` does for a step; returns the loss."""
        metrics = self.trainer.train_step()
        for callback in self.trainer.callbacks:
            callback.step_ended(self.trainer, metrics)
        return metrics.loss

    def close(self) -> None:
        """Ends the run, without a checkpoint."""
        for callback in self.trainer.callbacks:
            callback.run_ends(self.trainer)
        self.trainer.log.close()


def collated(world: World, rows: int, steps: int) -> Iterator[dict[str, Any]]:
    """The batches of ``rows`` rows that a trainer sees in its first ``steps`` steps."""
    from colossal_llama.dataset.collator import collate
    from colossal_llama.dataset.loader import open_parts
    from colossal_llama.dataset.sampler import GlobalSampler

    data = open_parts([world.data], world.model, world.length)
    sampler = GlobalSampler(data.datasets, SEED, rows)
    for step in range(steps):
        yield collate(data.take(sampler.batch(step * rows)), pad_id=0)


class BareLoop:
    """Hugging Face's model and torch's AdamW, nothing else.

    In half precision it keeps fp32 masters, as every plugin of ours does.
    """

    def __init__(self, world: World, dtype: str, device: str, attention: str = "sdpa") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            world.model, torch_dtype=getattr(torch, dtype), attn_implementation=attention
        ).to(device)
        self.model.config.use_cache = False
        self.model.train()
        self._weights = list(self.model.parameters())
        self._masters = self._weights
        if dtype != "float32":
            self._masters = [weight.detach().float() for weight in self._weights]
        groups = [
            {"params": [m for m in self._masters if m.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [m for m in self._masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        self._device = device

    def step(self, batch: dict[str, Any]) -> float:
        """One optimizer step over a collated batch; returns the loss."""
        loss = self._loss(batch)
        loss.backward()
        self._update()
        return float(loss)

    def _loss(self, batch: dict[str, Any]) -> Any:
        from torch.nn import functional as F

        inputs = {
            name: batch[name].to(self._device)
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        labels = batch["labels"].to(self._device)
        logits = self.model(**inputs, use_cache=False).logits.float()
        # The labels are shifted, not the logits: those would be copied.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    def _update(self) -> None:
        import torch

        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
