"""From tokenised documents to parts and a manifest: what both kinds of dataset share."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.command import option
from colossal_llama.dataset.bins import divide, seeded_order
from colossal_llama.dataset.manifest import (
    SCHEMA_VERSION,
    ArrowFile,
    CategoryCount,
    Manifest,
    Part,
    TokenizerIdentity,
)
from colossal_llama.dataset.packing import Row
from colossal_llama.dataset.spool import Document, Spool
from colossal_llama.dataset.writer import (
    ARROW_FILE,
    IGNORE_INDEX,
    RowData,
    write_json_lines,
    write_part,
)
from colossal_llama.errors import DataError
from colossal_llama.storage import atomic_directory, sha256_file

if TYPE_CHECKING:
    import numpy as np

Pack = Callable[[Iterable[tuple[int, int]]], Iterator[Row]]

_MOST_BINS = 100_000  # part-00000 to part-99999


@dataclass
class DatasetOptions:
    """What preparing any kind of dataset asks for."""

    data_input_dirs: list[Path] = option(
        help="directories or files of .jsonl or .jsonl.gz, separated by commas", comma=True
    )
    tokenizer_dir: Path = option(help="tokenizer of the model that will be trained")
    data_arrow_output_dir: Path = option(help="where the part-* directories and manifest go")
    data_jsonl_output_dir: Path | None = option(
        None, help="also write every part as JSON lines into this directory, for reading"
    )
    data_cache_dir: Path | None = option(
        None,
        help="where temporary files go, about 5 bytes a token, removed at the end; "
        "without it, beside the output",
    )
    max_length: int = option(4096, help="longest row in tokens")
    num_spliced_dataset_bins: int = option(
        10, help="number of part-* directories; each holds the same share of every category"
    )
    seed: int = option(42, help="seed of the shuffle")
    overwrite: bool = option(False, help="replace output directories that exist")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if not self.data_input_dirs:
            found.append("--data_input_dirs names nothing")
        if self.max_length < 2:
            found.append("--max_length must be at least 2")
        if not 1 <= self.num_spliced_dataset_bins <= _MOST_BINS:
            found.append(f"--num_spliced_dataset_bins must be between 1 and {_MOST_BINS}")
        return found + self._overlaps()

    def _overlaps(self) -> list[str]:
        """Outputs are replaced as a whole: nothing that is needed may be or lie in one."""
        outputs = {"--data_arrow_output_dir": self.data_arrow_output_dir}
        if self.data_jsonl_output_dir:
            outputs["--data_jsonl_output_dir"] = self.data_jsonl_output_dir
        needed = [("--data_input_dirs", path) for path in self.data_input_dirs]
        needed += [("--tokenizer_dir", self.tokenizer_dir), *outputs.items()]
        if self.data_cache_dir:
            needed.append(("--data_cache_dir", self.data_cache_dir))
        return [
            f"{flag} {path} is or lies in {output_flag} {output}, which is replaced as a whole"
            for output_flag, output in outputs.items()
            for flag, path in needed
            if flag != output_flag and path.resolve().is_relative_to(output.resolve())
        ]


@dataclass
class Workspace:
    """Temporary directories of a run; the outputs take their final names when it succeeds."""

    arrow: Path
    jsonl: Path | None
    spool: Spool


@contextmanager
def workspace(options: DatasetOptions) -> Iterator[Workspace]:
    """Yields where to write; on an exception nothing of it stays.

    Raises:
        DataError: an output exists and ``--overwrite`` is not given.
    """
    with contextlib.ExitStack() as outputs:
        overwrite = options.overwrite
        arrow = outputs.enter_context(
            atomic_directory(options.data_arrow_output_dir, overwrite=overwrite)
        )
        jsonl = options.data_jsonl_output_dir and outputs.enter_context(
            atomic_directory(options.data_jsonl_output_dir, overwrite=overwrite)
        )
        if options.data_cache_dir:
            options.data_cache_dir.mkdir(parents=True, exist_ok=True)
        cache = Path(tempfile.mkdtemp(prefix="tokenised-", dir=options.data_cache_dir or arrow))
        try:
            yield Workspace(arrow, jsonl, Spool(cache))
        finally:
            shutil.rmtree(cache)


def spool_documents(documents: Iterable[Document], spool: Spool) -> None:
    """Writes every document to the spool, under a progress bar.

    Raises:
        DataError: there is none.
    """
    from tqdm import tqdm

    for document in tqdm(documents, desc="tokenise", unit=" documents", disable=None):
        spool.add(document)
    if not len(spool):
        raise DataError("the input holds no document that could be kept; give other input")
    spool.finish()


def write_parts(
    options: DatasetOptions,
    space: Workspace,
    pack: Pack,
    *,
    kind: str,
    tokenizer: TokenizerIdentity,
    rejected: dict[str, int],
    shortened: int = 0,
    chat_template: str | None = None,
) -> Manifest:
    """Divides the spooled documents into bins, lays out the rows, writes parts and manifest.

    Args:
        options: the command's options.
        space: where to write; its spool is finished.
        pack: lays (document number, length) pairs out in rows.
        kind: "pretrain" or "sft".
        tokenizer: what made the ids.
        rejected: reason -> count of input left out.
        shortened: conversations whose last turns were left out.
        chat_template: what formatted conversations.
    """
    from tqdm import tqdm

    spool = space.spool
    counts = {name: CategoryCount() for name in spool.names}
    parts: dict[str, Part] = {}
    bins = divide(
        spool.lengths,
        spool.categories,
        spool.names,
        options.num_spliced_dataset_bins,
        options.seed,
    )
    for number, bucket in enumerate(tqdm(bins, desc="write", unit=" parts", disable=None)):
        name = f"part-{number:05d}"
        layout = _lay_out(spool, bucket, pack, counts)
        order = seeded_order(len(layout), options.seed, "rows", number)
        rows: Iterator[RowData] = (_row_data(spool, *layout[index]) for index in order)
        if space.jsonl:
            rows = write_json_lines(space.jsonl / f"{name}.jsonl", rows)
        write_part(space.arrow / name, rows, spool.names)
        parts[name] = _describe(space.arrow / name, [row for _, row in layout])
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind=kind,
        tokenizer=tokenizer,
        max_length=options.max_length,
        seed=options.seed,
        categories=counts,
        padding_share=_padding_share(counts.values(), options.max_length),
        rejected=rejected,
        shortened=shortened,
        chat_template=chat_template,
        parts=parts,
    )
    manifest.write(space.arrow)
    return manifest


def summary(manifest: Manifest, output: Path) -> str:
    """The table that a command prints at the end."""
    lines = [
        f"{'category':<16}{'documents':>12}{'tokens':>14}{'loss tokens':>14}"
        f"{'rows':>10}{'tokens/row':>12}"
    ]
    total = CategoryCount()
    for name, count in manifest.categories.items():
        lines.append(_table_row(name, count))
        for field in vars(total):
            setattr(total, field, getattr(total, field) + getattr(count, field))
    lines.append(_table_row("total", total))
    if total.tokens_without_loss:
        lines.append(f"{total.tokens_without_loss} tokens are in rows without loss: not written")
    if manifest.rejected.get("too_long"):
        lines.append(
            f"{_count_of('conversation', manifest.rejected['too_long'])} left out: not even the "
            f"first exchange fits into --max_length {manifest.max_length}"
        )
    if manifest.shortened:
        shortened = _count_of("conversation", manifest.shortened)
        lines.append(f"{shortened} shortened to --max_length {manifest.max_length}")
    lines.append(f"{_count_of('part', len(manifest.parts))} in {output}")
    return "\n".join(lines)


def _lay_out(
    spool: Spool, bucket: list[np.ndarray], pack: Pack, counts: dict[str, CategoryCount]
) -> list[tuple[str, Row]]:
    """The rows of a bucket that have something to learn, in order; adds to ``counts``."""
    layout = []
    for name, documents in zip(spool.names, bucket, strict=True):
        count = counts[name]
        lengths = spool.lengths[documents]
        count.documents += len(documents)
        count.tokens += int(lengths.sum())
        for row in pack(zip(documents.tolist(), lengths.tolist(), strict=True)):
            loss = spool.row_loss(row)
            # A token is predicted from the one before: the first one's label is never used,
            # and the mean loss over a row without any other would be NaN.
            if loss[1:].any():
                layout.append((name, row))
                count.rows += 1
                count.loss_tokens += int(loss.sum())
            else:
                count.tokens_without_loss += len(loss)
    return layout


def _row_data(spool: Spool, category: str, row: Row) -> RowData:
    import numpy as np

    input_ids = spool.row_ids(row)
    labels = np.where(spool.row_loss(row), input_ids, np.int32(IGNORE_INDEX))
    return RowData(input_ids, labels, [stop - start for _, start, stop in row], category)


def _describe(directory: Path, rows: list[Row]) -> Part:
    lengths = [sum(stop - start for _, start, stop in row) for row in rows]
    path = directory / ARROW_FILE
    file = ArrowFile(path.stat().st_size, sha256_file(path))
    return Part(len(rows), sum(lengths), max(lengths, default=0), {ARROW_FILE: file})


def _padding_share(counts: Iterable[CategoryCount], max_length: int) -> float:
    counts = list(counts)
    room = max_length * sum(count.rows for count in counts)
    tokens = sum(count.tokens - count.tokens_without_loss for count in counts)
    return round(1 - tokens / room, 6) if room else 0.0


def _table_row(name: str, count: CategoryCount) -> str:
    written = count.tokens - count.tokens_without_loss
    return (
        f"{name:<16}{count.documents:>12,}{count.tokens:>14,}{count.loss_tokens:>14,}"
        f"{count.rows:>10,}{written / max(count.rows, 1):>12,.1f}"
    )


def _count_of(noun: str, count: int) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
