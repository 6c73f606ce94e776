"""A SentencePiece BPE tokenizer (Llama 2, Mistral, InternLM): slow and fast half as one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json
from colossal_llama.tokenizer import fast_tokenizer, sentencepiece_model
from colossal_llama.tokenizer.fingerprint import added_tokens, read_fast_json
from colossal_llama.tokenizer.neighbours import Production, produced_between
from colossal_llama.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    append_pieces,
    processor,
)
from colossal_llama.tokenizer.settings import copy_settings

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
# Enough to see another prefix, another space or another order of merges.
_PROBES = ("Hello world", "  two spaces", "x = [1, 23]\n\ty", "你好，世界", "naïve 🙂")


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A Llama tokenizer as its files say it; see ``ExtensibleTokenizer``."""

    path: Path
    model: Any  # the ModelProto of tokenizer.model
    fast: dict[str, Any]  # the content of tokenizer.json
    added: dict[int, str]  # id -> text of the added tokens, special ones included

    @property
    def size(self) -> int:
        return max([len(self.model.pieces), *(key + 1 for key in self.added)])

    def spell(self, text: str) -> str:
        return text

    def text(self, piece: str) -> str:
        return piece.replace(SPACE, " ")

    def pieces(self) -> list[str]:
        return list(sentencepiece_model.normal_pieces(self.model))

    def symbols(self) -> set[str]:
        return {entry.piece for entry in self.model.pieces if entry.type == USER_DEFINED}

    def reserved(self) -> set[str]:
        special = {entry.piece for entry in self.model.pieces if entry.type != NORMAL}
        return special | set(self.added.values())

    def touched_characters(self, pieces: Sequence[str]) -> set[str]:
        # A space is in nearly every text, but a piece that holds more needs the rest of it too.
        return set[str]().union(*(set(self.text(piece)) - {" "} or {" "} for piece in pieces))

    def problem_of(self, text: str) -> str | None:
        return None

    def scores(self) -> dict[str, float]:
        """The score of every piece that merging can use: the higher, the earlier its merge."""
        return sentencepiece_model.scores(self.model)

    def extended(
        self,
        pieces: Sequence[str],
        *,
        scores: Mapping[str, float] | None = None,
        symbols: Sequence[str] = (),
        padding: int = 0,
    ) -> SentencePieceTokenizer:
        model = append_pieces(
            self._with_added_tokens(), pieces, scores=scores, symbols=symbols, padding=padding
        )
        fast = fast_tokenizer.with_pieces_of(self.fast, model)
        return SentencePieceTokenizer(self.path, model, fast, self.added)

    def _with_added_tokens(self) -> Any:
        """The model with the added tokens that come after its last piece (``<pad>`` at 32000).

        As control pieces they keep their ids, and no text is segmented into them.
        """
        if self.size == len(self.model.pieces):
            return self.model
        model = type(self.model)()
        model.CopyFrom(self.model)
        for key in range(len(model.pieces), self.size):
            if key not in self.added:
                raise DataError(
                    f"{self.path}: its added tokens go up to id {self.size - 1}, but id {key} is "
                    "nobody's; add a token there before you extend it"
                )
            model.pieces.add(piece=self.added[key], score=0.0, type=CONTROL)
        return model

    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        encoder = processor(self.model, dummy_prefix=False)
        return list(encoder.encode(list(pieces), out_type=str))

    def production(self, pieces: Sequence[str]) -> Production:
        """Where the pieces are produced, in SentencePiece and in the fast tokenizer.

        Alone means without the dummy prefix; between neighbours and as whole texts, both halves
        have to give the same ids.
        """
        keys = {entry.piece: key for key, entry in enumerate(self.model.pieces)}
        alone = processor(self.model, dummy_prefix=False)
        bare = fast_tokenizer.load_bare(self.fast)
        merged = [p for p in pieces if self.model.pieces[keys[p]].type != USER_DEFINED]
        quick = bare.encode_batch(merged, add_special_tokens=False)
        found = zip(merged, _ids(alone.encode(merged)), quick, strict=True)
        dead = {p for p, ids, entry in found if not ids == entry.ids == [keys[p]]}
        texts = {self.text(piece): piece for piece in pieces}
        whole, fast = self._halves
        dead |= {texts[text] for text in _differing(whole, fast, list(texts))}
        between, lost = produced_between(
            {text: keys[piece] for text, piece in texts.items() if piece not in dead},
            lambda texts: _both(whole, fast, texts),
        )
        missing = dead | {texts[text] for text in lost}
        return Production(between, [piece for piece in pieces if piece in missing])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        slow, _ = self._halves
        return list(_ids(slow.encode(list(texts))))

    def disagreements(self, texts: Sequence[str]) -> list[str]:
        return _differing(*self._halves, list(texts))

    @cached_property
    def _halves(self) -> tuple[SentencePieceProcessor, Any]:
        return processor(self.model), fast_tokenizer.load(self.fast)

    def write(self, target: Path, *, settings_from: Path | None) -> None:
        (target / "tokenizer.model").write_bytes(self.model.SerializeToString(deterministic=True))
        text = json.dumps(self.fast, ensure_ascii=False, indent=2)
        (target / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        copy_settings(settings_from, target)


def _ids(batch: Any) -> Iterable[list[int]]:
    """SentencePiece returns a list of lists for a list of texts, which its types do not say."""
    return batch


def _both(slow: SentencePieceProcessor, fast: Any, texts: list[str]) -> list[list[int]]:
    """Ids that both halves give; where they differ, none, which nothing can equal."""
    quick = fast.encode_batch(texts, add_special_tokens=False)
    pairs = zip(_ids(slow.encode(texts)), quick, strict=True)
    return [ids if ids == entry.ids else [-1] for ids, entry in pairs]


def _differing(slow: SentencePieceProcessor, fast: Any, texts: list[str]) -> list[str]:
    found = zip(texts, _both(slow, fast, texts), strict=True)
    return [text for text, ids in found if ids == [-1]]


def read_sentencepiece(directory: Path) -> SentencePieceTokenizer:
    """Reads and checks a SentencePiece BPE tokenizer directory; a missing fast half is made.

    Raises:
        DataError: it is of another kind, or its two halves disagree.
    """
    settings = _settings(directory)
    model = sentencepiece_model.read_model(directory / "tokenizer.model")
    _check_prefix(directory, model, settings)
    if (directory / "tokenizer.json").is_file():
        fast = read_fast_json(directory)
        _check_same_pieces(directory, model, fast)
    else:
        fast = fast_tokenizer.convert(directory, model)
    tokenizer = SentencePieceTokenizer(directory, model, fast, added_tokens(directory, fast))
    _check_same_ids(tokenizer)
    return tokenizer


def _settings(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, which names a class that does what the model says."""
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
    return config


def _check_prefix(directory: Path, model: Any, settings: dict[str, Any]) -> None:
    """transformers may put a space before a text or leave it out, whatever the model says."""
    path, prefix = directory / "tokenizer_config.json", model.normalizer_spec.add_dummy_prefix
    given = settings.get("add_prefix_space")
    puts = "puts a" if prefix else "puts no"
    if given is not None and given != prefix:
        raise DataError(
            f"{path}: add_prefix_space is {str(given).lower()}, but tokenizer.model {puts} space "
            "before a text; remove the setting if the model was trained with tokenizer.model"
        )
    if not prefix and settings.get("legacy") is False:
        raise DataError(
            f"{path}: legacy is false, with which transformers' slow tokenizer puts a space "
            "before a text, but tokenizer.model puts no space there; set it to true"
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


def _check_same_ids(tokenizer: SentencePieceTokenizer) -> None:
    directory, model = tokenizer.path, tokenizer.model
    tied = sentencepiece_model.tied_pieces(model)
    symbols = sorted(tokenizer.symbols() - set(tokenizer.added.values()))
    texts = [*_PROBES, *("".join(tied[at : at + 20]) for at in range(0, len(tied), 20))]
    texts += [f"{symbol}x{symbol} y" for symbol in symbols]
    differing = tokenizer.disagreements(texts)
    if not differing:
        return
    if (directory / "tokenizer.json").is_file():
        raise DataError(
            f"{directory}: tokenizer.model and tokenizer.json give different ids for "
            f"{differing[0]!r}; delete tokenizer.json and it will be made from tokenizer.model"
        )
    raise DataError(
        f"{directory}: {len(tied)} pieces of tokenizer.model share their score with others, so "
        f"that no fast tokenizer can give the same ids (not for {differing[0]!r}); go back to the "
        "tokenizer that it was made from and extend that one with its new pieces"
    )
