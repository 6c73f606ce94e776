"""The next merges on top of an existing BPE tokenizer, learned from text.

A piece can be produced if merging leads to it. Pieces from elsewhere need not have that property
in this tokenizer; pieces that are merged from its own do. So the text is first encoded with the
tokenizer, every id becomes one symbol of a private alphabet, and an ordinary BPE trainer goes on
from there: what it merges are ids.

A character that is no piece yet is written as two symbols of its own, a head and a tail. The
trainer joins them before anything else can touch them (see ``_Alphabet``), and it does so when
the character is frequent enough: characters and merges come in one order, by what they save.

Merging never crosses what the trainer is shown as words: the tokenizer's own words in byte-level
BPE, which cuts every text so; in SentencePiece, which does not, what its own trainer has for words
(see ``unicode_scripts.cut_words``).
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import fast_tokenizer
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.extension import extend
from colossal_llama.tokenizer.piece_list import SPACE, problem_of
from colossal_llama.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from colossal_llama.tokenizer.unicode_scripts import ScriptFilter, cut_words

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding, Tokenizer

_BATCH = 1000  # lines

_FIRST = 0x10000  # the first character of the private alphabet; 1,048,576 are left
_WORD_END = "\n"

# What occurs once is no pattern; its embedding row would never be trained.
_MIN_COUNT = 2


def learn(
    source: ExtensibleTokenizer,
    lines: Sequence[str],
    count: int,
    *,
    scripts: ScriptFilter | None,
    required: Sequence[str],
    coverage: float,
    max_length: int,
) -> list[str]:
    """The next ``count`` pieces in the source's spelling, or all that the text has.

    Any first part of the list is a list of its own: what a piece is built from comes before it,
    in byte-level BPE also the cut characters on the way to a character.

    Args:
        source: the tokenizer to go on from.
        lines: the text.
        count: of new pieces, characters and merged ones together.
        scripts: what to learn from; None for all of the text.
        required: characters in the source's spelling that come first, however rare.
        coverage: share of the text whose characters can become pieces or parts of them.
        max_length: of a piece, in characters.

    Raises:
        DataError: ``count`` has no room for what is ``required``.
    """
    cut, usable = _cutter(source, scripts), usable_in(source, max_length)
    known = set(source.pieces())
    frequent = _frequent_characters(lines, cut, coverage)
    spelled = (source.spell(character) for character in frequent if usable(character))
    new = [piece for piece in dict.fromkeys([*required, *spelled]) if piece not in known]
    grown = extend(source, new)
    first = grown.pieces[: 1 + max((grown.pieces.index(c) for c in required), default=-1)]
    if len(first) > count:
        raise DataError(
            f"--required_chars asks for {len(required)} new characters, which take {len(first)} "
            f"pieces; --num_new_pieces {count} has no room for them"
        )
    alphabet = _Alphabet.of(grown.tokenizer, set(new) - set(first))
    encoded = list(_as_words(grown.tokenizer, alphabet, map(cut, lines), len(lines)))
    steps = set(grown.pieces) - set(new)
    asked = 0
    while True:
        asked = max(count - len(first) + count // 8, 2 * asked)
        learned = _merge(alphabet, encoded, asked, 2 * max_length)
        fit = [p for p in learned if p not in known and usable(source.text(p))]
        found = list(dict.fromkeys([*first, *_with_steps(fit, steps)]))
        if len(found) >= count or len(learned) < asked:
            return found[:count]


def _with_steps(pieces: Iterable[str], steps: set[str]) -> Iterator[str]:
    for piece in pieces:
        yield from (piece[:end] for end in range(2, len(piece)) if piece[:end] in steps)
        yield piece


def _cutter(source: ExtensibleTokenizer, scripts: ScriptFilter | None) -> Callable[[str], str]:
    if scripts is not None:
        return scripts.cut
    return cut_words if isinstance(source, SentencePieceTokenizer) else str


def usable_in(source: ExtensibleTokenizer, max_length: float = inf) -> Callable[[str], bool]:
    """Says of a text, with spaces as spaces, whether it can be a new piece of ``source``.

    No run of spaces: it would change every indented text.
    """
    reserved = {text for text in source.reserved() if text}
    initials = {text[0] for text in reserved}

    def usable(text: str) -> bool:
        listed = text.replace(" ", SPACE)
        if len(text) > max_length or not text.strip():
            return False
        if problem_of(listed) or source.problem_of(listed):
            return False
        spelled = source.spell(listed)
        return initials.isdisjoint(spelled) or not any(part in spelled for part in reserved)

    return usable


def _frequent_characters(
    lines: Iterable[str], cut: Callable[[str], str], coverage: float
) -> list[str]:
    """The most frequent characters that make up ``coverage`` of the text that ``cut`` leaves."""
    counts = Counter[str]()
    for line in lines:
        counts.update(line)
    # A mark belongs to the letter before it, alone to nobody.
    foreign = [
        c for c in counts if not cut(c).strip() and not unicodedata.category(c).startswith("M")
    ]
    for character in foreign:
        del counts[character]
    needed = coverage * counts.total()
    found, covered = list[str](), 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= needed:
            break
        found.append(character)
        covered += count
    return found


@dataclass(frozen=True)
class _Alphabet:
    """Ids as symbols: one for a piece, head and tail for a character that is still to be learned.

    Heads come first, then pieces, then tails. No pair with a head or a tail is more frequent than
    these two, which never occur apart; of equally frequent pairs the trainer merges the one with
    the lowest symbols, and that begins with the head. So characters are never cut.
    """

    names: list[str]  # id -> piece
    heads: np.ndarray[Any, Any]  # uint32 [ids]: code point, of a head, a piece or a word's end
    tails: np.ndarray[Any, Any]  # uint32 [ids]: code point of a tail, or 0

    @classmethod
    def of(cls, tokenizer: ExtensibleTokenizer, unlearned: set[str]) -> _Alphabet:
        """For the ids of ``tokenizer``. Bytes and cut characters end a word: merges are text."""
        import numpy as np

        size, keys = tokenizer.size, tokenizer.fast["model"]["vocab"]
        assert _FIRST + 3 * size <= sys.maxunicode, "too many ids for the alphabet"
        names = [""] * size
        heads = np.full(size, ord(_WORD_END), dtype=np.uint32)
        tails = np.zeros(size, dtype=np.uint32)
        for piece in tokenizer.pieces():
            if "\ufffd" not in tokenizer.text(piece):
                key = keys[piece]
                names[key] = piece
                heads[key] = _FIRST + key + size * (piece not in unlearned)
                tails[key] = _FIRST + key + size * 2 if piece in unlearned else 0
        return cls(names, heads, tails)

    def symbols(self) -> list[str]:
        """All symbols in use."""
        return [
            chr(code) for code in {*self.heads.tolist(), *self.tails.tolist()} if code >= _FIRST
        ]

    def piece(self, symbols: str) -> str:
        """What the trainer merged, as a piece."""
        size = len(self.names)
        keys = (divmod(ord(symbol) - _FIRST, size) for symbol in symbols)
        return "".join(self.names[key] for part, key in keys if part != 2)


def _as_words(
    tokenizer: ExtensibleTokenizer, alphabet: _Alphabet, texts: Iterable[str], total: int
) -> Iterator[str]:
    """The ids of ``texts`` as symbols of ``alphabet``, a word a line."""
    import numpy as np
    from tqdm import tqdm

    encoder = _word_encoder(tokenizer)
    rest = iter(texts)
    with tqdm(desc="encoding", unit=" lines", total=total, delay=1) as progress:
        while batch := list(islice(rest, _BATCH)):
            encodings = encoder.encode_batch(batch, add_special_tokens=False)
            codes = np.concatenate([_codes(encoding, alphabet) for encoding in encodings])
            yield codes[codes != 0].astype("<u4").tobytes().decode("utf-32-le")
            progress.update(len(batch))


def _codes(encoding: Encoding, alphabet: _Alphabet) -> np.ndarray[Any, Any]:
    """uint32 [3 * tokens]: for each token the end of a word or 0, its head, its tail or 0."""
    import numpy as np

    codes = np.zeros((len(encoding), 3), dtype=np.uint32)
    words = np.array(encoding.word_ids, dtype=np.int64)
    codes[np.diff(words, prepend=-1) != 0, 0] = ord(_WORD_END)
    ids = np.array(encoding.ids, dtype=np.int64)
    codes[:, 1], codes[:, 2] = alphabet.heads[ids], alphabet.tails[ids]
    return codes.ravel()


def _word_encoder(tokenizer: ExtensibleTokenizer) -> Tokenizer:
    """Merges as ``tokenizer`` does, but only within words, a line each of the text."""
    from tokenizers import pre_tokenizers as pre

    words = pre.Split(_WORD_END, "removed")
    if isinstance(tokenizer, SentencePieceTokenizer):
        encoder = fast_tokenizer.load_bare(tokenizer.fast)
        own = pre.Metaspace(prepend_scheme="never", split=False)
    else:
        plain: dict[str, Any] = {"post_processor": None, "added_tokens": []}
        encoder = fast_tokenizer.load({**tokenizer.fast, **plain})
        own = encoder.pre_tokenizer
    encoder.pre_tokenizer = pre.Sequence([words, own])
    return encoder


def _merge(alphabet: _Alphabet, encoded: Sequence[str], count: int, max_symbols: int) -> list[str]:
    """The next ``count`` merges, fewer if the text has no more, as pieces in learned order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    symbols = alphabet.symbols()
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(_WORD_END)
    print(f"learning {count} merges (Ctrl-C is heard afterwards) ...", file=sys.stderr, flush=True)
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + count,
        min_frequency=_MIN_COUNT,
        initial_alphabet=symbols,
        max_token_length=max_symbols,
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator(encoded, trainer, length=len(encoded))
    vocabulary = model.get_vocab()
    merged = sorted((m for m in vocabulary if len(m) > 1), key=vocabulary.__getitem__)
    return list(map(alphabet.piece, merged))
