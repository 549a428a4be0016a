"""The program itself: its commands in the order of `--help`, and what runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import converter
from converter.cli.check import check
from converter.cli.convert import convert
from converter.cli.diff import diff
from converter.cli.init import init
from converter.cli.inspect import inspect
from converter.cli.plan import plan
from converter.cli.quantize import quantize
from converter.cli.recover import recover
from converter.cli.report import report
from converter.cli.run import run
from converter.cli.terminal import libraries_quiet, one_sentence
from converter.cli.validate import validate

__all__ = ["app", "main"]


app = typer.Typer(
    help="Make a trained CNN in ONNX smaller and measurably faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    convert,
    plan,
    inspect,
    recover,
    quantize,
    validate,
    report,
    run,
    check,
    init,
    diff,
)

for _command in _COMMANDS:
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    with one_sentence():
        if version:
            typer.echo(f"twofold {converter.__version__}")
            raise typer.Exit


def main() -> None:
    """Run `twofold` with the arguments of this process, and end it with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # tests put other streams in place
            reconfigure(errors="replace")  # a name that the terminal cannot show is no failure
    # torch's idle threads sleep instead of spinning: where other programs keep the cores busy, fits
    # took several times as long. OpenMP reads this when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with libraries_quiet():
        app(prog_name="twofold")
