"""A new model with random weights: the shape from a preset, the ids from a tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json

PRESETS = Path(__file__).resolve().parent / "presets"


def write(preset: Path, tokenizer_path: Path, target: Path, *, seed: int, dtype: str) -> str:
    """Writes configuration and random weights into ``target``; returns a summary for the user.

    Raises:
        DataError: preset or tokenizer cannot be used.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from colossal_llama.tokenizer.fingerprint import vocabulary_size

    fields = read_json(preset)
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise DataError(f"{preset}: not a model's configuration: it has no model_type")
    size = vocabulary_size(tokenizer_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{tokenizer_path}: transformers cannot load this tokenizer: {reason}"
        ) from None
    fields |= {
        "vocab_size": size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = AutoConfig.for_model(**fields)
    except (ValueError, TypeError) as error:
        raise DataError(f"{preset}: {' '.join(str(error).split())}") from None
    print("drawing random weights ...", file=sys.stderr, flush=True)
    torch.manual_seed(seed)
    # Drawn in float32 and then rounded, so that all dtypes start from the same numbers.
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(target, safe_serialization=True)
    return f"a new model of {model.num_parameters():,} parameters for {size} ids"


def preset_path(name: str) -> Path:
    """Where the preset of this name lies; a name that ends in .json is a path itself."""
    return Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
