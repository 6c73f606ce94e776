"""Learns a Llama tokenizer, or the pieces that another one should get, from text.

    python colossal_llama/tokenizer/train_tokenizer.py --data_input_dirs corpus \
        --target_tokenizer_dir tokenizer --vocab_size 32000
    python colossal_llama/tokenizer/train_tokenizer.py --data_input_dirs corpus \
        --target_tokenizer_dir llama2-zh --source_tokenizer_dir llama2 --num_new_pieces 20000
    python colossal_llama/tokenizer/train_tokenizer.py --merge_tokenizer_dir internlm \
        --target_tokenizer_dir llama2-zh --source_tokenizer_dir llama2 --scripts Han

From scratch; the next merges on top of a tokenizer; what another tokenizer has besides. With the
result comes ``pieces.jsonl``, a list for ``init_tokenizer.py --expand_tokens_file``, and the
compression that each number of them brings.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_directory, refuse_existing
from colossal_llama.tokenizer.from_scratch import PRESETS, Settings
from colossal_llama.tokenizer.unicode_scripts import is_script, script_filter

if TYPE_CHECKING:
    from colossal_llama.tokenizer.corpus import EvenSample, Sample
    from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
    from colossal_llama.tokenizer.growth import Growth

# Flags that a mode does not read; without a source tokenizer, with one, and with two.
_NOT_FROM_SCRATCH = ("num_new_pieces", "merge_tokenizer_dir", "calibration")
_ONLY_FROM_SCRATCH = (
    *("preset", "vocab_size", "max_sentence_length", "byte_fallback", "split_digits"),
    "user_defined_symbols",
)
_NOT_MERGING = ("data_input_dirs", "character_coverage", "max_piece_length", "required_chars")

# SentencePiece's advice for scripts of many characters (--character_coverage in its help). Llama's
# own, 0.99995, makes a piece of every stray character of a small text.
_COVERAGE = 0.9995


@dataclass
class TrainTokenizerOptions:
    """Learn a Llama tokenizer from text; or, with --source_tokenizer_dir, the next pieces of one
    (SentencePiece BPE or byte-level BPE); or, with --merge_tokenizer_dir too, take them over."""

    target_tokenizer_dir: Path = option(help="directory to write the tokenizer to")
    data_input_dirs: list[Path] = option(
        [],
        help="comma-separated files, or directories of them: .jsonl with source and target, or "
        "text; .txt with a document per line; both also as .gz",
        comma=True,
    )
    source_tokenizer_dir: Path | None = option(
        None, help="tokenizer to extend; without it one is learned from scratch"
    )
    merge_tokenizer_dir: Path | None = option(
        None, help="tokenizer whose other pieces the source gets, instead of pieces from text"
    )
    num_new_pieces: int | None = option(
        None, help="how many pieces the source gets (--merge_tokenizer_dir: all that it lacks)"
    )
    preset: str | None = option(
        None,
        help="published settings of a tokenizer from scratch, which flags override; without it "
        f"llama's with a --character_coverage of {_COVERAGE}",
        choices=tuple(PRESETS),
    )
    vocab_size: int | None = option(
        None, help="number of pieces from scratch, special and byte tokens included"
    )
    character_coverage: float | None = option(
        None,
        help="share of the text whose characters become pieces; the rest is spelled in bytes "
        f"(--preset's, else {_COVERAGE})",
    )
    required_chars: list[str] = option(
        [],
        help="comma-separated: level1, level2, level3 of the Table of General Standard Chinese "
        "Characters, or text files; their characters become pieces however rare they are",
        comma=True,
    )
    user_defined_symbols: list[str] = option(
        [],
        help="comma-separated symbols, or a file with one a line, that are never cut or merged",
        comma=True,
    )
    byte_fallback: bool | None = option(
        None, help="spell characters that are no pieces in bytes; without it they become <unk>"
    )
    split_digits: bool | None = option(None, help="make every digit a piece of its own")
    max_piece_length: int | None = option(
        None, help="characters of a piece (from scratch the preset's, else 16)"
    )
    max_sentence_length: int | None = option(
        None, help="longer lines are learned from in cuts of this many bytes; nothing is dropped"
    )
    min_line_length: int = option(10, help="shorter lines are left out, in characters")
    max_line_length: int = option(4096, help="longer lines are cut, not lost, in characters")
    max_training_bytes: int = option(
        100_000_000, help="of more text an even sample of at most this size is learned from"
    )
    heldout_input_dirs: list[Path] = option(
        [],
        help="comma-separated text to measure the compression on, as --data_input_dirs; without "
        "it every hundredth document is kept aside",
        comma=True,
    )
    scripts: list[str] = option(
        [],
        help="comma-separated Unicode scripts, e.g. Han; pieces keep to them and to non-ASCII "
        "punctuation, so that they cannot change how English or code is segmented",
        comma=True,
    )
    calibration: str | None = option(
        None,
        help="merging SentencePiece tokenizers: which ratio of the scores of common pieces puts "
        "the other's scores on the source's scale (mean if not given)",
        choices=("mean", "min", "max"),
    )
    num_threads: int = option(4, help="threads from scratch; the result does not depend on it")
    overwrite: bool = option(False, help="replace target_tokenizer_dir if it exists")

    def problems(self) -> list[str]:
        found = self._problems_of_mode()
        if self.character_coverage is not None and not 0 < self.character_coverage <= 1:
            found.append("--character_coverage must be above 0 and at most 1")
        if self.max_sentence_length is not None and self.max_sentence_length < 64:
            found.append("--max_sentence_length must be at least 64")
        if self.max_line_length < self.min_line_length:
            found.append("--max_line_length must be at least --min_line_length")
        for name in (
            *("vocab_size", "num_new_pieces", "num_threads", "max_piece_length"),
            *("min_line_length", "max_training_bytes"),
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                found.append(f"--{name} must be positive")
        found += [
            f"--scripts: {script} is not a Unicode script; use names like Han, Hangul, Cyrillic"
            for script in self.scripts
            if not is_script(script)
        ]
        return found

    def _problems_of_mode(self) -> list[str]:
        """What this mode needs and has not got, and what it got and does not read."""
        unread: tuple[str, ...]
        if self.source_tokenizer_dir is None:
            found = [] if self.data_input_dirs else ["--data_input_dirs is required"]
            unread, why = _NOT_FROM_SCRATCH, "needs --source_tokenizer_dir"
        elif self.merge_tokenizer_dir is None:
            found = [
                f"--{name} is required with --source_tokenizer_dir"
                for name in ("data_input_dirs", "num_new_pieces")
                if not getattr(self, name)
            ]
            unread, why = (
                (*_ONLY_FROM_SCRATCH, "calibration"),
                "is not read when a tokenizer is continued from text",
            )
        else:
            found = []
            unread, why = (
                (*_ONLY_FROM_SCRATCH, *_NOT_MERGING),
                "is not read with --merge_tokenizer_dir",
            )
        places = [self.source_tokenizer_dir, self.merge_tokenizer_dir]
        if self.target_tokenizer_dir.resolve() in [path.resolve() for path in places if path]:
            found.append("--target_tokenizer_dir must not be one of the tokenizers read")
        given = (name for name in unread if getattr(self, name) not in (None, []))
        return found + [f"--{name} {why}" for name in given]


def train_tokenizer(options: TrainTokenizerOptions) -> None:
    """Writes a tokenizer directory with ``pieces.jsonl`` and the compression curve in it.

    Raises:
        DataError: unreadable text or tokenizers, or a vocabulary size that the text cannot fill.
    """
    from colossal_llama.tokenizer.directory import read_tokenizer
    from colossal_llama.tokenizer.growth import write_grown

    refuse_existing(options.target_tokenizer_dir, overwrite=options.overwrite)
    if options.source_tokenizer_dir is None:
        _from_scratch(options)
        return
    source = read_tokenizer(options.source_tokenizer_dir)
    if options.merge_tokenizer_dir is None:
        growth, held_out = _continued(options, source)
    else:
        growth, held_out = _merged(options, source, options.merge_tokenizer_dir)
    target, overwrite = options.target_tokenizer_dir, options.overwrite
    print(write_grown(source, growth, held_out, target, overwrite=overwrite))


def _from_scratch(options: TrainTokenizerOptions) -> None:
    from colossal_llama.tokenizer import compression, fast_tokenizer, from_scratch
    from colossal_llama.tokenizer.charsets import required_characters
    from colossal_llama.tokenizer.extension_report import write_pieces
    from colossal_llama.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

    settings = _settings(options)
    characters = required_characters(list(settings.required_chars))
    for character in characters:
        if problem := from_scratch.problem_of_character(character):
            raise DataError(f"the required character {character!r} {problem}")
    sample, held_out = _read_text(options)
    print(f"learning {settings.vocab_size} pieces ...", file=sys.stderr, flush=True)
    model = from_scratch.learn(sample.lines.texts, settings, characters, options.num_threads)
    pieces = from_scratch.learned_pieces(model, script_filter(options.scripts))
    merged = from_scratch.merged_pieces(model)
    least = len(model.pieces) - len(merged)
    with atomic_directory(options.target_tokenizer_dir, overwrite=options.overwrite) as target:
        (target / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
        fast = fast_tokenizer.convert(target, model)
        SentencePieceTokenizer(target, model, fast, {}).write(target, settings_from=None)
        write_pieces(target, pieces)
        points = compression.curve(
            lambda size: from_scratch.without_pieces(fast, merged[size - least :]),
            [least + number for number in compression.sizes(len(merged))],
            held_out,
        )
        compression.write(points, held_out, "vocabulary", target)
    print(
        f"{options.target_tokenizer_dir}: a tokenizer of {len(model.pieces)} pieces, "
        f"{len(pieces)} of them in pieces.jsonl; {sample.summary()}"
    )
    print(compression.table(points, "vocabulary"))


def _settings(options: TrainTokenizerOptions) -> Settings:
    """The preset's, overridden by the flags that were given."""
    preset = PRESETS[options.preset or "llama"].settings
    if options.preset is None:
        preset = dataclasses.replace(preset, character_coverage=_COVERAGE)
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Settings)
        if getattr(options, field.name) not in (None, [])
    }
    given["required_chars"] = tuple(options.required_chars) or preset.required_chars
    given["user_defined_symbols"] = _symbols(options) or preset.user_defined_symbols
    return dataclasses.replace(preset, **given)


