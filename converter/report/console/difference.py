"""What two runs do not have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from converter.report.console.output import headed, output_console, print_lines, texts

if TYPE_CHECKING:
    from converter.difference import Change, Difference

__all__ = ["print_difference"]


def print_difference(difference: Difference, console: Console | None = None) -> None:
    """Print what two runs do not have in common, then their figures."""
    console = console or output_console()
    table = headed("", "A", "B")
    for heading, changes in (
        ("settings", difference.settings),
        ("machine", difference.machine),
        ("hashes", difference.hashes),
        ("layers", difference.layers),
        ("figures", difference.figures),
    ):
        if changes:
            table.add_row(Text(heading, style="bold"))
        for change in changes:
            table.add_row(*texts(_change_cells(change)))
    console.print(table)
    if difference.alike:
        print_lines(console, ["settings, machine, hashes and layers are the same"])


def _change_cells(change: Change) -> list[str]:
    values = [
        "–" if each is None else f"{each:.6g}" if isinstance(each, float) else str(each)
        for each in (change.before, change.after)
    ]
    return [f"  {change.name}", *values]
