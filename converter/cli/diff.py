"""`twofold diff`: the reports of two conversions side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.outputs import check_outputs
from converter.cli.terminal import one_sentence
from converter.errors import ValidationError

__all__ = ["diff"]


def diff(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Report of a conversion.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Report of another one.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 where more than figures differs.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare two conversions: settings, versions, hashes, layers and figures."""
    with one_sentence():
        check_outputs([json], read=[first, second])
        difference = converter.diff(first, second)
        from converter.report.console.difference import print_difference
        from converter.report.files import write_report

        if json is not None:
            write_report(json, difference.to_dict())
        print_difference(difference)
        if exit_code and not difference.alike:
            raise typer.Exit(ValidationError.exit_code)
