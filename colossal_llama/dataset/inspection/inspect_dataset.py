"""Shows what a prepared dataset holds: counts by category, how even its parts are, rows as text.

    colossal-llama data inspect data --tokenizer_dir model
    colossal-llama data inspect data/part-00000 --tokenizer_dir model --rows 10 --row_tokens 0
    colossal-llama data inspect data --verify --html data.html

The figures are the manifest's; of the rows only those that are shown are read.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.command import option, run

if TYPE_CHECKING:
    from colossal_llama.dataset.inspection.figures import Target
    from colossal_llama.dataset.inspection.rows import ShownRow


@dataclass
class InspectOptions:
    """Show what a prepared dataset holds: counts, how even its parts are, rows as text."""

    directory: Path = option(
        help="output directory of a prepare command, or a part-* or validation directory in it",
        positional=True,
    )
    tokenizer_dir: Path | None = option(
        None, help="tokenizer that made the dataset; rows are shown as text only with it"
    )
    rows: int = option(3, help="how many rows to show as text; 0 for none")
    part: str | None = option(
        None, help="part whose rows are shown; the first that has rows unless given"
    )
    first: int = option(0, help="number of the first row shown, from 0")
    seed: int | None = option(
        None, help="show rows drawn at random by this seed instead of neighbours"
    )
    row_tokens: int = option(
        300, help="tokens shown of a row, half of them from its end; 0 for all"
    )
    color: str = option(
        "auto",
        help="show what carries loss by colour, or in brackets; auto: colour in a terminal",
        choices=("auto", "always", "never"),
    )
    html: Path | None = option(None, help="also write all of it as a page, to this .html file")
    overwrite: bool = option(False, help="replace the .html file if it exists")
    verify: bool = option(False, help="compare every file with its SHA-256 in the manifest")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = [
            f"--{name} must not be negative"
            for name in ("rows", "first", "row_tokens")
            if getattr(self, name) < 0
        ]
        if self.seed is not None and self.first:
            found.append("--seed draws rows at random and --first counts them: give one of both")
        if self.html and self.html.suffix != ".html":
            found.append(f"--html {self.html}: the name must end in .html")
        return found


def inspect_dataset(options: InspectOptions) -> None:
    """Prints the figures and rows of a dataset or part, and writes them as a page if asked to.

    Raises:
        DataError: it is not a dataset, not whole, or made with another tokenizer.
    """
    from colossal_llama.dataset.inspection import terminal as inspect_terminal
    from colossal_llama.dataset.inspection.figures import find_target

    if isinstance(sys.stdout, io.TextIOWrapper):
        # The text is of any language; an output that cannot write all of it is no bug of ours.
        sys.stdout.reconfigure(errors="backslashreplace")
    target = find_target(options.directory)
    part = _part_of_rows(options, target)
    _check(options, target)
    console = inspect_terminal.console_for(options.color)
    inspect_terminal.show_figures(target, console)
    rows: list[ShownRow] = []
    if options.tokenizer_dir and options.rows and target.parts[part].rows:
        rows = _decode(options, target, part)
        inspect_terminal.show_rows(part, rows, console)
    elif note := _why_no_rows(options, target, part):
        print(note)
    if options.html:
        _write_page(options, target, part, rows)


def _why_no_rows(options: InspectOptions, target: Target, part: str) -> str:
    if not options.rows:
        return ""
    if not target.parts[part].rows:
        return f"{part} has no rows."
    return (
        "Rows are shown as text with --tokenizer_dir, the directory of the tokenizer whose "
        f"fingerprint starts with {target.manifest.tokenizer.fingerprint[:12]}."
    )


def _part_of_rows(options: InspectOptions, target: Target) -> str:
    """The part whose rows are shown: the one asked for, or the first that has any."""
    from colossal_llama.errors import UsageError

    if options.part is None:
        first = next(iter(target.parts))
        return next((name for name, part in target.parts.items() if part.rows), first)
    if options.part not in target.parts:
        some = ", ".join([*target.parts][:5])
        raise UsageError([f"--part {options.part}: {target.path} has no such part; it has {some}"])
    return options.part


def _check(options: InspectOptions, target: Target) -> None:
    """What could make the command fail is looked at before anything is printed."""
    from tqdm import tqdm

    from colossal_llama.dataset.inspection.figures import bytes_on_disk, plural, size
    from colossal_llama.dataset.manifest import check_files, check_tokenizer, tokenizer_identity
    from colossal_llama.errors import DataError
    from colossal_llama.storage import refuse_existing

    if options.html:
        if options.html.is_dir():
            raise DataError(f"--html {options.html} is a directory; give the name of a file")
        refuse_existing(options.html, overwrite=options.overwrite)
    manifest, directory = target.manifest, target.directory
    if options.tokenizer_dir:
        identity = tokenizer_identity(options.tokenizer_dir)
        check_tokenizer(manifest, target.path, identity, options.tokenizer_dir)
    for name in target.parts:
        check_files(manifest, directory / name)
    if not options.verify:
        return
    total = sum(map(bytes_on_disk, target.parts.values()))
    with tqdm(
        total=total, desc="verify", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for name, part in target.parts.items():
            check_files(manifest, directory / name, checksums=True)
            bar.update(bytes_on_disk(part))
    files = sum(len(part.files) for part in target.parts.values())
    print(f"{plural(files, 'file')}, {size(total)}: size and SHA-256 are the manifest's\n")


def _decode(options: InspectOptions, target: Target, name: str) -> list[ShownRow]:
    from colossal_llama.dataset.inspection.rows import Decoder, choose, open_part, show_row

    assert options.tokenizer_dir is not None
    part = target.parts[name]
    numbers = choose(name, part.rows, options.rows, options.first, options.seed)
    rows = open_part(target.directory / name, part)
    decoder = Decoder(options.tokenizer_dir, target.manifest.tokenizer.vocabulary_size)
    return [show_row(rows, number, decoder, options.row_tokens) for number in numbers]


def _write_page(options: InspectOptions, target: Target, part: str, rows: list[ShownRow]) -> None:
    from colossal_llama.dataset.inspection.page import render
    from colossal_llama.storage import atomic_file

    assert options.html is not None
    page = render(target, part, rows, _why_no_rows(options, target, part))
    with atomic_file(options.html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{options.html} written")


if __name__ == "__main__":
    sys.exit(run(InspectOptions, inspect_dataset))
