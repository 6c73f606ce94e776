"""What a model is shaped like: presets, config.json, and the parameters that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json

if TYPE_CHECKING:
    import torch

PRESETS = Path(__file__).resolve().parent / "presets"
# Models of Llama's names and Llama's initial distribution (transformers, their _init_weights).
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("float32", "bfloat16", "float16")


def preset_names() -> list[str]:
    """The names that ``preset_path`` knows, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset_path(name: str) -> Path:
    """Where the preset of this name lies; a name that ends in .json is a path itself."""
    return Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"


def read_fields(path: Path) -> dict[str, Any]:
    """The settings of a preset or a config.json, without remarks (names that begin with _).

    Raises:
        DataError: it is not the configuration of a model that is supported.
    """
    fields = read_json(path)
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise DataError(f"{path}: not a model's configuration: it has no model_type")
    if fields["model_type"] not in SUPPORTED:
        raise DataError(
            f"{path}: model_type {fields['model_type']!r} is not supported; "
            f"there are {', '.join(SUPPORTED)}"
        )
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def token_fields(tokenizer_path: Path) -> dict[str, int | None]:
    """What the tokenizer decides of a model's configuration: number of ids, bos, eos, pad.

    Raises:
        DataError: there is no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    from colossal_llama.tokenizer.fingerprint import vocabulary_size

    size = vocabulary_size(tokenizer_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{tokenizer_path}: transformers cannot load this tokenizer: {reason}"
        ) from None
    return {
        "vocab_size": size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def empty_model(fields: dict[str, Any], path: Path) -> tuple[Any, Any]:
    """The configuration of these settings, and its model without memory for weights.

    The model is on torch's meta device; its ``named_parameters`` are what its files have to
    hold, a shared tensor once.

    Raises:
        DataError: no model can be built so; names ``path``, where the settings are from.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    except Exception as error:  # whatever a wrong type or a zero runs into, deep in transformers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: no model can be built from it: {reason}") from None
    if config.hidden_size % config.num_attention_heads and "head_dim" not in fields:
        raise DataError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise DataError(
            f"{path}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    config.architectures = [type(model).__name__]
    return config, model


def write_settings(config: Any, dtype: torch.dtype, target: Path) -> None:
    """Writes config.json and generation_config.json for weights of ``dtype``."""
    from transformers import GenerationConfig

    config.torch_dtype = dtype
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
