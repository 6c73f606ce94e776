"""LoRA: small trained matrices beside frozen linear layers, through PEFT.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": a layer's weight W becomes
W + alpha / r * B A with A [r, in] at random and B [out, r] zero at first.

PEFT puts its layers into the model and leaves the model's class alone, so plugins, hooks and
losses see the model that they know. A checkpoint has ``modeling/`` with the sums, as any other
run, and beside it ``adapter/`` with A and B as PEFT keeps them. A run goes on from its base
weights and the adapter, never from the sums, which are rounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from colossal_llama import storage
from colossal_llama.errors import DataError, UsageError
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.checkpoint import raise_on_all
from colossal_llama.training.file_writer import FileWriter
from colossal_llama.training.parameters import embedding_weights

FOLDER = "adapter"
TENSOR_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
BASE_FILE = "base.json"  # ours
_NAME = "default"  # of the adapter, as PEFT calls it where nobody has named it
_PREFIX = "base_model.model."  # of names in PEFT's files


@dataclass(frozen=True)
class Base:
    """The weights that an adapter belongs to."""

    directory: str
    dtype: str
    checksum: str  # XXH3 of all weights in this dtype; only the first process knows it

    def misfit(self, found: Base) -> str | None:
        """What is wrong with ``found`` in place of these; None if nothing is known to be."""
        if self.dtype != found.dtype or self.checksum == found.checksum:
            return None
        return (
            f"the adapter was trained on the weights of {self.directory}, and {found.directory} "
            "has others: give that model as --pretrained"
        )


@dataclass(frozen=True)
class Adapter:
    """LoRA in a model.

    Args:
        model: a Hugging Face model with PEFT's layers in it.
        base: where its other weights are from.
        config: PEFT's, as it is to be written.
    """

    model: Any
    base: Base
    config: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """A and B of all layers, and the embeddings if they train; names as in PEFT's files.

        The tensors are the model's own, not copies.
        """
        found = {
            _PREFIX + name.replace(f".{_NAME}", ""): parameter.detach()
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        }
        if self.config["modules_to_save"]:
            rows = self.model.config.vocab_size  # a plugin may have added some
            for name, module in _embeddings(self.model).items():
                found[f"{_PREFIX}{name}.weight"] = module.weight.detach()[:rows]
        return found

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights of the plain model, one after the other; sums are taken in float32."""
        for name, tensor in plain_tensors(self.model).items():
            module, _, kind = name.rpartition(".")
            layer = self.model.get_submodule(module)
            if isinstance(layer, LoraLayer) and kind == "weight":
                tensor = _sum(tensor, layer)
            yield name, tensor

    def write(self, directory: Path, writer: FileWriter) -> None:
        """Writes what ``PeftModel.from_pretrained`` loads; for one process."""
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_json(directory / CONFIG_FILE, self.config)
        # A recipe's directory may be moved, with the stage before this one in it.
        relative = os.path.relpath(self.base.directory, directory)
        storage.write_json(directory / BASE_FILE, {**asdict(self.base), "relative": relative})
        tensors, places = self.tensors(), set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in places:  # tied embeddings; in a file each has its own
                tensors[name] = tensor.clone()
            places.add(tensor.data_ptr())
        writer.write(tensors, directory / TENSOR_FILE)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Loads what ``write`` wrote.

        Raises:
            DataError: the adapter there is of another kind, or damaged.
        """
        written = storage.read_json(directory / CONFIG_FILE)
        for name in ("r", "lora_alpha", "target_modules", "modules_to_save"):
            if written.get(name) != self.config[name]:
                raise DataError(
                    f"{directory} has an adapter with {name} {written.get(name)}, the flags ask "
                    f"for {self.config[name]}: give the same --lora flags, or start a new stage "
                    f"with --load_checkpoint {directory.parent / 'modeling'}"
                )
        try:
            with safe_open(directory / TENSOR_FILE, framework="pt") as stored:
                for name, tensor in self.tensors().items():
                    tensor.copy_(stored.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{directory / TENSOR_FILE}: cannot be read: {error}") from None


def base_directory(options: TrainOptions, checkpoint: Path) -> Path:
    """Where the base weights of a run with LoRA are that is resumed from ``checkpoint``.

    Raises:
        DataError: it is not a checkpoint of a run with LoRA.
    """
    path = checkpoint / FOLDER / BASE_FILE
    if not path.is_file():
        raise DataError(
            f"{checkpoint} was trained without LoRA: resume it without --lora_rank, or start a "
            f"new stage from its weights with --load_checkpoint {checkpoint / 'modeling'}"
        )
    recorded = Path(_read_base(path).directory)
    moved = path.parent / storage.read_json(path).get("relative", "")
    # Another machine may have the same model elsewhere; that it is the same is checked.
    candidates = [recorded, Path(os.path.normpath(moved))]
    there = (place for place in candidates if (place / "config.json").is_file())
    return next(there, options.pretrained)


def add_adapter(
    options: TrainOptions, model: Any, directory: Path, checkpoint: Path | None
) -> Adapter:
    """Puts a new adapter into ``model``, or that of a checkpoint, and freezes the rest.

    Args:
        model: with the base weights, which are those of ``directory``.

    Raises:
        UsageError: there are no such layers.
        DataError: the checkpoint's adapter does not fit the flags or the base weights.
    """
    base, alpha = _describe_base(model, directory), float(options.lora_alpha)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=layers(options, model),
        base_model_name_or_path=base.directory,
    )
    state = torch.get_rng_state()
    try:
        # The same adapter on every process, whatever their random states.
        torch.default_generator.manual_seed(options.seed)
        inject_adapter_in_model(config, model, _NAME)
    finally:
        torch.set_rng_state(state)
    if options.lora_train_embeddings:
        for weight in embedding_weights(model):
            weight.requires_grad = True
    adapter = Adapter(model, base, _as_written(config, model, options.lora_train_embeddings))
    if checkpoint is not None:
        expected = _read_base(checkpoint / FOLDER / BASE_FILE)
        misfit = expected.misfit(base) if dist.get_rank() == 0 else None
        raise_on_all(misfit and f"{checkpoint}: {misfit}", DataError)
        adapter.load(checkpoint / FOLDER)
    return adapter


def plain_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that they have without LoRA; those of LoRA left out."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def _sum(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """``weight`` [out, in] with LoRA's share added, in its dtype."""
    a, b = (side[_NAME].weight.detach().float() for side in (layer.lora_A, layer.lora_B))
    return (weight.float() + layer.scaling[_NAME] * (b @ a)).to(weight.dtype)


