"""Which directories hold a byte-level BPE tokenizer that can be extended, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, read_lines
from colossal_llama.tokenizer.byte_level import SLOW_FILES, ByteLevelTokenizer, merge_line
from colossal_llama.tokenizer.fast_tokenizer import load
from colossal_llama.tokenizer.fingerprint import added_tokens, read_fast_json

# Enough to see another cut, another space, another normaliser or another order of merges.
_PROBES = ("Hello world", "  two spaces", "x = [1, 23]\n\ty", "你好，世界", "nai\u0308ve I'LL 🙂")
_RENEW = (
    "load it with AutoTokenizer.from_pretrained and save_pretrained it, to bring both up to date"
)


def is_byte_level(fast: dict[str, Any]) -> bool:
    """Whether this tokenizer.json is a byte-level BPE tokenizer's, supported or not."""
    return fast["model"].get("type") == "BPE" and any(
        step.get("type") == "ByteLevel" for step in _steps(fast.get("pre_tokenizer"))
    )


def why_unsupported(fast: dict[str, Any], path: Path) -> str | None:
    """Why a tokenizer of which ``path`` has only this tokenizer.json cannot be extended, or None.

    Nothing but byte-level BPE can; SentencePiece BPE needs its tokenizer.model.
    """
    model, where = fast["model"], path / "tokenizer.json"
    kind = str(model.get("type"))
    if kind != "BPE":
        return f"{where}: a {kind} tokenizer; only BPE tokenizers can be extended"
    if not is_byte_level(fast):
        return (
            f"{where}: a BPE tokenizer that is not byte-level; tokenizer.model is missing, "
            "without which only byte-level BPE (GPT-2, Llama 3, Qwen) can be extended"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name):
            return f"{where}: byte-level BPE with {name} ({model[name]!r}) is not supported"
    if not any(step.get("type") == "ByteLevel" for step in _steps(fast.get("decoder"))):
        return f"{where}: byte-level BPE without the byte-level decoder is not supported"
    if any(step.get("add_prefix_space") for step in _steps(fast.get("pre_tokenizer"))):
        return (
            f"{where}: it puts a space before every text (add_prefix_space), which is not "
            "supported for byte-level BPE"
        )
    return None


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder, taken apart if it is a sequence of some."""
    if part is None:
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(name) or []:
            yield from _steps(step)


def read_byte_level(directory: Path) -> ByteLevelTokenizer:
    """Reads and checks a byte-level BPE tokenizer directory.

    Raises:
        DataError: it is missing, of another kind, or its files contradict each other.
    """
    fast = read_fast_json(directory)
    problem = why_unsupported(fast, directory)
    if problem:
        raise DataError(problem)
    added = added_tokens(directory, fast)
    _check_ids(directory, fast, added)
    _check_settings(directory, fast, added)
    tokenizer = ByteLevelTokenizer(directory, fast, added, _has_slow_files(directory, fast))
    differing = tokenizer.disagreements(_PROBES)
    if differing:
        raise DataError(
            f"{directory}: tokenizer.json and the slow tokenizer of {' and '.join(SLOW_FILES)} "
            f"give different ids for {differing[0]!r}; delete the latter"
        )
    return tokenizer


def _check_ids(directory: Path, fast: dict[str, Any], added: dict[int, str]) -> None:
    """Every id has one name, and it is the one that the tokenizers library gives it."""
    where = directory / "tokenizer.json"
    try:
        loaded = load(fast)
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{where}: not a tokenizer: {error}") from None
    names = dict[int, str]()
    vocabulary = ((key, name) for name, key in fast["model"]["vocab"].items())
    for key, name in (*vocabulary, *added.items()):
        if names.setdefault(key, name) != name:
            raise DataError(f"{where}: id {key} is both {names[key]!r} and {name!r}; {_RENEW}")
    for key, name in names.items():
        if loaded.id_to_token(key) != name or loaded.token_to_id(name) != key:
            raise DataError(
                f"{directory}: {name!r} is id {key} by its files, but {loaded.token_to_id(name)} "
                f"when tokenizer.json is loaded; {_RENEW}"
            )
    if len(names) != 1 + max(names, default=-1):
        gap = next(key for key in range(len(names)) if key not in names)
        raise DataError(f"{where}: id {gap} is nobody's; add a token there before you extend it")


def _check_settings(directory: Path, fast: dict[str, Any], added: dict[int, str]) -> None:
    """A special token that no file gives an id would get the next one, whichever that is.

    Nor may the settings put a space before a text.
    """
    known = {*fast["model"]["vocab"], *added.values()}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_json(directory / file) if (directory / file).is_file() else {}
        if not isinstance(settings, dict):
            raise DataError(f"{directory / file}: expected a JSON object")
        if settings.get("add_prefix_space"):  # only GPT-2's class heeds it
            raise DataError(
                f"{directory / file}: add_prefix_space, a space before every text, is not "
                "supported for byte-level BPE; remove the setting if the model was trained without"
            )
        for name, value in settings.items():
            if not name.endswith(("_token", "_special_tokens")):
                continue
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str) and text not in known:
                    raise DataError(
                        f"{directory / file}: {name} is {text!r}, which has no id in "
                        f"tokenizer.json; {_RENEW}"
                    )


def _has_slow_files(directory: Path, fast: dict[str, Any]) -> bool:
    """Whether the directory has the slow tokenizer's files; they have to say the same."""
    present = [name for name in SLOW_FILES if (directory / name).is_file()]
    if not present:
        return False
    if len(present) == 1:
        raise DataError(f"{directory}: {present[0]} is of no use alone; delete it")
    lines = (line.rstrip("\r\n") for _, line in read_lines(directory / "merges.txt"))
    merges = [line for line in lines if line and not line.startswith("#version")]
    if merges != [merge_line(merge) for merge in fast["model"]["merges"]]:
        raise DataError(
            f"{directory}: merges.txt and tokenizer.json disagree; delete the wrong one"
        )
    vocabulary = read_json(directory / "vocab.json")
    names = {token["content"]: token["id"] for token in fast.get("added_tokens") or []}
    if {**vocabulary, **names} != {**fast["model"]["vocab"], **names}:
        raise DataError(
            f"{directory}: vocab.json and tokenizer.json disagree; delete the wrong one"
        )
    return True
