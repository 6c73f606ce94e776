"""Loading a model directory for use: nothing from the network, no code or pickles of strangers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model_and_tokenizer(
    path: Path, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, Any]:
    """The model of a Hugging Face directory, in evaluation mode on ``device``, and its tokenizer.

    Args:
        path: directory with config.json, safetensors weights and tokenizer files.
        device: a torch device, or ``auto``: the accelerator if there is one, else the CPU.
        dtype: one of ``DTYPES``; ``auto`` keeps the weights' own on an accelerator and means
            float32 on a CPU, where few processors are fast in less.

    Raises:
        DataError: the directory is not a complete model, or the tokenizer has more pieces than
            the model has embedding rows.
        UsageError: the device is not there.
    """
    from colossal_llama.dataset.tokenization import load_tokenizer

    check_model_directory(path)
    place = find_device(device)
    tokenizer = load_tokenizer(path)
    model = _load_model(path, dtype if dtype != "auto" or place.type != "cpu" else "float32")
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {len(tokenizer)} pieces but the model only "
            f"{model.config.vocab_size} embedding rows; initialise the model for this tokenizer "
            "(colossal-llama init-model)"
        )
    return model.to(place).eval(), tokenizer


def check_model_directory(path: Path) -> None:
    """Raises DataError unless ``path`` is a directory with a config.json."""
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; --model_path takes a local model directory")
    if not (path / "config.json").is_file():
        hint = ""
        if (path / "modeling" / "config.json").is_file():
            hint = f"; the model of this checkpoint is {path / 'modeling'}"
        raise DataError(f"{path} has no config.json and so is not a model directory{hint}")


def find_device(name: str) -> torch.device:
    """The torch device of that name, which must be there to use.

    Raises:
        UsageError: torch does not know the name, or this machine has no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if name == "auto":
        name = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError([f"--device {name}: {reason}; try --device auto"]) from None
    if device.type not in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
        raise UsageError([f"--device {name}: there is none here; try --device auto"])
    return device


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of plain text: no bos or eos, and no part of it read as a special token."""
    from colossal_llama.dataset.tokenization import text_only

    with text_only(tokenizer) as backend:
        return list(backend.encode(text, add_special_tokens=False).ids)


def _load_model(path: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    settings["torch_dtype"] = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **settings
        )
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, ... by what is broken
        raise DataError(f"{path}: the model does not load: {_first_line(error)}") from None
    wrong = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if wrong:
        raise DataError(f"{path}: the weights do not fit config.json: {wrong[0]} is missing")
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())
