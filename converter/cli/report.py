"""`twofold report`: a page of saved reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from converter.cli.options import Quiet
from converter.cli.outputs import check_outputs
from converter.cli.terminal import one_sentence

__all__ = ["report"]


def report(
    *,
    report: Annotated[
        Path,
        typer.Argument(metavar="REPORT", help="JSON report of convert, plan, validate or check."),
    ],
    validation: Annotated[
        Path | None, typer.Option(help="JSON report of validate or check on the same two models.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    quiet: Quiet = False,
) -> None:
    """Make a page of saved reports: one HTML file for any browser."""
    with one_sentence():
        check_outputs([out], read=[report, validation])
        from converter.report.page import read_report, write_page

        write_page(
            out,
            read_report(report),
            validation=None if validation is None else read_report(validation),
        )
        if not quiet:
            from converter.report.console.output import print_written

            print_written([out])
