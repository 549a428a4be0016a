"""The best plans for a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from converter.report.console.output import (
    headed,
    output_console,
    print_lines,
    print_notes,
    print_written,
    texts,
)
from converter.report.words import effect, interval, milliseconds

if TYPE_CHECKING:
    from converter.front import Front, FrontPoint

__all__ = ["print_front"]


def print_front(front: Front, files: Sequence[Path] = (), console: Console | None = None) -> None:
    """Print the best plans, what they gave where they were carried out, and where the files lie."""
    console = console or output_console()
    timed = (">ms", ">speed-up") if front.timed else ()
    measured = (">measured", ">drop") if front.judged_on is not None else ()
    table = headed(*timed, ">÷ MACs", ">÷ params", ">error", *measured)
    for point in front.points:
        cells = _front_cells(point)
        table.add_row(*texts(cells if measured else cells[: len(table.columns)]))
    console.print(table)
    lines = [
        "error: predicted squared error of the network's output, relative to its variance",
        f"took        {sum(stage.seconds for stage in front.stages):.1f} s",
    ]
    if front.judged_on is not None:
        lines.insert(1, f"drop        measured on {front.judged_on}")
    print_lines(console, lines)
    print_notes(console, front.notes)
    print_written(files, console)


def _front_cells(point: FrontPoint) -> list[str]:
    cells = [
        f"{point.macs_reduction:.2f}",
        f"{point.params_reduction:.2f}",
        effect(point.effect),
    ]
    if point.ms is not None and point.speedup is not None:
        cells = [milliseconds(point.ms).removesuffix(" ms"), f"{point.speedup:.2f}", *cells]
    done = point.verified
    if done is None:
        return [*cells, "", ""]
    shown = f"÷ {done.macs_reduction:.2f}"
    if done.latency is not None:
        shown = interval(done.latency.speedup, done.latency.low, done.latency.high)
    return [*cells, shown, str(done.drop)]
