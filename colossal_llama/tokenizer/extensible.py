"""What ``extension.extend`` needs of a tokenizer, whichever kind of BPE it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from colossal_llama.tokenizer.neighbours import Production


class ExtensibleTokenizer(Protocol):
    """A BPE tokenizer as its files say it; immutable.

    Pieces are given in the vocabulary's own spelling: in SentencePiece "▁" for a space, in
    byte-level BPE a visible character for each byte.
    """

    @property
    def path(self) -> Path:
        """The directory it was read from."""

    @property
    def fast(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""

    @property
    def size(self) -> int:
        """The number of ids, added tokens included; the next piece gets this id."""

    def spell(self, text: str) -> str:
        """A piece of a user's list, in which "▁" stands for a space, in the own spelling."""

    def text(self, piece: str) -> str:
        """The text that a piece stands for: spaces as spaces; U+FFFD for a cut character."""

    def pieces(self) -> list[str]:
        """By id, the pieces that merging can use or produce: no special or unused tokens, and
        no SentencePiece byte tokens."""

    def reserved(self) -> set[str]:
        """Texts of tokens that are matched before merging, or never: nothing can contain them."""

    def symbols(self) -> set[str]:
        """Texts of the user-defined symbols among the reserved ones."""

    def touched_characters(self, pieces: Sequence[str]) -> set[str]:
        """Characters of which a text holds one if adding ``pieces`` can change its ids."""

    def problem_of(self, text: str) -> str | None:
        """Why no piece with this text can be added ("holds ...", "is ..."), or None."""

    def extended(
        self,
        pieces: Sequence[str],
        *,
        scores: Mapping[str, float] | None = None,
        symbols: Sequence[str] = (),
        padding: int = 0,
    ) -> Self:
        """With ``pieces``, then user-defined ``symbols``, then ``padding`` ids that no text has.

        Merges into old pieces stay first and in their order; new ones follow in the order given,
        except that pieces with one of ``scores`` (SentencePiece only) get that score.
        """

    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        """What merging alone makes of each piece: no prefix, no pre-tokenizer, no whole-word
        look-up."""

    def production(self, pieces: Sequence[str]) -> Production:
        """Which of ``pieces`` the written files produce: as exactly one id alone, and between
        neutral neighbours in running text, in every half of the tokenizer."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, as a user gets them, without bos and eos."""

    def disagreements(self, texts: Sequence[str]) -> list[str]:
        """Of ``texts``, those that the halves of the tokenizer give different ids."""

    def write(self, target: Path, *, settings_from: Path | None) -> None:
        """Writes all files of the tokenizer into ``target``."""
