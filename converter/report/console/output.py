"""How anything is written to the terminal: lines, notes, and tables of cells.

Tables go to standard output, progress and messages to standard error, so that either can be
redirected by itself. Names come from files that nobody vouches for: whatever is not printable in
them is replaced, and nothing in them is taken for markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter.report.words import printable, visible

__all__ = [
    "headed",
    "output_console",
    "print_lines",
    "print_message",
    "print_notes",
    "print_written",
    "texts",
    "threads",
]

_PIPE_WIDTH = 240
"""Columns where output is no terminal: enough that no table is folded."""


def output_console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or error as it is now."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_message(text: str) -> None:
    """Print one line to standard error, never folded."""
    output_console(stderr=True).print(Text(f"twofold: {printable(text)}"), soft_wrap=True)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines, never folded."""
    for line in lines:
        console.print(Text(visible(line)), soft_wrap=True)


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print what a reader must know, each note on its line."""
    print_lines(console, [f"note: {note}" for note in notes])


def print_written(files: Sequence[Path], console: Console | None = None) -> None:
    """Print where files lie."""
    print_lines(console or output_console(), [f"written     {path}" for path in files])


def headed(*columns: str) -> Table:
    """Return an empty table; heads begin with ">" to align a column to the right, "|" to keep it whole."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column.lstrip(">|"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column.startswith("|"),
        )
    return table


def texts(cells: Iterable[str]) -> list[Text]:
    """Make cells of a table, printable and taken for no markup."""
    return [Text(printable(cell)) for cell in cells]


def threads(number: int) -> str:
    """Say a number of threads: 1 thread, 2 threads."""
    return f"{number} thread{'s' * (number != 1)}"
