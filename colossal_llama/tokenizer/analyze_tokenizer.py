"""Compares tokenizers: compression, coverage of Chinese characters, pieces that cannot be used.

    python colossal_llama/tokenizer/analyze_tokenizer.py --tokenizer_dirs llama2,llama2-zh \
        --data_input_dirs corpus/zh,corpus/en --output_dir analysis

The tables are printed; ``--output_dir`` gets them as CSV, JSON and a page for the browser.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option, run
from colossal_llama.storage import atomic_directory, refuse_existing


@dataclass
class AnalyzeTokenizerOptions:
    """Compare tokenizers on text: any directory with tokenizer.model or tokenizer.json."""

    tokenizer_dirs: list[Path] = option(
        help="comma-separated tokenizer directories, of any kind", comma=True
    )
    data_input_dirs: list[Path] = option(
        help="comma-separated files, or directories of them: .jsonl with source and target, "
        ".txt with a document per line; both also as .gz",
        comma=True,
    )
    output_dir: Path | None = option(
        None, help="directory for analysis.csv, analysis.json and analysis.html"
    )
    sentence: str = option(
        "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
        help="text to show split by each tokenizer",
    )
    baseline: Path | None = option(
        None,
        help="tokenizer directory that compression is compared with; the first of tokenizer_dirs "
        "unless given",
    )
    overwrite: bool = option(False, help="replace output_dir if it exists")

    def problems(self) -> list[str]:
        found = [
            f"--{name} is empty"
            for name in ("tokenizer_dirs", "data_input_dirs", "sentence")
            if not getattr(self, name)
        ]
        seen: set[Path] = set()
        for directory in self.tokenizer_dirs:
            if directory.resolve() in seen:
                found.append(f"--tokenizer_dirs: {directory} is given twice")
            seen.add(directory.resolve())
        try:
            self.sentence.encode("utf-8")
        except UnicodeEncodeError:
            found.append("--sentence is not UTF-8 text")
        return found


def analyze_tokenizer(options: AnalyzeTokenizerOptions) -> None:
    """Prints the comparison and writes it into ``output_dir`` where one is given.

    Raises:
        DataError: a tokenizer or a text that cannot be read.
    """
    from colossal_llama.tokenizer import analysis_files, analysis_tables
    from colossal_llama.tokenizer.analysis import analyze
    from colossal_llama.tokenizer.corpus import text_files

    if options.output_dir:
        refuse_existing(options.output_dir, overwrite=options.overwrite)
    directories = list(options.tokenizer_dirs)
    baseline = options.baseline or directories[0]
    if baseline.resolve() not in [directory.resolve() for directory in directories]:
        directories.insert(0, baseline)
    files = text_files(options.data_input_dirs)
    result = analyze(directories, baseline, files, options.sentence)
    analysis_tables.show(result)
    if options.output_dir:
        with atomic_directory(options.output_dir, overwrite=options.overwrite) as target:
            analysis_files.write(result, target)
        print(f"{options.output_dir}: analysis.html, analysis.csv and analysis.json written")


if __name__ == "__main__":
    sys.exit(run(AnalyzeTokenizerOptions, analyze_tokenizer))
