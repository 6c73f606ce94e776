"""Which pieces must join a BPE tokenizer so that every wanted piece can be produced.

BPE builds a piece by merging two pieces into a third, over and over, from single characters (or
bytes). A piece is dead if its characters are not pieces, or if the merges on the way to it are
missing or lose against others. So characters come first, and a piece that the extended model
still cuts in two or more gets the missing steps, until every one encodes to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from colossal_llama.errors import DataError
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.piece_list import SPACE

ON_UNREACHABLE = ("repair", "drop", "error")


@dataclass(frozen=True)
class Extension:
    """A tokenizer that produces every piece that was added to it, and what that took."""

    tokenizer: ExtensibleTokenizer
    pieces: list[str]  # added, in the order of their ids, repairs included
    characters: list[str]  # single characters that were added without being asked for
    repaired: list[str]  # steps between characters and wanted pieces that were added
    dropped: list[str]  # wanted pieces that were left out
    padding: int  # ids at the end that stand for nothing
    between: dict[str, int]  # neighbours -> pieces that were found between these first


def extend(
    source: ExtensibleTokenizer,
    wanted: Sequence[str],
    *,
    scores: Mapping[str, float] | None = None,
    symbols: Sequence[str] = (),
    multiple_of: int = 1,
    on_unreachable: str = "repair",
) -> Extension:
    """Adds ``wanted`` pieces (new, each once, in the source's spelling) to ``source``.

    Args:
        source: the tokenizer to extend, which stays as it is.
        wanted: the pieces, most important first.
        scores: where SentencePiece pieces stand among the old ones; see ``calibration``.
        symbols: user-defined symbols, cut out of a text before anything is merged.
        multiple_of: the number of ids is filled up to a multiple of this.
        on_unreachable: what to do about a piece that the list alone leaves out of reach: repair
            it by adding its missing characters and steps, drop it, or end with an error.

    Raises:
        DataError: some pieces stay out of reach.
    """
    order, dropped = list(wanted), list[str]()
    if on_unreachable == "repair":
        order = _repaired(source, order, scores)
    while True:
        size = source.size + len(order) + len(symbols)
        tokenizer = source.extended(
            order, scores=scores, symbols=symbols, padding=-size % multiple_of
        )
        production = tokenizer.production([*order, *symbols])
        if not production.missing:
            break
        if on_unreachable != "drop" or not set(production.missing) <= set(order):
            _refuse_unreachable(tokenizer, production.missing, on_unreachable)
        dropped += production.missing
        missing = set(production.missing)
        order = [piece for piece in order if piece not in missing]
    asked = set(wanted)
    extra = [piece for piece in order if piece not in asked]
    return Extension(
        tokenizer,
        pieces=order,
        characters=[piece for piece in extra if _is_character(source, piece)],
        repaired=[piece for piece in extra if not _is_character(source, piece)],
        dropped=dropped,
        padding=-size % multiple_of,
        between=production.between,
    )


def _repaired(
    source: ExtensibleTokenizer, wanted: list[str], scores: Mapping[str, float] | None
) -> list[str]:
    """``wanted`` with its characters before it and every missing step before its piece."""
    old = source.pieces()
    known = set(old)
    letters = [c for c in _characters(source, wanted) if c not in known]
    singles = set(letters)
    order = [*letters, *(piece for piece in wanted if piece not in singles)]
    # Below the old scores nothing can come between an old piece and its merges; among them it can.
    protected = _whole(source, old) if scores else []
    known.update(order)
    with tqdm(desc="checking that every piece can be produced", unit=" round", delay=1) as progress:
        while True:
            cut = _cut(source.extended(order, scores=scores), [*order, *protected])
            # Characters first: steps for a piece whose characters are cut would cross them.
            letter_cut = {piece: parts for piece, parts in cut.items() if piece in singles}
            steps = _missing_steps(letter_cut, known) or _missing_steps(cut, known)
            progress.update()
            if not steps:
                return order
            late = [step for piece in protected for step in steps.get(piece, ())]
            order = [item for piece in order for item in (*steps.get(piece, ()), piece)] + late


def _is_character(source: ExtensibleTokenizer, piece: str) -> bool:
    """Whether a piece is one whole character, not a part of one."""
    text = source.text(piece)
    return len(text) == 1 and source.spell(text) == piece


def _characters(source: ExtensibleTokenizer, pieces: Sequence[str]) -> list[str]:
    """The single characters of ``pieces`` in the source's spelling, each once."""
    texts = "".join(dict.fromkeys("".join(map(source.text, pieces))))
    return [source.spell(character) for character in texts.replace(" ", SPACE)]


def _whole(source: ExtensibleTokenizer, pieces: list[str]) -> list[str]:
    cut = _cut(source, pieces)
    return [piece for piece in pieces if piece not in cut]


def _cut(tokenizer: ExtensibleTokenizer, pieces: Sequence[str]) -> dict[str, list[str]]:
    """Of ``pieces``, those that merging leaves in several parts: piece -> its parts."""
    pairs = zip(pieces, tokenizer.segment(pieces), strict=True)
    return {piece: parts for piece, parts in pairs if parts != [piece]}


def _missing_steps(cut: dict[str, list[str]], known: set[str]) -> dict[str, list[str]]:
    """For each cut piece the new prefixes p1 p2, p1 p2 p3, ... that lead from its parts to it."""
    steps: dict[str, list[str]] = {}
    for piece, parts in cut.items():
        prefixes = ["".join(parts[:count]) for count in range(2, len(parts))]
        new = [prefix for prefix in prefixes if prefix not in known and piece.startswith(prefix)]
        if new:
            steps[piece] = new
            known.update(new)
    return steps


def _refuse_unreachable(
    tokenizer: ExtensibleTokenizer, pieces: list[str], on_unreachable: str
) -> None:
    some = ", ".join(repr(tokenizer.text(piece)) for piece in pieces[:5])
    remedy = "add their characters and steps to the list, or give --on_unreachable "
    if on_unreachable == "repair":
        remedy = "no repair helps; remove them from the list, or give --on_unreachable drop"
    else:
        remedy += "repair or drop"
    raise DataError(
        f"{len(pieces)} pieces cannot be produced by this tokenizer, among them {some}; {remedy}"
    )