def _symbols(options: TrainTokenizerOptions) -> tuple[str, ...]:
    """The user-defined symbols, from the flag or from the file that it names.

    Raises:
        DataError: one of them cannot be a piece.
    """
    from colossal_llama.storage import read_lines
    from colossal_llama.tokenizer.from_scratch import problem_of_symbol

    places = dict.fromkeys(options.user_defined_symbols, "--user_defined_symbols")
    if len(places) == 1 and (path := Path(*places)).is_file():
        lines = ((line.rstrip("\r\n"), number) for number, line in read_lines(path))
        places = {symbol: f"{path}:{number}" for symbol, number in lines}
    for symbol, where in places.items():
        if problem := problem_of_symbol(symbol):
            raise DataError(f"{where}: the symbol {symbol!r} {problem}")
    return tuple(places)


def _read_text(options: TrainTokenizerOptions) -> tuple[Sample, EvenSample]:
    """The text to learn from and the documents to measure on.

    Raises:
        DataError: there is nothing to learn from.
    """
    from colossal_llama.tokenizer.corpus import read_held_out, read_sample, text_files

    given = read_held_out(options.heldout_input_dirs) if options.heldout_input_dirs else None
    sample = read_sample(
        text_files(options.data_input_dirs),
        min_line_length=options.min_line_length,
        max_line_length=options.max_line_length,
        max_bytes=options.max_training_bytes,
        hold_out=given is None,
    )
    if not sample.lines.texts:
        lines = f"line of {options.min_line_length} characters (--min_line_length)"
        what = lines if sample.short_lines else "text"
        raise DataError(f"the files named by --data_input_dirs hold no {what}")
    return sample, sample.held_out if given is None else given


