"""Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2): how such a tokenizer is extended and written.

The alphabet of such a vocabulary is the 256 bytes, each spelled as a visible character; a space
is "Ġ", and a Chinese character is three of them until merges make it a piece.

New merges come after all old ones. They touch a text only where it holds an added piece, byte
for byte: a text without any is segmented exactly as before. What the characters of a list lack
is among the added pieces: to build 本 (E6 9C AC) from bytes, something has to merge E6 9C first,
so a text in a script that shares these two bytes can change, unless the vocabulary had that
merge. ASCII cannot.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, write_json
from colossal_llama.tokenizer.fast_tokenizer import load, load_bare
from colossal_llama.tokenizer.neighbours import Production, produced_between
from colossal_llama.tokenizer.sentencepiece_model import SPACE
from colossal_llama.tokenizer.settings import SETTINGS_FILES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What transformers' slow classes (GPT2Tokenizer, Qwen2Tokenizer) read instead of tokenizer.json.
SLOW_FILES = ("vocab.json", "merges.txt")

# A byte that UTF-8 never uses, as the vocabulary spells it: no text has it, so no look-up of
# whole words (ignore_merges) can find a name that holds it.
_NEVER = "ÿ"


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte -> that byte, in the order of the bytes.

    A byte that is visible in Latin-1 stands for itself, the others for U+0100 onwards.
    Source: bytes_to_unicode in encoder.py of openai/gpt-2.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in visible else next(others)): byte for byte in range(256)}


_BYTES = byte_alphabet()
_CHARACTERS = list(_BYTES)


@dataclass(frozen=True)
class ByteLevelTokenizer:
    """A byte-level BPE tokenizer as its files say it; see ``ExtensibleTokenizer``."""

    path: Path
    fast: dict[str, Any]  # the content of tokenizer.json
    added: dict[int, str]  # id -> text of the added tokens, special ones included
    has_slow_files: bool = False

    @property
    def size(self) -> int:
        return 1 + max([-1, *self.fast["model"]["vocab"].values(), *self.added])

    def spell(self, text: str) -> str:
        return _spelled(text.replace(SPACE, " "))

    def text(self, piece: str) -> str:
        return _bytes_of(piece).decode("utf-8", "replace") if _is_spelled(piece) else piece

    def pieces(self) -> list[str]:
        added = set(self.added.values())
        usable = (piece for piece in self._by_id if piece not in added and _is_spelled(piece))
        return [piece for piece in usable if len(piece) == 1 or _NEVER not in piece]

    @property
    def _by_id(self) -> list[str]:
        vocabulary: dict[str, int] = self.fast["model"]["vocab"]
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def symbols(self) -> set[str]:
        tokens = self.fast.get("added_tokens") or []
        return {_spelled(token["content"]) for token in tokens if not token.get("special")}

    def reserved(self) -> set[str]:
        return set(map(_spelled, self.added.values()))

    def touched_characters(self, pieces: Sequence[str]) -> set[str]:
        """Characters of which a text holds one if adding ``pieces`` can change its ids."""
        found = set[str]()
        for piece in pieces:
            data = _bytes_of(piece).strip(b" ")
            found.update(data.decode("utf-8", "ignore") or (_continued(data) if data else " "))
        return found

    def problem_of(self, text: str) -> str | None:
        text = text.replace(SPACE, " ")
        for character in text:
            for byte in character.encode("utf-8"):
                if _CHARACTERS[byte] not in self.fast["model"]["vocab"]:
                    return f"holds {character!r}, whose byte 0x{byte:02X} this vocabulary lacks"
        rules = self._rules
        if rules.normalizer is not None:
            normal = rules.normalizer.normalize_str(text)
            if normal != text:
                return f"is written {normal!r} by this tokenizer before it looks for pieces"
        cuts = [text[a:b] for _, (a, b) in rules.pre_tokenizer.pre_tokenize_str(text)]
        if len(cuts) > 1:
            return f"is always cut by this tokenizer, into {' and '.join(map(repr, cuts))}"
        return None

    @cached_property
    def _rules(self) -> Tokenizer:
        """What happens to a text before merging: normaliser and pre-tokenizer."""
        model = {"type": "BPE", "vocab": {}, "merges": []}
        bare: dict[str, Any] = {"model": model, "post_processor": None, "added_tokens": []}
        return load({**self.fast, **bare})

    def extended(
        self,
        pieces: Sequence[str],
        *,
        scores: Mapping[str, float] | None = None,
        symbols: Sequence[str] = (),
        padding: int = 0,
    ) -> ByteLevelTokenizer:
        assert not scores, "merges have an order, not scores"
        model = self.fast["model"]
        # An added token that is only in added_tokens would move when the vocabulary grows.
        old = {**model["vocab"], **{text: key for key, text in self.added.items()}}
        vocabulary = dict(sorted(old.items(), key=lambda item: item[1]))
        texts = list(map(self.text, symbols))
        names = (f"<unused_{number}>{_NEVER}" for number in itertools.count())
        free = (name for name in names if name not in old and name not in texts)
        unused = itertools.islice(free, padding)
        new = {name: key for key, name in enumerate([*pieces, *texts, *unused], self.size)}
        if clash := [text for text in texts if text in old]:
            raise DataError(
                f"{self.path}: {clash[0]!r} cannot be a user-defined symbol: it is how this "
                f"vocabulary spells {self.text(clash[0])!r}"
            )
        assert len(new) == len(pieces) + len(symbols) + padding, "something is added twice"
        assert new.keys().isdisjoint(old), "something is added that is there"
        merges = [*model["merges"], *self._merges_into(pieces)]
        tokens = [_symbol(text, new[text]) for text in texts]
        fast = {
            **self.fast,
            "added_tokens": [*(self.fast.get("added_tokens") or []), *tokens],
            "model": {**model, "vocab": vocabulary | new, "merges": merges},
        }
        return replace(
            self, fast=fast, added=self.added | {token["id"]: token["content"] for token in tokens}
        )

    def _merges_into(self, pieces: Sequence[str]) -> list[Any]:
        """Every split of each piece into two pieces, spelled as the file spells its merges."""
        known = {*self.pieces(), *pieces}
        merges = self.fast["model"]["merges"]
        spell = " ".join if merges and isinstance(merges[0], str) else list
        return [
            spell((piece[:cut], piece[cut:]))
            for piece in pieces
            for cut in range(len(piece) - 1, 0, -1)
            if piece[:cut] in known and piece[cut:] in known
        ]

    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        found = load_bare(self.fast).encode_batch(list(pieces), add_special_tokens=False)
        return [encoding.tokens for encoding in found]

    def production(self, pieces: Sequence[str]) -> Production:
        """Where the pieces are produced, in the fast tokenizer and in the slow one if there is one.

        Alone means twice: by merging only, and as a whole text. The steps that are no whole
        characters, and so no text, have to be produced by merging.
        """
        vocabulary, symbols = self.fast["model"]["vocab"], self.symbols()
        merged = [piece for piece in pieces if piece not in symbols]
        found = zip(merged, self.segment(merged), strict=True)
        dead = {piece for piece, parts in found if parts != [piece]}
        keys = {p: vocabulary[self.text(p) if p in symbols else p] for p in pieces}
        texts = {self.text(piece): piece for piece in pieces if _is_text(piece)}
        whole = zip(texts.values(), self._agreed(list(texts)), strict=True)
        dead |= {piece for piece, ids in whole if ids != [keys[piece]]}
        between, lost = produced_between(
            {text: keys[piece] for text, piece in texts.items() if piece not in dead}, self._agreed
        )
        missing = dead | {texts[text] for text in lost}
        return Production(between, [piece for piece in pieces if piece in missing])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._loaded.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def disagreements(self, texts: Sequence[str]) -> list[str]:
        found = zip(texts, self._agreed(texts), strict=True)
        return [text for text, ids in found if ids == [-1]]

    def _agreed(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids that both halves give; where they differ [-1], which nothing can equal."""
        fast, slow = self.encode(texts), self._slow
        if slow is None:
            return fast
        pairs = zip(texts, fast, strict=True)
        return [
            ids if slow.encode(text, add_special_tokens=False) == ids else [-1]
            for text, ids in pairs
        ]

    @cached_property
    def _loaded(self) -> Tokenizer:
        tokenizer = load(self.fast)
        # The slow classes know no other way that leaves symbols alone.
        tokenizer.encode_special_tokens = False
        return tokenizer

    @cached_property
    def _slow(self) -> Any | None:
        """The slow tokenizer that transformers makes of the written files, if they are for one."""
        if not self.has_slow_files:
            return None
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as directory:
            self.write(Path(directory), settings_from=self.path)
            try:
                slow = AutoTokenizer.from_pretrained(
                    directory, use_fast=False, local_files_only=True
                )
            except (OSError, ValueError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"{self.path}: transformers cannot load the slow tokenizer: {reason}; delete "
                    f"{' and '.join(SLOW_FILES)} if only tokenizer.json is used"
                ) from None
        return None if slow.is_fast else slow

    def write(self, target: Path, *, settings_from: Path | None) -> None:
        model = self.fast["model"]
        load_id = self._loaded.id_to_token
        assert all(load_id(key) == piece for piece, key in model["vocab"].items()), "an id moved"
        text = json.dumps(self.fast, ensure_ascii=False, indent=2)
        (target / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        if self.has_slow_files:
            vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
            (target / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
            lines = ["#version: 0.2", *map(merge_line, model["merges"])]
            (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in SETTINGS_FILES:
            if settings_from is not None and (settings_from / name).is_file():
                shutil.copyfile(settings_from / name, target / name)
        self._complete_settings(target / "tokenizer_config.json", settings_from)

    def _complete_settings(self, path: Path, source: Path | None) -> None:
        """Names the class where nothing does, and adds symbols where added tokens are listed."""
        given = read_json(path) if path.is_file() else {}
        settings = {**given}
        if "tokenizer_class" not in settings:
            settings["tokenizer_class"] = _class_of(source)
            settings.setdefault("clean_up_tokenization_spaces", False)
        if "added_tokens_decoder" in settings:
            listed = dict(settings["added_tokens_decoder"])
            for token in self.fast["added_tokens"]:
                flags = {name: value for name, value in token.items() if name != "id"}
                listed.setdefault(str(token["id"]), flags)
            settings["added_tokens_decoder"] = listed
        if settings != given:
            write_json(path, settings)


def _spelled(text: str) -> str:
    return "".join(_CHARACTERS[byte] for byte in text.encode("utf-8"))


def _is_spelled(piece: str) -> bool:
    """Whether ``piece`` is written in the characters that stand for bytes."""
    return all(character in _BYTES for character in piece)


def _bytes_of(piece: str) -> bytes:
    return bytes(_BYTES[character] for character in piece)


def _is_text(piece: str) -> bool:
    """Whether ``piece`` is whole characters; a step on the way to a character is not."""
    try:
        return bool(_bytes_of(piece).decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _continued(start: bytes) -> set[str]:
    """All characters whose UTF-8 starts with ``start``, which is a part of one."""
    found = set[str]()
    missing = (2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4) - len(start)
    for rest in itertools.product(range(0x80, 0xC0), repeat=missing):
        with suppress(UnicodeDecodeError):
            found.add((start + bytes(rest)).decode("utf-8"))
    return found


def merge_line(merge: str | Sequence[str]) -> str:
    """A merge as merges.txt has it."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _symbol(text: str, key: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": key, "content": text, **flags}


def _class_of(source: Path | None) -> str:
    """The class that transformers takes for the model beside the source tokenizer, if any."""
    fallback = "PreTrainedTokenizerFast"
    if source is None or not (source / "config.json").is_file():
        return fallback
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    kind = read_json(source / "config.json").get("model_type")
    slow, fast = TOKENIZER_MAPPING_NAMES.get(kind, (None, None))
    return str(fast or slow or fallback)
