"""Small byte-level BPE tokenizers with the settings of published ones, learned on the spot.

Settings read from the tokenizer.json of GPT-2, Llama 3, Qwen 2 and SmolLM2.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

STYLES = ("gpt2", "llama3", "qwen", "smollm")
SLOW = ("gpt2", "qwen")  # styles that come with vocab.json and merges.txt

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPLITS = {
    "llama3": _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _MARKS + _REST,
    "qwen": _CONTRACTIONS + _WORDS + r"\p{N}" + _MARKS + _REST,
}
_SPECIAL = {
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen": "Qwen2Tokenizer", "smollm": "GPT2Tokenizer"}

# Characters of several scripts; learned tokenizers know some, extensions ask for others.
HAN = [chr(code) for code in range(0x4E00, 0x9FA0, 37)]
OTHER = list("привет你好éñüßקשתمرحبا한국어日本語カナ🙂🚀𠀀𠀁—“”…")


def foreign_text(seed: int, lines: int, letters: list[str] = HAN[:200]) -> list[str]:
    """Pseudo-Chinese: some letters are frequent, most are rare; some of other scripts."""
    dice = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(letters) + 1)]

    def line() -> str:
        words = (
            "".join(dice.choices(letters, weights, k=dice.randint(1, 6)))
            if dice.random() < 0.9
            else "".join(dice.choices(OTHER, k=3))
            for _ in range(8)
        )
        return "".join(word + dice.choice("，。 、") for word in words)

    return [line() for _ in range(lines)]


def make_all(folder: Path, texts: Iterable[str]) -> dict[str, Path]:
    """A tokenizer of every style, learned from ``texts`` and some in other scripts."""
    everything = [*texts, *foreign_text(0, 600)]
    return {style: make(style, folder / style, everything) for style in STYLES}


def make(style: str, directory: Path, texts: Iterable[str], size: int = 1500) -> Path:
    """Learns a tokenizer of this style and writes its directory."""
    model = models.BPE(ignore_merges=style == "llama3")
    tokenizer = Tokenizer(model)
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    if style in _SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[style]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if style == "smollm":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
            )
    tokenizer.decoder = decoders.ByteLevel()
    # In GPT-2 and SmolLM2 the special tokens are in the vocabulary, in the others after it.
    inside = [] if style in _SPLITS else [AddedToken(t, special=True) for t in _SPECIAL[style]]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=inside,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in _SPECIAL[style]])
    if style == "llama3":
        bos = _SPECIAL[style][0]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    directory.mkdir()
    _write(style, tokenizer, directory)
    return directory


def _write(style: str, tokenizer: Tokenizer, directory: Path) -> None:
    fast = json.loads(tokenizer.to_str())
    if style == "smollm":  # files written by tokenizers before 0.20 spell merges as text
        fast["model"]["merges"] = [" ".join(merge) for merge in fast["model"]["merges"]]
    write_json(directory / "tokenizer.json", fast)
    special = _SPECIAL[style]
    listed = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in fast["added_tokens"]
    }
    settings: dict[str, Any] = {
        "tokenizer_class": _CLASSES.get(style, "PreTrainedTokenizerFast"),
        "added_tokens_decoder": listed,
        "bos_token": special[0],
        "eos_token": special[-1],
        "unk_token": special[0],
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", settings)
    if style in SLOW:
        tokenizer.model.save(str(directory))  # vocab.json, merges.txt


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
