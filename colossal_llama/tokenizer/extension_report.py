"""What an extension did and what holds for it: ``extension_report.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_directory, write_json
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.extension import Extension
from colossal_llama.tokenizer.fast_tokenizer import load
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint

_BATCH = 100  # documents
_CUT = "\ufffd"  # how a part of a character is read
REPORT = "extension_report.json"


def describe(source: ExtensibleTokenizer, extended: Extension) -> dict[str, Any]:
    """The report's part that needs no text."""
    text = extended.tokenizer.text

    def shown(piece: str) -> str:
        """A step of byte-level BPE that is only a part of a character in its own spelling."""
        return piece if _CUT in text(piece) else text(piece)

    return {
        "size_before": source.size,
        "size_after": extended.tokenizer.size,
        "pieces_added": len(extended.pieces) - len(extended.characters) - len(extended.repaired),
        "symbols_added": sorted(map(text, extended.tokenizer.symbols() - source.symbols())),
        "characters_added": list(map(text, extended.characters)),
        "pieces_repaired": list(map(shown, extended.repaired)),
        "pieces_dropped": list(map(text, extended.dropped)),
        "padding": extended.padding,
        # Anything else has ended the command by now.
        "pieces_unreachable": 0,
        "pieces_produced_between": extended.between,
        "old_ids_moved": _moved(source, extended),
    }


def _moved(source: ExtensibleTokenizer, extended: Extension) -> int:
    """The number of old pieces with another id than before."""
    old, new = (t.fast["model"]["vocab"] for t in (source, extended.tokenizer))
    moved = sum(new.get(piece) != key for piece, key in old.items())
    assert not moved, "an old id has moved"
    return moved


@dataclass
class _Comparison:
    """Counts over the documents of a sample."""

    documents: int = 0
    bytes: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    documents_without_new_characters: int = 0
    documents_that_came_back_before: int = 0


def compare(
    source: ExtensibleTokenizer, extended: Extension, texts: Iterable[str]
) -> dict[str, Any]:
    """Checks the guarantees on ``texts`` and measures the compression.

    Raises:
        DataError: there is no text, or a guarantee does not hold for one.
    """
    counts = _Comparison()
    old, new = load(source.fast), load(extended.tokenizer.fast)
    symbols = extended.tokenizer.symbols() - source.symbols()
    characters = source.touched_characters([*extended.pieces, *symbols])
    with tqdm(desc="comparing on the sample", unit=" documents", delay=1) as progress:
        documents = iter(texts)
        while batch := list(islice(documents, _BATCH)):
            differing = extended.tokenizer.disagreements(batch)
            if differing:
                _fail("the slow and the fast tokenizer give different ids", differing[0])
            before = old.encode_batch(batch, add_special_tokens=False)
            after = new.encode_batch(batch, add_special_tokens=False)
            for text, one, other in zip(batch, before, after, strict=True):
                counts.documents += 1
                counts.bytes += len(text.encode("utf-8"))
                counts.tokens_before += len(one.ids)
                counts.tokens_after += len(other.ids)
                if characters.isdisjoint(text):
                    counts.documents_without_new_characters += 1
                    if one.ids != other.ids:
                        _fail("a text without new characters got other ids", text)
                if old.decode(one.ids, skip_special_tokens=False) == text:
                    counts.documents_that_came_back_before += 1
                    if new.decode(other.ids, skip_special_tokens=False) != text:
                        _fail("a text no longer survives the round trip", text)
            progress.update(len(batch))
    if not counts.tokens_after:
        raise DataError("--sample_file holds no text")
    return {
        **{field.name: getattr(counts, field.name) for field in fields(counts)},
        "bytes_per_token_before": counts.bytes / counts.tokens_before,
        "bytes_per_token_after": counts.bytes / counts.tokens_after,
        "documents_with_other_ids_in_slow_and_fast": 0,
        "documents_without_new_characters_that_changed": 0,
        "documents_that_do_not_come_back_any_more": 0,
    }


def _fail(what: str, text: str) -> None:
    shown = text if len(text) <= 60 else text[:60] + "..."
    raise DataError(
        f"on the sample {what}: {shown!r}; the source tokenizer cannot be extended faithfully: "
        "is its tokenizer.json the one it was published with?"
    )


def write(
    extended: Extension, report: dict[str, Any], target: Path, *, overwrite: bool = False
) -> None:
    """Writes the tokenizer, its settings and the report to the directory ``target``."""
    with atomic_directory(target, overwrite=overwrite) as temporary:
        write_into(extended, report, temporary)


def write_into(extended: Extension, report: dict[str, Any], target: Path) -> None:
    """Writes the tokenizer, its settings and the report into ``target``, which exists."""
    source = extended.tokenizer.path
    extended.tokenizer.write(target, settings_from=source)
    write_json(target / REPORT, {**report, "fingerprint": tokenizer_fingerprint(target)})


def write_pieces(target: Path, texts: Iterable[str]) -> None:
    """Writes ``pieces.jsonl``, a list for ``init_tokenizer.py --expand_tokens_file``."""
    lines = (json.dumps({"piece": text}, ensure_ascii=False) + "\n" for text in texts)
    (target / "pieces.jsonl").write_text("".join(lines), encoding="utf-8")


def summary(target: Path, report: dict[str, Any]) -> str:
    """The report for the terminal."""
    extra = [
        f"{len(report['characters_added'])} characters and {len(report['pieces_repaired'])} "
        "missing steps besides"
    ]
    for key, what in (("symbols_added", "user-defined symbols"), ("pieces_dropped", "dropped")):
        if report[key]:
            extra.append(f"{len(report[key])} {what}")
    if required := report.get("required_characters_added"):
        extra.append(f"{len(required)} required characters")
    if report["padding"]:
        extra.append(f"{report['padding']} ids of padding")
    lines = [
        f"{target}: {report['size_before']} -> {report['size_after']} ids: "
        f"{report['pieces_added']} pieces" + _asked_for(report),
        "  " + ", ".join(extra) + "; every piece can be produced",
    ]
    if sample := report.get("sample"):
        lines.append(
            f"  bytes per token on the sample: {sample['bytes_per_token_before']:.2f} -> "
            f"{sample['bytes_per_token_after']:.2f}"
        )
    return "\n".join(lines)


def _asked_for(report: dict[str, Any]) -> str:
    if "pieces_asked_for" not in report:
        return ""
    return (
        f" of {report['pieces_asked_for']} asked for ({report['pieces_already_there']} were there, "
        f"{report['pieces_duplicate']} twice)"
    )
