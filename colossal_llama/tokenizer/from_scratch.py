"""A SentencePiece BPE tokenizer learned from nothing but text, in Llama's format."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.piece_list import SPACE, problem_of
from colossal_llama.tokenizer.sentencepiece_model import normal_pieces
from colossal_llama.tokenizer.unicode_scripts import ScriptFilter

# SentencePiece keeps this character for itself: what it learns cannot hold it.
_RESERVED = "\u2585"
# Nor a control character: Llama spells line ends and tabs as bytes.
_SENTENCE_END = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029{_RESERVED}]+")
# Names that Llama's special and byte tokens have already.
_SPECIAL = re.compile(r"<unk>|<s>|</s>|<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Settings:
    """What to learn. The rest is as in Llama 2's tokenizer.model, read from its trainer_spec."""

    vocab_size: int  # pieces, special and byte tokens included
    character_coverage: float  # share of the text whose characters become pieces
    max_sentence_length: int  # bytes; longer lines are learned from in cuts
    max_piece_length: int  # characters
    byte_fallback: bool  # other characters are spelled in bytes, not lost as <unk>
    split_digits: bool  # every digit a piece of its own
    required_chars: tuple[str, ...]  # names for charsets.required_characters
    user_defined_symbols: tuple[str, ...]  # cut out of a text before anything is merged


@dataclass(frozen=True)
class Preset:
    """Published settings and where they were published."""

    settings: Settings
    source: str


_TAGS = (
    *("h1", "h2", "h3", "h4", "h5", "p", "b", "strong", "br", "img"),
    *("table", "tbody", "tr", "td", "li"),
)
_HAMMERLLM_SYMBOLS = (
    *("<SEP>", "<CLS>", "<LF>", "<tab>"),
    *(form.format(tag) for tag in _TAGS for form in ("<{}>", "<{}/>", "</{}>")),
    *"0123456789０１２３４５６７８９，。！？、：￥.!?《》【】『』",
    *("```", "<!--", "-->", "---", "<!DOCTYPE>"),
    *(f"<reserved_{number}>" for number in range(11)),
)

# All with the identity normaliser: a Llama fast tokenizer cannot reproduce another.
PRESETS = {
    "llama": Preset(
        Settings(32000, 0.99995, 4192, 16, True, True, (), ()),
        "trainer_spec in Llama 2's tokenizer.model",
    ),
    "hammerllm": Preset(
        Settings(
            *(128000, 0.9995, 8384, 32, True, True),
            ("level1", "level2", "level3"),
            _HAMMERLLM_SYMBOLS,
        ),
        "github.com/Academic-Hammer/HammerLLM, tokenizer/README.md and the trainer_spec in "
        "tokenizer/models/llama_zh_1b_128000_1g_0.9995. Two differences: it normalised with "
        "nmt_nfkc; and its list of symbols holds 'CLS>', '</p >' and octal escapes, where here "
        "stand <CLS>, </p> and the full-width characters that are meant",
    ),
    "baby-llama2-chinese": Preset(
        Settings(32000, 0.9995, 2657, 16, True, True, (), ()),
        "huggingface.co/flyingfishinwater/chinese-baby-llama2, its model card; what that does not "
        "say is llama's. Not github.com/DLLXW/baby-llama2-chinese, which took ChatGLM2-6B's",
    ),
}


def learn(lines: Iterable[str], settings: Settings, characters: Sequence[str], threads: int) -> Any:
    """The learned SentencePiece model (a ModelProto).

    No path enters it, so that the same text gives the same bytes wherever it lies.

    Args:
        lines: the text.
        settings: what to learn.
        characters: those that become pieces however rare they are.
        threads: does not change the result.

    Raises:
        DataError: a vocabulary size that the text cannot fill, or no text.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(lines, settings.max_sentence_length),
            model_writer=written,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            max_sentence_length=settings.max_sentence_length,
            max_sentencepiece_length=settings.max_piece_length,
            byte_fallback=settings.byte_fallback,
            split_digits=settings.split_digits,
            required_chars="".join(characters),
            user_defined_symbols=list(settings.user_defined_symbols),
            num_threads=threads,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), settings)) from None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(written.getvalue())
    model.trainer_spec.ClearField("num_threads")
    return model


def problem_of_symbol(symbol: str) -> str | None:
    """Why this cannot be a user-defined symbol, or None."""
    if _SPECIAL.fullmatch(symbol):
        return "is a special token of every Llama tokenizer"
    return problem_of(symbol)


def problem_of_character(character: str) -> str | None:
    """Why this cannot be a required character, or None."""
    if character == _RESERVED:
        return f"is U+{ord(_RESERVED):04X}, which SentencePiece keeps for itself"
    return problem_of(character)


def _sentences(lines: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The lines without control characters; SentencePiece would drop those over ``max_bytes``."""
    width = max_bytes // 4  # a character has at most four bytes
    for line in lines:
        for sentence in _SENTENCE_END.split(line):
            if len(sentence.encode("utf-8")) <= max_bytes:
                if sentence:
                    yield sentence
            else:
                yield from (sentence[at : at + width] for at in range(0, len(sentence), width))


def _explain(message: str, settings: Settings) -> str:
    """SentencePiece's error in terms of our flags."""
    if match := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return (
            f"--vocab_size {settings.vocab_size} is more than this text can fill; "
            f"it allows at most {match[1]}"
        )
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"--vocab_size {settings.vocab_size} is too small for the characters of this text; "
            f"it needs at least {match[1]}, or a lower --character_coverage"
        )
    return f"SentencePiece could not learn from this text: {message}"


def learned_pieces(model: Any, scripts: ScriptFilter | None) -> list[str]:
    """The pieces that ``init_tokenizer.py`` can add elsewhere: merged ones in the order in which
    they were learned, then single characters; with ``scripts`` only those that it allows.
    """
    pieces = [piece for piece in normal_pieces(model) if problem_of(piece) is None]
    if scripts:
        pieces = [piece for piece in pieces if scripts.allows(piece.replace(SPACE, " "))]
    return [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]


def merged_pieces(model: Any) -> list[str]:
    """The pieces that were learned by merging, in this order."""
    return [piece for piece in normal_pieces(model) if len(piece) > 1]


def without_pieces(fast: dict[str, Any], pieces: Iterable[str]) -> dict[str, Any]:
    """A tokenizer.json that segments as if ``pieces``, the last ones learned, were not there.

    This is what a smaller --vocab_size gives: its merges are the first of these.
    """
    gone = set(pieces)
    vocabulary = {p: key for p, key in fast["model"]["vocab"].items() if p not in gone}
    merges = []
    for merge in fast["model"]["merges"]:
        left, right = merge.split(" ")
        if gone.isdisjoint((left, right, left + right)):
            merges.append(merge)
    return {**fast, "model": {**fast["model"], "vocab": vocabulary, "merges": merges}}
