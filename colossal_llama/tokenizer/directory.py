"""Tokenizer directories in Hugging Face format: read and checked, written slow and fast."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, write_json
from colossal_llama.tokenizer import fast_tokenizer, sentencepiece_model
from colossal_llama.tokenizer.fingerprint import added_tokens, read_fast_json

# Files that say how a tokenizer is used; they are carried over byte for byte.
SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Everything that belongs to a tokenizer in a model directory.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", *SETTINGS_FILES)

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
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
# Enough to see another prefix, another space or another order of merges.
_PROBES = ("Hello world", "  two spaces", "x = [1, 23]\n\ty", "你好，世界", "naïve 🙂")


@dataclass(frozen=True)
class TokenizerFiles:
    """A Llama tokenizer as its files say it."""

    path: Path
    model: Any  # the ModelProto of tokenizer.model
    fast: dict[str, Any]  # the content of tokenizer.json
    added: dict[int, str]  # id -> text of the added tokens, special ones included

    @property
    def size(self) -> int:
        """Number of SentencePiece pieces; added tokens may come after them."""
        return len(self.model.pieces)


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Reads and checks a SentencePiece BPE tokenizer directory; a missing fast half is made.

    Raises:
        DataError: it is missing, of another kind, or its two halves disagree.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such tokenizer directory")
    if not (directory / "tokenizer.model").is_file():
        raise DataError(_why_no_model(directory))
    _check_class(directory)
    model = sentencepiece_model.read_model(directory / "tokenizer.model")
    if (directory / "tokenizer.json").is_file():
        fast = read_fast_json(directory)
        _check_same_pieces(directory, model, fast)
    else:
        fast = fast_tokenizer.convert(directory, model)
    _check_same_ids(directory, model, fast)
    return TokenizerFiles(directory, model, fast, added_tokens(directory, fast))


def _why_no_model(directory: Path) -> str:
    if not (directory / "tokenizer.json").is_file():
        return f"{directory}: no tokenizer here: tokenizer.model is missing"
    fast = read_fast_json(directory)
    kind = str(fast["model"].get("type"))
    if "ByteLevel" in json.dumps([fast.get("pre_tokenizer"), fast.get("decoder")]):
        kind = f"byte-level {kind}"
    return (
        f"{directory}: a {kind} tokenizer without tokenizer.model; only SentencePiece BPE "
        "tokenizers (Llama 2, Mistral, InternLM) are supported"
    )


def _check_class(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object")
    name = config.get("tokenizer_class", _CLASSES[0])
    if name not in _CLASSES:
        raise DataError(
            f"{path}: tokenizer_class {name} is not supported; if the tokenizer is a plain "
            f"SentencePiece BPE model, set it to {_CLASSES[0]}"
        )


def _check_same_pieces(directory: Path, model: Any, fast: dict[str, Any]) -> None:
    vocabulary = fast["model"]["vocab"]
    if fast["model"].get("type") != "BPE":
        raise DataError(f"{directory}/tokenizer.json: not a BPE model, but tokenizer.model is")
    for piece, key in sentencepiece_model.normal_pieces(model).items():
        if vocabulary.get(piece) != key:
            raise DataError(
                f"{directory}: tokenizer.model and tokenizer.json disagree: {piece!r} is {key} in "
                f"the one and {vocabulary.get(piece)} in the other; delete the wrong file"
            )
    if len(vocabulary) > len(model.pieces):
        raise DataError(
            f"{directory}: tokenizer.json has {len(vocabulary)} pieces and tokenizer.model "
            f"{len(model.pieces)}; delete the wrong file"
        )


def _check_same_ids(directory: Path, model: Any, fast: dict[str, Any]) -> None:
    slow, quick = sentencepiece_model.processor(model), fast_tokenizer.load(fast)
    tied = sentencepiece_model.tied_pieces(model)
    texts = [*_PROBES, *("".join(tied[at : at + 20]) for at in range(0, len(tied), 20))]
    encodings = quick.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        if slow.encode(text) == encoding.ids:
            continue
        if (directory / "tokenizer.json").is_file():
            raise DataError(
                f"{directory}: tokenizer.model and tokenizer.json give different ids for {text!r}; "
                "delete tokenizer.json and it will be made from tokenizer.model"
            )
        raise DataError(
            f"{directory}: {len(tied)} pieces of tokenizer.model share their score with others, so "
            f"that no fast tokenizer can give the same ids (not for {text!r}); go back to the "
            "tokenizer that it was made from and extend that one with its new pieces"
        )


def write_tokenizer(
    target: Path, model: Any, fast: dict[str, Any], *, settings_from: Path | None
) -> None:
    """Writes slow and fast files into ``target``; all settings come from ``settings_from``.

    A bare SentencePiece model has no settings: it gets the defaults of LlamaTokenizer, spelled
    out, so that a later transformers cannot change them.
    """
    (target / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
    text = json.dumps(fast, ensure_ascii=False, indent=2)
    (target / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    for name in SETTINGS_FILES:
        if settings_from is not None and (settings_from / name).is_file():
            shutil.copyfile(settings_from / name, target / name)
    config, special = target / "tokenizer_config.json", target / "special_tokens_map.json"
    if not config.is_file():
        given = read_json(special) if special.is_file() else {}
        write_json(config, {**default_settings(), **given})
    if not special.is_file():
        settings = read_json(config)
        tokens = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name)}
        write_json(special, {name: _plain(token) for name, token in tokens.items()})


def default_settings() -> dict[str, Any]:
    """``tokenizer_config.json`` of a Llama tokenizer.

    ``legacy`` is true because then transformers' slow and fast tokenizers both do what
    SentencePiece does, around special tokens as well: measured on transformers 4.51.3, with false
    a fast tokenizer that it converts itself gives other ids to a text that starts with a space.
    """
    return {
        "tokenizer_class": _CLASSES[0],
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
