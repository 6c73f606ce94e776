"""An analysis as tables for a terminal, readable in 100 columns and without colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.tokenizer.analysis import Analysis, Part, tokens_of
from colossal_llama.tokenizer.analysis_format import (
    count,
    difference,
    per_half,
    percent,
    shortened,
    splits,
    unreachable_count,
    visible,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDTH = 100  # where the output is no terminal
_MOST_FILES = 20
_EXAMPLES = 8
_STYLES = ("black on bright_cyan", "black on bright_yellow")
_CUT_STYLE = "white on red"


def show(analysis: Analysis, console: Console | None = None) -> None:
    """Prints vocabulary, compression, bytes per token per file, agreement and the split view."""
    from rich.console import Console

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
    tables = [_vocabulary(analysis), _compression(analysis), _per_file(analysis)]
    if any(figures.agreement for figures in analysis.tokenizers):
        tables.append(_agreement(analysis))
    for table in tables:
        console.print(table)
        console.print()
    _print_examples(analysis, console)
    _print_splits(analysis, console)


def _table(title: str, caption: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )


def _vocabulary(analysis: Analysis) -> Table:
    table = _table(
        "Vocabulary",
        "Level 1-3: share of the characters of 通用规范汉字表 that are exactly one token.\n"
        "Unreachable: pieces that no text gives; slow / fast where the halves differ.\n"
        "Unused: of the pieces that text can give, those not in this sample.",
    )
    table.add_column("tokenizer", overflow="fold")
    table.add_column("kind")
    for name in ("size", "level 1", "level 2", "level 3", "unreachable", "unused"):
        table.add_column(name, justify="right")
    for figures in analysis.tokenizers:
        unreachable = {n: count(unreachable_count(h)) for n, h in figures.halves.items()}
        main = figures.main
        table.add_row(
            figures.name,
            figures.kind,
            count(figures.size),
            *(percent(figures.coverage(level)) for level in analysis.characters),
            per_half(figures, unreachable),
            percent(1 - main.used / main.producible) if main.producible else "–",
        )
    return table


def _compression(analysis: Analysis) -> Table:
    total = sum(file.bytes for file in analysis.files)
    characters = sum(file.characters for file in analysis.files)
    documents = sum(file.documents for file in analysis.files)
    table = _table(
        f"Compression on {documents:,} documents, {total / 1e6:,.1f} MB of text",
        f"Compared: tokens per token of {analysis.baseline.name}. Lower is better, except for "
        "bytes per token.",
    )
    table.add_column("tokenizer", overflow="fold")
    for name in (
        *("tokens", "bytes per token", "compared", "tokens per character"),
        "tokens per document",
    ):
        table.add_column(name, justify="right")
    for figures in analysis.tokenizers:
        tokens = tokens_of(figures.main)
        bytes_per_token = {n: f"{total / tokens_of(h):.2f}" for n, h in figures.halves.items()}
        table.add_row(
            figures.name,
            count(tokens),
            per_half(figures, bytes_per_token),
            f"{analysis.compression(figures):.3f}",
            f"{tokens / characters:.3f}",
            f"{tokens / documents:,.1f}",
        )
    return table


def _per_file(analysis: Analysis) -> Table:
    left = len(analysis.files) - _MOST_FILES
    more = f"{left} more files are in analysis.csv." if left > 0 else ""
    table = _table("Bytes per token, per file", more)
    table.add_column("file", overflow="fold")
    for figures in analysis.tokenizers:
        table.add_column(figures.name, justify="right", overflow="fold")
    for place, file in enumerate(analysis.files[:_MOST_FILES]):
        cells = []
        for figures in analysis.tokenizers:
            tokens = {name: tokens_of(half, place) for name, half in figures.halves.items()}
            texts = {n: f"{file.bytes / t:.2f}" if t else "–" for n, t in tokens.items()}
            cells.append(per_half(figures, texts))
        table.add_row(file.name, *cells)
    return table


def _agreement(analysis: Analysis) -> Table:
    table = _table(
        "Do SentencePiece (slow) and the fast tokenizer give the same ids?",
        "The fast tokenizer is what AutoTokenizer loads.",
    )
    table.add_column("tokenizer", overflow="fold")
    table.add_column("fast half", overflow="fold")
    table.add_column("documents with the same ids", justify="right")
    for figures in analysis.tokenizers:
        found = figures.agreement
        share = "–"
        if found:
            same, all_ = found.identical, found.documents
            share = f"{same:,} of {all_:,} ({percent(same / all_)})"
        table.add_row(figures.name, figures.fast_source, share)
    return table


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)  # "[...]" in a piece is no markup


def _print_examples(analysis: Analysis, console: Console) -> None:
    for figures in analysis.tokenizers:
        for name, half in figures.halves.items():
            if half.unreachable:
                shown = "  ".join(shortened(piece) for piece in half.unreachable[:_EXAMPLES])
                more = "  ..." if len(half.unreachable) > _EXAMPLES else ""
                console.print(_plain(f"unreachable in {figures.name} ({name}):  {shown}{more}"))
        if found := difference(figures):
            text = "{where}: slow {slow}, fast {fast}".format_map(found)
            console.print(_plain(f"first difference in {figures.name}: {text}"))
    console.print()


def _print_splits(analysis: Analysis, console: Console) -> None:
    console.print("How each splits", style="bold", end=" ")
    console.print(_plain(visible(analysis.sentence)), soft_wrap=True)
    console.print(
        _plain("(bytes in hexadecimal stand behind the character they spell)"), style="dim"
    )
    console.print()
    for figures in analysis.tokenizers:
        for label, parts in splits(figures):
            tokens = sum(len(part.ids) for part in parts)
            console.print(_plain(f"{label}: {tokens} tokens"), style="bold")
            console.print(_coloured(parts))
            console.print()


def _coloured(parts: list[Part]) -> Text:
    from rich.text import Text

    line = Text()
    for place, part in enumerate(parts):
        if place:
            line.append("|", style="dim")
        if len(part.ids) == 1:
            line.append(visible(part.text), style=_STYLES[place % 2])
        else:
            spelled = "|".join(map(visible, part.spelled))
            line.append(f"{visible(part.text)}<{spelled}>", style=_CUT_STYLE)
    return line
