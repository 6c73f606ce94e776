"""What learning the next merges of a tokenizer takes: time, memory, pieces.

    python benchmarks/continued_bpe.py llama2 --pieces 20000 corpus/zh corpus/en corpus/code

Reads the files named, and everything in the directories named that is UTF-8 text (also as .gz),
and learns pieces from growing parts of it, no line twice. Each row is a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="directory of the tokenizer to continue")
    parser.add_argument("text", type=Path, nargs="+", help="files, or directories of files")
    parser.add_argument("--pieces", type=int, default=20_000)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--scripts", default="", help="as for train_tokenizer.py")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.tokenizer, options.one, options.pieces, options.scripts)
        return
    print("| text | pieces | characters | seconds | CPU seconds | peak memory |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for megabytes in options.megabytes:
            path = Path(directory) / f"{megabytes}.txt"
            write_lines(lines(options.text), path, megabytes * 1_000_000)
            arguments = [str(options.tokenizer), str(path), "--one", str(path)]
            arguments += ["--pieces", str(options.pieces), "--scripts", options.scripts]
            subprocess.run([sys.executable, __file__, *arguments], check=True)


def measure(tokenizer: Path, text: Path, pieces: int, scripts: str) -> None:
    """Prints one row: the whole command, with the curve and the writing."""
    from colossal_llama import command
    from colossal_llama.tokenizer.train_tokenizer import TrainTokenizerOptions, train_tokenizer

    flags = ["--source_tokenizer_dir", tokenizer, "--data_input_dirs", text]
    flags += ["--num_new_pieces", pieces, "--max_training_bytes", 10**9]
    flags += ["--scripts", scripts] if scripts else []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        flags += ["--target_tokenizer_dir", Path(directory) / "out"]
        stdout, sys.stdout = sys.stdout, sys.stderr
        failed = command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, flags)))
        sys.stdout = stdout
        if failed:
            sys.exit(failed)
        report = json.loads((Path(directory) / "out" / "extension_report.json").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    learned = report["learned"]
    print(
        f"| {text.stat().st_size / 1e6:.0f} MB | {report['pieces_added']:,} "
        f"({len(report['pieces_dropped'])} dropped) | {learned['characters']:,} "
        f"| {time.perf_counter() - start:.0f} | {used.ru_utime + used.ru_stime:.0f} "
        f"| {used.ru_maxrss / 1e6:.2f} GB |",
        flush=True,
    )


def lines(paths: Iterable[Path]) -> Iterator[str]:
    """The lines of all texts, one file after the other; those of JSON lines are their texts."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            try:
                data = file.read_bytes()
                text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
            except (OSError, EOFError, UnicodeDecodeError):
                continue  # not text
            if ".jsonl" in file.suffixes:
                texts = [json.loads(line) for line in text.splitlines()]
                text = "\n".join(r.get("source", "") + r.get("target", "") for r in texts)
            yield from text.splitlines()


def write_lines(texts: Iterable[str], path: Path, limit: int) -> None:
    """Writes different lines to ``path`` until there are ``limit`` bytes of them."""
    seen, size = set[int](), 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for text in texts:
            if size >= limit:
                break
            if text.isprintable() and hash(text) not in seen:
                seen.add(hash(text))
                stream.write(text + "\n")
                size += len(text.encode("utf-8")) + 1


if __name__ == "__main__":
    main()
