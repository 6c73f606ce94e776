"""Writes what plain transformers loads: weights, configuration, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.checkpoint_io.utils import save_config_file
from huggingface_hub import split_torch_state_dict_into_shards

from colossal_llama import storage
from colossal_llama.dataset.chat.chat_format import turn_end_id
from colossal_llama.runtime.weights import weights_written_by
from colossal_llama.tokenizer.settings import drop_prefix_setting
from colossal_llama.training.file_writer import FileWriter
from colossal_llama.training.lora import FOLDER, Adapter, plain_tensors

INDEX_FILE = "model.safetensors.index.json"
_SHARD = "1GB"


@dataclass(frozen=True)
class Exporter:
    """Writes the model of a run as a Hugging Face directory; all processes call it together."""

    booster: Any
    model: Any
    tokenizer: Any

    adapter: Adapter | None = None

    def __call__(self, checkpoint: Path, writer: FileWriter) -> None:
        """Fills ``checkpoint / "modeling"``, and ``"adapter"``; ``writer`` takes the weights."""
        modeling = checkpoint / "modeling"
        if self.adapter is None:
            self._gather(modeling, writer)
        elif dist.get_rank() == 0:  # every process has all weights
            _write_merged(self.adapter, modeling, writer)
            self.adapter.write(checkpoint / FOLDER, writer)
        if dist.get_rank() == 0:
            finish_model_directory(modeling, self.tokenizer)

    def _gather(self, modeling: Path, writer: FileWriter) -> None:
        copies = tied_copies(self.model.unwrap())

        def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
            kept = {name: tensor for name, tensor in tensors.items() if name not in copies}
            if kept:
                writer.write(kept, path)

        with weights_written_by(write):
            self.booster.save_model(self.model, str(modeling), shard=True, use_safetensors=True)
        if dist.get_rank() == 0:
            _leave_out(copies, modeling / INDEX_FILE)


def _write_merged(adapter: Adapter, modeling: Path, writer: FileWriter) -> None:
    """Writes the plain model that base and adapter add up to."""
    copies = tied_copies(adapter.model)
    sizes = {n: t for n, t in plain_tensors(adapter.model).items() if n not in copies}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=_SHARD)
    file_of = shards.tensor_to_filename
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.merged():
        if name in copies:
            continue
        # Written as soon as it is complete: the sums of one file are held, not those of all.
        file = waiting.setdefault(file_of[name], {})
        file[name] = tensor
        if len(file) == len(shards.filename_to_tensors[file_of[name]]):
            writer.write(waiting.pop(file_of[name]), modeling / file_of[name])
    save_config_file(adapter.model, str(modeling))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": file_of}
        storage.write_json(modeling / INDEX_FILE, index, atomically=False)


def tied_copies(model: Any) -> set[str]:
    """Names under which a Hugging Face model has a tensor once more, such as a tied head's.

    They are in no checkpoint of transformers', and safetensors refuses them.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    return set(model._tied_weights_keys or ()) if tied else set()


def _leave_out(names: set[str], index_path: Path) -> None:
    """Removes tensors that were not written from an index of shards."""
    index = storage.read_json(index_path)
    if names.isdisjoint(index["weight_map"]):
        return
    for name in names:
        index["weight_map"].pop(name, None)
    # Only a hint for who loads, and the left out tensors were counted in it.
    index["metadata"].pop("total_size", None)
    storage.write_json(index_path, index, atomically=False)


def finish_model_directory(directory: Path, tokenizer: Any) -> None:
    """Adds the tokenizer, and puts right what training had to change in the configuration."""
    _save_tokenizer(tokenizer, directory)
    drop_prefix_setting(directory / "tokenizer_config.json")
    config = storage.read_json(directory / "config.json")
    config["use_cache"] = True  # off in training; generation without it takes ages
    storage.write_json(directory / "config.json", config, atomically=False)
    _stop_after_turns(directory / "generation_config.json", tokenizer)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises no other, even where the disk is full
        raise OSError(f"{directory}: {error}") from error


def _stop_after_turns(path: Path, tokenizer: Any) -> None:
    """Lets generation end where an answer does, if the chat template has a token for that."""
    if not tokenizer.chat_template:
        return
    end = turn_end_id(tokenizer)
    if end is None or end == tokenizer.eos_token_id:
        return
    settings = storage.read_json(path) if path.is_file() else {}
    settings["eos_token_id"] = [i for i in (tokenizer.eos_token_id, end) if i is not None]
    storage.write_json(path, settings, atomically=False)
