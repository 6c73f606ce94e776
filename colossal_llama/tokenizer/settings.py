"""The files beside a tokenizer's vocabulary that say how it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from colossal_llama.storage import read_json, write_json

# Carried over byte for byte.
SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)


def copy_settings(source: Path | None, target: Path) -> None:
    """Writes the settings files into ``target``: those of the directory ``source``.

    A bare SentencePiece model has no settings: it gets the defaults of LlamaTokenizer, spelled
    out, so that a later transformers cannot change them.
    """
    for name in SETTINGS_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config, special = target / "tokenizer_config.json", target / "special_tokens_map.json"
    if not config.is_file():
        given = read_json(special) if special.is_file() else {}
        write_json(config, {**default_settings(), **given})
    if not special.is_file():
        settings = read_json(config)
        tokens = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name)}
        write_json(special, {name: _plain(token) for name, token in tokens.items()})
    drop_prefix_setting(config)


def drop_prefix_setting(config: Path) -> None:
    """Leaves the space before a text to tokenizer.model and tokenizer.json.

    transformers writes ``add_prefix_space`` on saving. Where it is true, the fast class throws
    tokenizer.json away and converts tokenizer.model anew; where it is null and ``legacy`` false,
    the slow class leaves the space out. Measured on transformers 4.51.3.
    """
    settings = read_json(config)
    if "add_prefix_space" in settings:
        del settings["add_prefix_space"]
        write_json(config, settings)


def default_settings() -> dict[str, Any]:
    """``tokenizer_config.json`` of a Llama tokenizer.

    ``legacy`` is true because then transformers' slow and fast tokenizers both do what
    SentencePiece does, around special tokens as well: measured on transformers 4.51.3, with false
    a fast tokenizer that it converts itself gives other ids to a text that starts with a space.
    """
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": int(1e30),
        "sp_model_kwargs": {},
    }


def _plain(token: Any) -> Any:
    """An added token without transformers' type mark, which only tokenizer_config.json has."""
    if isinstance(token, dict):
        return {key: value for key, value in token.items() if key != "__type"}
    return [_plain(item) for item in token] if isinstance(token, list) else token
