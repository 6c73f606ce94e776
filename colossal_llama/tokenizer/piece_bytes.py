"""How many bytes of a text every token id stands for: what bits per byte are counted over.

Prepared rows have ids and no text. A piece of SentencePiece spells a space as "▁" and a byte as
``<0xE4>``, a byte-level piece spells bytes as characters; added tokens are their own text, and
special ones (bos, eos, the marks of a chat) are none at all.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama.tokenizer.byte_level import byte_alphabet
from colossal_llama.tokenizer.sentencepiece_model import SPACE

if TYPE_CHECKING:
    import numpy as np

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")

# Before which texts a tokenizer puts a space that is not in them: before every stretch between
# two added tokens, before what it is given only, before none.
EVERY, FIRST, NONE = "every", "first", "none"


@dataclass(frozen=True)
class PieceBytes:
    """The bytes of every token id.

    Args:
        sizes: bytes in UTF-8, int32 [ids]; 0 for special tokens, for an unknown piece (nobody
            knows what it stands for), and for ids that no piece has.
        is_text: whether text can become the id, bool [ids]; the unknown piece is text.
        is_added: whether it is matched before the tokenizer sees the text, bool [ids].
        spaced: whether it begins with a space, bool [ids].
        prefix: EVERY, FIRST or NONE: where a space comes first that the text does not have.
    """

    sizes: np.ndarray
    is_text: np.ndarray
    is_added: np.ndarray
    spaced: np.ndarray
    prefix: str


def piece_bytes(fast: Mapping[str, Any]) -> PieceBytes:
    """The bytes of every id of a tokenizer.

    Args:
        fast: the content of a ``tokenizer.json`` as it is used, all added tokens included.
    """
    import numpy as np

    added = {int(token["id"]): token for token in fast.get("added_tokens") or []}
    spelled = _spelled(fast)
    special = {key for key, token in added.items() if token.get("special")}
    unknown = _unknown_id(fast)
    silent = special | {unknown}
    count = max(spelled, default=-1) + 1
    found = PieceBytes(
        sizes=np.zeros(count, dtype=np.int32),
        is_text=np.zeros(count, dtype=np.bool_),
        is_added=np.zeros(count, dtype=np.bool_),
        spaced=np.zeros(count, dtype=np.bool_),
        prefix=_prefix(fast),
    )
    for key, data in spelled.items():
        found.is_text[key] = key not in special or key == unknown
        found.sizes[key] = 0 if key in silent else len(data)
        found.spaced[key] = key not in silent and data.startswith(b" ")
    found.is_added[list(added)] = True
    return found


def _spelled(fast: Mapping[str, Any]) -> dict[int, bytes]:
    """Id -> what its piece spells, special tokens as if they were text."""
    model = fast["model"]
    steps = [fast.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    described = json.dumps(steps, ensure_ascii=False)
    alphabet = byte_alphabet() if "ByteLevel" in described else {}
    space = SPACE if SPACE in described else " "

    def spell(piece: str) -> bytes:
        if alphabet and alphabet.keys() >= set(piece):
            return bytes(alphabet[character] for character in piece)
        if model.get("byte_fallback") and _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(space, " ").encode("utf-8")

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        found = {int(key): spell(piece) for piece, key in vocabulary.items()}
    else:  # Unigram: [[piece, log probability], ...]
        found = {key: spell(entry[0]) for key, entry in enumerate(vocabulary)}
    for token in fast.get("added_tokens") or []:
        found[int(token["id"])] = token["content"].replace(space, " ").encode("utf-8")
    return found


def _unknown_id(fast: Mapping[str, Any]) -> int | None:
    model = fast["model"]
    if isinstance(model["vocab"], list):
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def _prefix(fast: Mapping[str, Any]) -> str:
    """Where a space comes first that the text does not have.

    Metaspace and ByteLevel put none before a text that begins with one; nobody can tell from
    the ids.
    """
    for step in itertools.chain(*(_steps(fast.get(n)) for n in ("normalizer", "pre_tokenizer"))):
        if step["type"] == "Prepend":
            return EVERY
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return EVERY
        if step["type"] == "Metaspace":
            # Before tokenizers 0.15 there was no scheme, but a yes or no.
            old = "always" if step.get("add_prefix_space", True) else "never"
            return {"always": EVERY, "first": FIRST}.get(step.get("prepend_scheme", old), NONE)
    return NONE


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """The single steps of a normaliser or pre-tokenizer, in order."""
    if not isinstance(step, Mapping):
        return
    inner = step.get("normalizers") or step.get("pretokenizers")
    if inner is None:
        yield step
        return
    for one in inner:
        yield from _steps(one)
