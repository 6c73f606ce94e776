"""A dataset's figures as tables for a terminal, and its rows as text in which loss is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_llama.dataset.inspection.figures import Target, plural
from colossal_llama.dataset.inspection.grids import Grid, grids, heading
from colossal_llama.dataset.inspection.rows import ShownDocument, ShownRow, document_title, title

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 240  # of the tables at most: a terminal wraps a line, but a number must not be cut
_MOST_PARTS, _MOST_CATEGORIES = 20, 5
_BOLD, _DOCUMENT, _GAP, _LOSS = "1", "36", "33", "32"
_SPECIAL = {True: "1;32", False: "1;35"}  # with loss, without


def console_for(color: str) -> Console:
    """A console with colours "always", "never", or ("auto") where the terminal shows them."""
    from rich.console import Console

    if color == "always":
        return Console(width=_WIDTH, force_terminal=True, no_color=False, color_system="standard")
    return Console(width=_WIDTH, color_system=None if color == "never" else "auto")


def show_figures(target: Target, console: Console) -> None:
    """Prints what the manifest says."""
    from rich.text import Text

    for name, value in heading(target):
        console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)
    for grid in grids(target, _MOST_PARTS, _MOST_CATEGORIES):
        console.print()
        _print_grid(grid, console)
    console.print()


def _print_grid(grid: Grid, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for place, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="right" if place else "left", vertical="bottom")
    for number, row in enumerate(grid.rows, 1):
        last = grid.last_is_total and number == len(grid.rows)
        table.add_row(*map(Text, row), style="bold" if last else None)
    console.print(Text(grid.title, style="bold"))
    console.print(table)
    console.print(Text(grid.note, style="dim"), soft_wrap=True)


def show_rows(part: str, rows: Sequence[ShownRow], console: Console) -> None:
    """Prints rows as text: what carries loss is green, or in ⟦ ⟧ where there are no colours."""
    coloured = console.color_system is not None and not console.no_color
    sign = _paint("green", _LOSS) if coloured else "in ⟦ ⟧"
    bold, cyan = (_BOLD, _DOCUMENT) if coloured else ("", "")
    print(f"{_paint(f'Rows of {part} as text', bold)} ({sign}: carries loss)\n")
    for row in rows:
        print(_paint(title(row), bold))
        for document in row.shown:
            print(_paint(f"── {document_title(document)}", cyan))
            text = _coloured(document) if coloured else _marked(document)
            print(text, end="" if document.stretches[-1].hidden else "\n")
        print()


def _coloured(document: ShownDocument) -> str:
    texts = []
    for stretch in document.stretches:
        if stretch.hidden:
            texts.append(_paint(_gap(stretch.hidden), _GAP))
            continue
        plain = _LOSS if stretch.loss else ""
        codes = _SPECIAL[stretch.loss] if stretch.special else plain
        texts.append(_paint(stretch.text, codes))
    return "".join(texts)


def _marked(document: ShownDocument) -> str:
    texts, inside = [], False
    for stretch in document.stretches:
        if stretch.loss != inside:
            texts.append("⟦" if stretch.loss else "⟧")
            inside = stretch.loss
        texts.append(_gap(stretch.hidden) if stretch.hidden else stretch.text)
    return "".join(texts) + ("⟧" if inside else "")


def _gap(hidden: int) -> str:
    return f"\n… {plural(hidden, 'token')} …\n"


def _paint(text: str, codes: str) -> str:
    """``text`` in a colour, line by line, as pagers want it."""
    if not codes:
        return text
    lines = (f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
    return "\n".join(lines)
