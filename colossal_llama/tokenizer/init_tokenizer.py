"""Extends a tokenizer with new pieces.

    python colossal_llama/tokenizer/init_tokenizer.py --source_tokenizer_dir llama2 \
        --target_tokenizer_dir llama2-zh --expand_tokens_file pieces.jsonl

Old ids do not move, text without new characters is segmented as before, every new piece can be
produced, and the slow and the fast tokenizer give the same ids.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option, run
from colossal_llama.storage import refuse_existing

# Llama 2 has 32,000 ids; who pads by more has mistyped.
_LARGEST_MULTIPLE = 65536


@dataclass
class InitTokenizerOptions:
    """Extend a BPE tokenizer with new pieces: SentencePiece (Llama 2, Mistral, InternLM) or
    byte-level (Llama 3, Qwen, SmolLM2)."""

    source_tokenizer_dir: Path = option(help="directory of the tokenizer to extend")
    target_tokenizer_dir: Path = option(help="directory to write the extended tokenizer to")
    expand_tokens_file: Path | None = option(
        None,
        help='JSONL of {"piece": "你好"}, most important first; "▁" spells a space; with '
        '"type": "user_defined" a symbol that is never cut and never merged',
    )
    required_chars: list[str] = option(
        [],
        help="comma-separated: level1, level2, level3 of the Table of General Standard Chinese "
        "Characters, or text files; characters in them that are no pieces yet are added",
        comma=True,
    )
    on_unreachable: str = option(
        "repair",
        help="what to do about a piece whose characters or steps are missing: add them, drop the "
        "piece, or end with an error",
        choices=("repair", "drop", "error"),
    )
    calibrate_from: Path | None = option(
        None,
        help="SentencePiece model, or directory of one, whose scores say where its pieces stand "
        "among the old ones; without it new pieces are merged after all old ones",
    )
    calibration: str = option(
        "mean",
        help="which ratio of the scores of common pieces puts the other model's on our scale",
        choices=("mean", "min", "max"),
    )
    pad_vocab_to_multiple_of: int = option(
        1, help="add ids that stand for nothing until their number is a multiple of this"
    )
    sample_file: Path | None = option(
        None,
        help=".jsonl or .txt file (or .gz of one) to compare old and new tokenizer on",
    )
    overwrite: bool = option(False, help="replace target_tokenizer_dir if it exists")

    def problems(self) -> list[str]:
        found = []
        if self.source_tokenizer_dir.resolve() == self.target_tokenizer_dir.resolve():
            found.append("--target_tokenizer_dir must not be --source_tokenizer_dir")
        if self.expand_tokens_file is None and not self.required_chars:
            found.append("nothing to add: give --expand_tokens_file or --required_chars, or both")
        if self.calibrate_from is None and self.calibration != "mean":
            found.append("--calibration says which ratio of --calibrate_from, which is missing")
        if not 1 <= self.pad_vocab_to_multiple_of <= _LARGEST_MULTIPLE:
            found.append(f"--pad_vocab_to_multiple_of must be from 1 to {_LARGEST_MULTIPLE}")
        return found


def init_tokenizer(options: InitTokenizerOptions) -> None:
    """Writes the extended tokenizer and ``extension_report.json`` beside it.

    Raises:
        DataError: the source is of a kind that cannot be extended, or the list of pieces cannot
            be added to it.
    """
    from colossal_llama.tokenizer import calibration, extension, extension_report, piece_list
    from colossal_llama.tokenizer.charsets import required_characters
    from colossal_llama.tokenizer.corpus import documents, text_files
    from colossal_llama.tokenizer.directory import read_tokenizer

    refuse_existing(options.target_tokenizer_dir, overwrite=options.overwrite)
    samples = text_files([options.sample_file]) if options.sample_file else []
    source = read_tokenizer(options.source_tokenizer_dir)
    scores = None
    if options.calibrate_from is not None:
        scores = calibration.calibrate(source, options.calibrate_from, options.calibration)
    wanted = piece_list.read_pieces(options.expand_tokens_file, source)
    characters = required_characters(options.required_chars)
    asked_for = {*wanted.pieces, *wanted.symbols}
    required = [c for c in piece_list.new_characters(characters, source) if c not in asked_for]
    extended = extension.extend(
        source,
        [*wanted.pieces, *required],
        scores=scores.scores if scores else None,
        symbols=wanted.symbols,
        multiple_of=options.pad_vocab_to_multiple_of,
        on_unreachable=options.on_unreachable,
    )
    report = extension_report.describe(source, extended)
    report |= {
        "pieces_asked_for": wanted.asked_for,
        "pieces_added": len(asked_for.intersection(extended.pieces)),
        "pieces_already_there": wanted.already_there,
        "pieces_duplicate": wanted.duplicates,
        "required_characters_added": [source.text(piece) for piece in required],
    }
    if scores:
        report["calibration"] = {
            "from": str(options.calibrate_from),
            "ratio": scores.ratio,
            "ratio_is_the": options.calibration,
            "pieces_known_to_both": scores.known,
            "new_pieces_with_its_scores": len(scores.scores.keys() & set(extended.pieces)),
        }
    if samples:
        texts = (text for path in samples for text in documents(path))
        report["sample"] = extension_report.compare(source, extended, texts)
    extension_report.write(
        extended, report, options.target_tokenizer_dir, overwrite=options.overwrite
    )
    print(extension_report.summary(options.target_tokenizer_dir, report))


if __name__ == "__main__":
    sys.exit(run(InitTokenizerOptions, init_tokenizer))
