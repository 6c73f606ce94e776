"""What another tokenizer has and this one lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import sentencepiece_model
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.piece_list import SPACE, problem_of
from colossal_llama.tokenizer.unicode_scripts import ScriptFilter


@dataclass(frozen=True)
class OtherVocabulary:
    """Pieces and user-defined symbols as texts, with spaces as spaces."""

    texts: list[str]  # the first to be merged first
    symbols: list[str]
    has_scores: bool


def read_vocabulary(directory: Path) -> OtherVocabulary:
    """Reads the pieces of a BPE tokenizer directory.

    Of a SentencePiece model only the pieces matter: it may rewrite the text before it segments
    it, as a tokenizer that is to be extended may not.

    Raises:
        DataError: it is missing or of another kind.
    """
    path = directory / "tokenizer.model"
    if not path.is_file():
        other = read_tokenizer(directory)
        texts = [text for text in map(other.text, other.pieces()) if "\ufffd" not in text]
        symbols = sorted(map(other.text, other.symbols()))
        return OtherVocabulary(texts, symbols, has_scores=False)
    model = sentencepiece_model.parse_model(path)
    if model.trainer_spec.model_type != sentencepiece_model.BPE:
        raise DataError(f"{path}: not a BPE model; only BPE tokenizers can be merged")
    scores = sentencepiece_model.scores(model)
    pieces = sorted(scores, key=lambda piece: -scores[piece])  # stable: ties stay as they are
    symbols = [e.piece for e in model.pieces if e.type == sentencepiece_model.USER_DEFINED]
    return OtherVocabulary([p.replace(SPACE, " ") for p in pieces], symbols, has_scores=True)


def lacking(
    source: ExtensibleTokenizer,
    other: OtherVocabulary,
    scripts: ScriptFilter | None,
    usable: Callable[[str], bool],
) -> tuple[list[str], list[str]]:
    """The pieces and the symbols of ``other`` that ``source`` lacks, in the source's spelling.

    With ``scripts`` only the pieces that it allows, and no symbols.
    """
    known = {*source.pieces(), *source.reserved()}
    symbols = [] if scripts else [s for s in other.symbols if problem_of(s) is None]
    symbols = [symbol for symbol in symbols if source.spell(symbol) not in known]
    texts = [
        text
        for text in other.texts
        if (scripts is None or scripts.allows(text)) and not any(s in text for s in symbols)
    ]
    spelled = ((source.spell(text.replace(" ", SPACE)), text) for text in texts)
    pieces = [piece for piece, text in spelled if piece not in known and usable(text)]
    return pieces, list(map(source.spell, symbols))