def _embeddings(model: Any) -> dict[str, Any]:
    """The input and the output embedding by their names."""
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def layers(options: TrainOptions, model: Any) -> list[str]:
    """The last names of the linear modules that get an adapter.

    Raises:
        UsageError: there are no such modules.
    """
    head = model.get_output_embeddings()
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )
    wanted = options.lora_modules or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            [
                f"--lora_modules {' '.join(unknown)}: the layers have {' '.join(known)}; the "
                "embeddings are trained whole, with --lora_train_embeddings"
            ]
        )
    return list(wanted)


def _as_written(config: LoraConfig, model: Any, embeddings: bool) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``, in the same order every time."""
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    # In the run the embeddings train in place; PEFT keeps a copy beside the base's.
    names = sorted(name.rpartition(".")[2] for name in _embeddings(model)) if embeddings else None
    return {**settings, "inference_mode": True, "modules_to_save": names}


def _describe_base(model: Any, directory: Path) -> Base:
    digest = xxhash.xxh3_128()
    if dist.get_rank() == 0:  # it takes about a second for 10 GB, and one process is enough
        for parameter in model.parameters():
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    dtype = str(next(model.parameters()).dtype).rpartition(".")[2]
    return Base(str(directory.resolve()), dtype, digest.hexdigest())


def _read_base(path: Path) -> Base:
    content = storage.read_json(path)
    try:
        return Base(**{name: value for name, value in content.items() if name != "relative"})
    except TypeError as error:
        raise DataError(f"{path}: does not describe base weights ({error})") from None
