"""``tokenizer.json`` of a SentencePiece BPE model: pieces and merges that give the same ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.errors import DataError
from colossal_llama.tokenizer import sentencepiece_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def convert(directory: Path, model: Any) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` for a directory that has only ``tokenizer.model``.

    transformers builds the frame (normaliser, special tokens, decoder); the merges are ours.

    Raises:
        DataError: transformers cannot read the directory.
    """
    from transformers import LlamaTokenizerFast

    try:
        # With legacy=False transformers would build a prefix that is left out where a text starts
        # with a space, which neither SentencePiece nor the slow tokenizer does. Llama 2's own
        # tokenizer.json is built the legacy way too, whatever its configuration says.
        loaded = LlamaTokenizerFast.from_pretrained(
            str(directory), local_files_only=True, from_slow=True, legacy=True
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{directory}: transformers cannot load this tokenizer: {reason}") from None
    fast = json.loads(loaded.backend_tokenizer.to_str())
    if not model.normalizer_spec.add_dummy_prefix:
        _drop_dummy_prefix(fast)
    return with_pieces_of(fast, model)


def _drop_dummy_prefix(fast: dict[str, Any]) -> None:
    """transformers adds the prefix by its own default, whatever the SentencePiece model says."""
    if fast["normalizer"]:
        steps = fast["normalizer"]["normalizers"]
        fast["normalizer"]["normalizers"] = [step for step in steps if step["type"] != "Prepend"]
    if fast["pre_tokenizer"]:
        fast["pre_tokenizer"]["prepend_scheme"] = "never"
    steps = fast["decoder"]["decoders"]
    fast["decoder"]["decoders"] = [step for step in steps if step["type"] != "Strip"]


def with_pieces_of(fast: dict[str, Any], model: Any) -> dict[str, Any]:
    """``fast`` with vocabulary and merges of the SentencePiece ``model``, all else unchanged.

    SentencePiece merges any two neighbours whose concatenation is a piece, best score first.
    Said as a merge list: every split of a piece into two pieces, by falling score of the whole.
    """
    vocabulary = {piece: key for key, piece in enumerate(_names(fast, model))}
    merges = fast["model"].get("merges") or []
    texts = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    old = {merge: rank for rank, merge in enumerate(texts)}
    changed = {**fast["model"], "vocab": vocabulary, "merges": _merges(model, old)}
    return _with_symbols({**fast, "model": changed}, model)


def _with_symbols(fast: dict[str, Any], model: Any) -> dict[str, Any]:
    """``fast`` with the user-defined symbols of ``model`` as SentencePiece treats them.

    SentencePiece cuts them out after normalising, so that the dummy prefix comes once, at the
    start of the text. As added tokens, which is how transformers converts them, they would cut
    before, and every part between two symbols would get a prefix. So a pre-tokenizer isolates
    them, and ``ignore_merges`` looks each of them up whole.

    That look-up would also find names that only stand for something (``<0x0A>``) where the part
    between two symbols is just such a name: a second pre-tokenizer cuts these as merging does.
    """
    symbols = {e.piece for e in model.pieces if e.type == sentencepiece_model.USER_DEFINED}
    if not symbols:
        return fast
    steps = [_isolate(_any_of(symbols))]
    if names := _cuts_of_unreachable(model, symbols):
        steps.append(_isolate("|".join(names)))
    before = fast["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    others = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    steps = [step for step in others if step["type"] != "Split"] + steps
    return {
        **fast,
        "added_tokens": [t for t in fast["added_tokens"] if t["content"] not in symbols],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {**fast["model"], "ignore_merges": True},
    }


def _isolate(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _any_of(texts: Iterable[str]) -> str:
    """An expression for any of ``texts``; where several fit, the longest, as SentencePiece."""
    return "|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text))))


def _cuts_of_unreachable(model: Any, symbols: set[str]) -> list[str]:
    """For every piece that its own text does not give: an expression for the start of it."""
    special = re.compile(_any_of(symbols))
    names = [e.piece for e in model.pieces if e.piece and not special.search(e.piece)]
    parts = sentencepiece_model.processor(model, dummy_prefix=False).encode(names, out_type=str)
    return [
        f"^{re.escape(first)}(?={re.escape(''.join(rest))}$)"
        for name, (first, *rest) in zip(names, parts, strict=True)
        if rest and "".join([first, *rest]) == name
    ]


def _names(fast: dict[str, Any], model: Any) -> list[str]:
    """Pieces by id; where the fast tokenizer has a name for an id (special tokens), that one."""
    names = [str(entry.piece) for entry in model.pieces]
    for name, key in fast["model"]["vocab"].items():
        if key < len(names):
            names[key] = name
    if "\0" in names and "\0" not in sentencepiece_model.normal_pieces(model):
        key = names.index("\0")
        names[key] = f"<|unused_{key}|>"  # so that NUL is spelled as a byte here too
    return names


def _merges(model: Any, old_ranks: dict[str, int]) -> list[str]:
    """Merges as "left right", first to be done first.

    Where scores tie, the old list's order stands, so that what was segmented one way stays so;
    new ties are broken as transformers does, longer left half first, which on runs of spaces is
    SentencePiece's leftmost-first.
    """
    pieces = sentencepiece_model.normal_pieces(model)
    ranked = []
    for piece, key in pieces.items():
        score = model.pieces[key].score
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merge = f"{left} {right}"
                rank = old_ranks.get(merge, len(old_ranks))
                ranked.append((-score, rank, -cut, key, merge))
    return [merge for *_, merge in sorted(ranked)]


def load(fast: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``fast`` describes; the name of a special token in a text is text.

    SentencePiece reads ``<s>`` in a text letter by letter too. (transformers takes it for the
    control token, slow and fast with different ids around it, unless it is told
    ``split_special_tokens=True``.)
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(fast, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_bare(fast: dict[str, Any]) -> Tokenizer:
    """Only the merging of ``fast``: no prefix, no look-up of whole words, no special tokens, and
    text in the pieces' own spelling.
    """
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    model = {**fast["model"], "ignore_merges": False}
    return load({**fast, **bare, "model": model, "added_tokens": []})


def without_prefix(fast: dict[str, Any]) -> dict[str, Any]:
    """``fast`` for text in the middle of a line: nothing is put before it."""
    steps = ("normalizer", "pre_tokenizer")
    return {**fast, **{name: _drop_prefix(fast.get(name)) for name in steps}}


def _drop_prefix(step: Any) -> Any:
    """A normaliser or pre-tokenizer without what puts a space before the text."""
    if not isinstance(step, dict) or step.get("type") == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never", "add_prefix_space": False}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            kept = [_drop_prefix(inner) for inner in step[name]]
            return {**step, name: [inner for inner in kept if inner is not None]}
    return step
