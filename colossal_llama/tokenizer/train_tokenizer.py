"""Learns a Llama tokenizer, or the pieces of a new language, from text.

    python colossal_llama/tokenizer/train_tokenizer.py --data_input_dirs corpus \
        --target_tokenizer_dir tokenizer --vocab_size 32000

``pieces.jsonl`` in the result is a list for ``init_tokenizer.py --expand_tokens_file``.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_directory, refuse_existing

# What splits a text into sentences: no piece may hold a control character (Llama spells line
# ends and tabs as bytes), and SentencePiece keeps U+2585 for itself.
_SENTENCE_END = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u2585]+")


@dataclass
class TrainTokenizerOptions:
    """Learn a SentencePiece BPE tokenizer with Llama's settings."""

    data_input_dirs: list[Path] = option(
        help="comma-separated files, or directories of them: .jsonl with source and target, "
        ".txt with a document per line; both also as .gz",
        comma=True,
    )
    target_tokenizer_dir: Path = option(help="directory to write the tokenizer to")
    vocab_size: int = option(32000, help="number of pieces, special and byte tokens included")
    character_coverage: float = option(
        0.9995,
        help="share of the text whose characters become pieces; the rest is spelled in bytes",
    )
    max_sentence_length: int = option(
        4192, help="longer lines are learned from in cuts of this many bytes; nothing is dropped"
    )
    scripts: list[str] = option(
        [],
        help="comma-separated Unicode scripts, e.g. Han; pieces.jsonl keeps to them and to "
        "non-ASCII punctuation, so that it cannot change how English or code is segmented",
        comma=True,
    )
    num_threads: int = option(4, help="threads; the result does not depend on it")
    overwrite: bool = option(False, help="replace target_tokenizer_dir if it exists")

    def problems(self) -> list[str]:
        found = []
        if not self.data_input_dirs:
            found.append("--data_input_dirs is empty")
        if not 0 < self.character_coverage <= 1:
            found.append("--character_coverage must be above 0 and at most 1")
        if self.max_sentence_length < 64:
            found.append("--max_sentence_length must be at least 64")
        for name in ("vocab_size", "num_threads"):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be positive")
        found += [
            f"--scripts: {script} is not a Unicode script; use names like Han, Hangul, Cyrillic"
            for script in self.scripts
            if not _is_script(script)
        ]
        return found


def train_tokenizer(options: TrainTokenizerOptions) -> None:
    """Writes a Llama tokenizer directory, and ``pieces.jsonl`` in it.

    Raises:
        DataError: unreadable text, or a vocabulary size that the text cannot fill.
    """
    from colossal_llama.tokenizer import directory, fast_tokenizer
    from colossal_llama.tokenizer.corpus import text_files

    refuse_existing(options.target_tokenizer_dir, overwrite=options.overwrite)
    model = learn(text_files(options.data_input_dirs), options)
    pieces = learned_pieces(model, options.scripts)
    with atomic_directory(options.target_tokenizer_dir, overwrite=options.overwrite) as target:
        (target / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
        fast = fast_tokenizer.convert(target, model)
        directory.write_tokenizer(target, model, fast, settings_from=None)
        lines = (json.dumps({"piece": piece}, ensure_ascii=False) + "\n" for piece in pieces)
        (target / "pieces.jsonl").write_text("".join(lines), encoding="utf-8")
    print(
        f"{options.target_tokenizer_dir}: a tokenizer of {len(model.pieces)} pieces, "
        f"{len(pieces)} of them in pieces.jsonl"
    )


def learn(files: Iterable[Path], options: TrainTokenizerOptions) -> Any:
    """The learned SentencePiece model (a ModelProto).

    Settings as in Llama's own tokenizer.model, read from its trainer_spec. The paths are left
    out, so that the same text gives the same bytes wherever it lies.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    written, failures = io.BytesIO(), list[BaseException]()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_guarded(_sentences(files, options.max_sentence_length), failures),
            model_writer=written,
            model_type="bpe",
            vocab_size=options.vocab_size,
            character_coverage=options.character_coverage,
            max_sentence_length=options.max_sentence_length,
            num_threads=options.num_threads,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise DataError(_explain(str(error), options)) from None
    if failures:
        raise failures[0]
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(written.getvalue())
    model.trainer_spec.ClearField("num_threads")
    return model


def _sentences(files: Iterable[Path], max_bytes: int) -> Iterator[str]:
    from tqdm import tqdm

    from colossal_llama.tokenizer.corpus import documents

    width = max_bytes // 4  # a character has at most four bytes
    with tqdm(desc="reading text", unit=" documents", delay=1) as progress:
        for path in files:
            for document in documents(path):
                progress.update()
                for line in _SENTENCE_END.split(document):
                    if len(line.encode("utf-8", "replace")) <= max_bytes:
                        cuts = [line] if line else []
                    else:
                        cuts = [line[at : at + width] for at in range(0, len(line), width)]
                    yield from cuts
    print(f"learning from {progress.n} documents ...", file=sys.stderr, flush=True)


def _guarded(sentences: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    """Keeps an exception for later: SentencePiece, which calls us, would lose it."""
    try:
        yield from sentences
    except BaseException as error:
        failures.append(error)


def _explain(message: str, options: TrainTokenizerOptions) -> str:
    """SentencePiece's error in terms of our flags."""
    if match := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return (
            f"--vocab_size {options.vocab_size} is more than this text can fill; "
            f"it allows at most {match[1]}"
        )
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"--vocab_size {options.vocab_size} is too small for the characters of this text; "
            f"it needs at least {match[1]}, or a lower --character_coverage"
        )
    if "sentences_.empty()" in message:
        return "the files named by --data_input_dirs hold no text"
    return f"SentencePiece could not learn from this text: {message}"


def learned_pieces(model: Any, scripts: list[str]) -> list[str]:
    """The pieces that ``init_tokenizer.py`` can add elsewhere: merged ones in the order in which
    they were learned, then single characters; with ``scripts`` only those of these scripts.
    """
    from colossal_llama.tokenizer.extension import problem_of
    from colossal_llama.tokenizer.sentencepiece_model import normal_pieces

    pieces = [piece for piece in normal_pieces(model) if problem_of(piece) is None]
    if scripts:
        allowed = _allowed(scripts)
        pieces = [piece for piece in pieces if allowed.fullmatch(piece)]
    return [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]


def _allowed(scripts: list[str]) -> Any:
    import regex

    members = "".join(rf"\p{{Script={script}}}" for script in scripts)
    shared = r"[[\p{Script=Common}\p{Script=Inherited}]&&\p{Punctuation}--[\x00-\x7f]]"
    return regex.compile(rf"(?:[{members}]|{shared})+", regex.VERSION1)


def _is_script(name: str) -> bool:
    import regex

    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        return False
    return True


if __name__ == "__main__":
    sys.exit(run(TrainTokenizerOptions, train_tokenizer))
