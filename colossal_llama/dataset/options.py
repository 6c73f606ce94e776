"""What preparing any kind of dataset asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.command import option
from colossal_llama.dataset.selection import parse_mix

_MOST_BINS = 100_000  # part-00000 to part-99999
_LONGEST_ROW = 1 << 24


@dataclass
class DatasetOptions:
    """Flags of both commands that prepare a dataset."""

    data_input_dirs: list[Path] = option(
        help="directories or files of .jsonl (.gz, .zst), .parquet or .txt (.gz, .zst), "
        "separated by commas",
        comma=True,
    )
    tokenizer_dir: Path = option(help="tokenizer of the model that will be trained")
    data_arrow_output_dir: Path = option(help="where the part-* directories and manifest go")
    data_jsonl_output_dir: Path | None = option(
        None, help="also write every part as JSON lines into this directory, for reading"
    )
    data_cache_dir: Path | None = option(
        None,
        help="where temporary files go, about 4 bytes a token; without it, beside the output",
    )
    max_length: int = option(4096, help="longest row in tokens")
    num_spliced_dataset_bins: int = option(
        10, help="number of part-* directories; each holds the same share of every category"
    )
    packing: str = option(
        "best_fit",
        help="how documents share rows: best_fit (few are cut), sequential (end to end), none",
        choices=("best_fit", "sequential", "none"),
    )
    mix: list[str] = option(
        [],
        help="shares of the categories, such as zh=0.6,en=0.3,code=0.1: what there is too little "
        "of is repeated, what there is too much of is left out in part",
        comma=True,
    )
    validation_fraction: float = option(
        0.0, help="share of each category's documents that is kept apart, in validation/"
    )
    max_rejected: float = option(
        0.01, help="largest share of malformed records with which the command goes on"
    )
    num_workers: int | None = option(None, help="worker processes (default: one a core)")
    seed: int = option(42, help="seed of every shuffle")
    resume: bool = option(False, help="go on with what an interrupted run has left")
    shard: str | None = option(
        None,
        help="I/N: do share I of N of the work, with N machines on one file system; run the same "
        "command again when all have done theirs, until it says that the output is complete",
    )
    overwrite: bool = option(False, help="replace output directories that exist")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if not self.data_input_dirs:
            found.append("--data_input_dirs names nothing")
        if not 2 <= self.max_length <= _LONGEST_ROW:
            found.append(f"--max_length must be at least 2 and at most {_LONGEST_ROW:,}")
        if not 1 <= self.num_spliced_dataset_bins <= _MOST_BINS:
            found.append(f"--num_spliced_dataset_bins must be between 1 and {_MOST_BINS}")
        if not 0 <= self.validation_fraction < 1:
            found.append("--validation_fraction must be at least 0 and below 1")
        if not 0 <= self.max_rejected <= 1:
            found.append("--max_rejected must be between 0 and 1")
        if self.num_workers is not None and self.num_workers < 1:
            found.append("--num_workers must be at least 1")
        try:
            parse_mix(self.mix)
        except ValueError as error:
            found.append(f"--mix: {error}")
        return found + self._shard_problems() + self._overlaps()

    def share(self) -> tuple[int, int]:
        """``--shard``: the number of this machine's share, from 0, and how many there are."""
        if self.shard is None:
            return 0, 1
        number, total = map(int, self.shard.split("/"))
        return number - 1, total

    def other_inputs(self) -> list[tuple[str, Path]]:
        """Further files that a command reads, with their flags."""
        return []

    def _shard_problems(self) -> list[str]:
        if self.shard is None:
            return []
        if not re.fullmatch(r"\d+/\d+", self.shard):
            return [f"--shard {self.shard} is not of the form 1/4"]
        number, total = self.share()
        if not 0 <= number < total:
            return [f"--shard {self.shard}: the first number goes from 1 to the second"]
        if self.overwrite:
            return ["--shard and --overwrite do not go together: remove the old output first"]
        return []

    def _overlaps(self) -> list[str]:
        """Outputs are replaced as a whole: nothing that is needed may be or lie in one."""
        outputs = {"--data_arrow_output_dir": self.data_arrow_output_dir}
        if self.data_jsonl_output_dir:
            outputs["--data_jsonl_output_dir"] = self.data_jsonl_output_dir
        needed = [("--data_input_dirs", path) for path in self.data_input_dirs]
        needed += [("--tokenizer_dir", self.tokenizer_dir), *outputs.items()]
        needed += self.other_inputs()
        if self.data_cache_dir:
            needed.append(("--data_cache_dir", self.data_cache_dir))
        return [
            f"{flag} {path} is or lies in {output_flag} {output}, which is replaced as a whole"
            for output_flag, output in outputs.items()
            for flag, path in needed
            if flag != output_flag and path.resolve().is_relative_to(output.resolve())
        ]
