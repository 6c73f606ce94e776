"""Extends a tokenizer with new pieces.

    python colossal_llama/tokenizer/init_tokenizer.py --source_tokenizer_dir llama2 \
        --target_tokenizer_dir llama2-zh --expand_tokens_file pieces.jsonl

Old ids do not move, text without new characters is segmented as before, every new piece can be
produced, and the slow and the fast tokenizer give the same ids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_directory, refuse_existing, write_json


@dataclass
class InitTokenizerOptions:
    """Extend a SentencePiece BPE tokenizer (Llama 2, Mistral, InternLM) with new pieces."""

    source_tokenizer_dir: Path = option(help="directory of the tokenizer to extend")
    target_tokenizer_dir: Path = option(help="directory to write the extended tokenizer to")
    expand_tokens_file: Path = option(
        help='JSONL of {"piece": "你好"}, most important first; "▁" spells a space'
    )
    sample_file: Path | None = option(
        None,
        help=".jsonl or .txt file (or .gz of one) to report the compression on, before and after",
    )
    overwrite: bool = option(False, help="replace target_tokenizer_dir if it exists")

    def problems(self) -> list[str]:
        if self.source_tokenizer_dir.resolve() == self.target_tokenizer_dir.resolve():
            return ["--target_tokenizer_dir must not be --source_tokenizer_dir"]
        return []


def init_tokenizer(options: InitTokenizerOptions) -> None:
    """Writes the extended tokenizer and ``extension_report.json`` beside it.

    Raises:
        DataError: the source is no SentencePiece BPE tokenizer, or the list of pieces cannot be
            added to it.
    """
    from colossal_llama.tokenizer import directory, extension
    from colossal_llama.tokenizer.corpus import documents, text_files

    refuse_existing(options.target_tokenizer_dir, overwrite=options.overwrite)
    samples = text_files([options.sample_file]) if options.sample_file else []
    source = directory.read_tokenizer(options.source_tokenizer_dir)
    wanted = extension.read_pieces(options.expand_tokens_file, source)
    extended = extension.extend(source, wanted.pieces)
    report: dict[str, Any] = {
        "pieces_asked_for": wanted.asked_for,
        "pieces_added": len(wanted.pieces),
        "pieces_already_there": wanted.already_there,
        "pieces_duplicate": wanted.duplicates,
        "characters_added": extended.characters,
        "pieces_repaired": extended.repaired,
        "pieces_unreachable": 0,  # anything else has ended the command by now
        "size_before": source.size,
        "size_after": len(extended.model.pieces),
    }
    if samples:
        texts = [text for path in samples for text in documents(path)]
        report["bytes_per_token_before"] = bytes_per_token(source.fast, texts)
        report["bytes_per_token_after"] = bytes_per_token(extended.fast, texts)
    with atomic_directory(options.target_tokenizer_dir, overwrite=options.overwrite) as target:
        directory.write_tokenizer(
            target, extended.model, extended.fast, settings_from=options.source_tokenizer_dir
        )
        write_json(target / "extension_report.json", report)
    print(_summary(options.target_tokenizer_dir, report))


def bytes_per_token(fast: dict[str, Any], texts: Sequence[str]) -> float:
    """UTF-8 bytes per token over ``texts``, special tokens not counted; higher is better.

    Raises:
        DataError: there is no text.
    """
    from colossal_llama.tokenizer.fast_tokenizer import load

    encodings = load(fast).encode_batch(list(texts), add_special_tokens=False)
    tokens = sum(len(encoding) for encoding in encodings)
    if not tokens:
        raise DataError("--sample_file holds no text")
    return sum(len(text.encode("utf-8")) for text in texts) / tokens


def _summary(target: Path, report: dict[str, Any]) -> str:
    before, after = report["size_before"], report["size_after"]
    lines = [
        f"{target}: {before} -> {after} pieces: {report['pieces_added']} of "
        f"{report['pieces_asked_for']} asked for ({report['pieces_already_there']} were there, "
        f"{report['pieces_duplicate']} twice), {len(report['characters_added'])} characters and "
        f"{len(report['pieces_repaired'])} missing steps besides; all can be produced"
    ]
    if "bytes_per_token_after" in report:
        lines.append(
            f"bytes per token: {report['bytes_per_token_before']:.2f} -> "
            f"{report['bytes_per_token_after']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(InitTokenizerOptions, init_tokenizer))
