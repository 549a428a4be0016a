"""What a recovery has come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from converter.report.console.output import output_console, print_lines, print_notes

if TYPE_CHECKING:
    from converter.refine.recovery import Recovered

__all__ = ["print_recovery", "recovery_lines"]


def print_recovery(recovered: Recovered, out: Path, console: Console | None = None) -> None:
    """Print what a recovery has come to, and where the model lies."""
    console = console or output_console()
    lines = list(recovery_lines(recovered.to_dict()))
    if not recovered.improved:
        lines.append("            the model was written as it was given")
    print_lines(console, lines)
    print_notes(console, recovered.notes)
    print_lines(console, [f"model       {out}"])


def recovery_lines(recovery: Mapping[str, Any] | None) -> Iterator[str]:
    """Say how far the model was from its original on the held-out images, before and after."""
    if recovery is None:
        return
    before, after = recovery["before"], recovery["after"]
    agreement = ""
    if before["agreement"] is not None:
        agreement = (
            f", the same best class for {100 * before['agreement']:.2f} → "
            f"{100 * after['agreement']:.2f} %"
        )
    verdict = "" if recovery["improved"] else " (not better: nothing was changed)"
    yield (
        f"recovered   loss {before['loss']:.4g} → {after['loss']:.4g}{agreement} of "
        f"{recovery['held_out']:,} held-out images{verdict}"
    )
    yield (
        f"            {recovery['epochs']:.1f} epochs of {recovery['images']:,} images in "
        f"{recovery['seconds']:.0f} s, {recovery['precision']}: {recovery['status']}"
    )