def _continued(
    options: TrainTokenizerOptions, source: ExtensibleTokenizer
) -> tuple[Growth, EvenSample]:
    from colossal_llama.tokenizer.charsets import required_characters
    from colossal_llama.tokenizer.continued_bpe import learn
    from colossal_llama.tokenizer.growth import Growth
    from colossal_llama.tokenizer.piece_list import new_characters

    assert options.num_new_pieces is not None, "problems() asks for it"
    required = new_characters(required_characters(options.required_chars), source)
    sample, held_out = _read_text(options)
    learned = learn(
        source,
        sample.lines.texts,
        options.num_new_pieces,
        scripts=script_filter(options.scripts),
        required=required,
        coverage=options.character_coverage or _COVERAGE,
        max_length=options.max_piece_length or 16,
    )
    print(sample.summary())
    if len(learned) < options.num_new_pieces:
        print(f"the text has no more than {len(learned)} new pieces that occur twice")
    texts = [text for text in map(source.text, learned) if "\ufffd" not in text]
    characters = sum(len(text) == 1 for text in texts)
    counts = {"characters": characters, "merges": len(texts) - characters}
    counts["cut_characters"] = len(learned) - len(texts)
    return Growth(learned, report={"learned": counts}), held_out


def _merged(
    options: TrainTokenizerOptions, source: ExtensibleTokenizer, directory: Path
) -> tuple[Growth, EvenSample]:
    from colossal_llama.tokenizer import other_vocabulary
    from colossal_llama.tokenizer.calibration import calibrate
    from colossal_llama.tokenizer.continued_bpe import usable_in
    from colossal_llama.tokenizer.corpus import read_held_out
    from colossal_llama.tokenizer.growth import Growth
    from colossal_llama.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

    held_out = read_held_out(options.heldout_input_dirs)
    other = other_vocabulary.read_vocabulary(directory)
    pieces, symbols = other_vocabulary.lacking(
        source, other, script_filter(options.scripts), usable_in(source)
    )
    report: dict[str, Any] = {"pieces_lacking": len(pieces)}
    scores = None
    if other.has_scores and isinstance(source, SentencePieceTokenizer):
        how = options.calibration or "mean"
        found = calibrate(source, directory, how)
        scores = found.scores
        report["calibration"] = {
            "from": str(directory),
            "ratio": found.ratio,
            "ratio_is_the": how,
            "pieces_known_to_both": found.known,
        }
    elif options.calibration is not None:
        raise DataError("--calibration: a byte-level BPE tokenizer has no scores; leave it out")
    print(f"{directory}: {len(pieces)} pieces that {source.path} lacks")
    pieces = pieces[: options.num_new_pieces]
    return Growth(pieces, symbols, scores, "repair", {"merge": report}), held_out


if __name__ == "__main__":
    sys.exit(run(TrainTokenizerOptions, train_tokenizer))
