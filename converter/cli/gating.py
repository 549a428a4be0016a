"""What `run` and `check` share: the project file, the gates and the verdict."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

import converter
from converter.cli.options import GATES, OUTPUT
from converter.cli.terminal import one_sentence, progress_of
from converter.config import Gates, Preprocessing, Target, gates_from_options
from converter.errors import ConfigError, ValidationError
from converter.project import PROJECT_FILE, Setting, read_project

__all__ = ["SUMMARY", "GatesJson", "Gating", "Junit", "config_option", "judge"]

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the file that a job on GitHub shows as its summary."""

GatesJson = Annotated[
    Path | None,
    typer.Option(help="JSON file of the gates to write.", rich_help_panel=OUTPUT),
]
Junit = Annotated[
    Path | None,
    typer.Option(help="JUnit XML file to write, a test for each gate.", rich_help_panel=OUTPUT),
]


def config_option(settings: Callable[[], Sequence[Setting]], *, required: bool) -> Any:
    """Make the option that names the project file, whose values become the defaults of all others.

    Parameters
    ----------
    settings : callable
        Lists what the file may hold; called when the file is read.
    required : bool
        Whether a file of the usual name must be there where none is named.
    """

    def read(context: typer.Context, config: Path) -> Path:
        with one_sentence():
            if required or config.exists() or config != Path(PROJECT_FILE):
                values = read_project(config, settings())
                # what `check` calls the two models
                values |= {"converted": values.get("out"), "against": values.get("model")}
                if values.get("data") is None:  # as `run` does
                    values["data"] = values.get("val")
                context.default_map = values
        return config

    return typer.Option(
        help="Settings; options override them.", is_eager=True, callback=read, show_default=True
    )


@dataclass(frozen=True)
class Gating:
    """Options that say what a converted model must keep to, and how that is found out."""

    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help=f"What must hold, once for each: {', '.join(each.name for each in fields(Gates))}.",
            callback=_with_those_of_the_file,
            rich_help_panel=GATES,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, .npy or .npz file that gates are judged on; class folders for "
            "accuracy.",
            rich_help_panel=GATES,
        ),
    ] = None
    seconds: Annotated[
        float, typer.Option(help="Timed seconds for each model.", rich_help_panel=GATES)
    ] = 2.0

    def asked(self, data: Path | None = None) -> tuple[Gates, Path]:
        """Give the gates and the images they are judged on, before any work."""
        from converter.gates import require_judgeable

        gates = gates_from_options(self.gate or ())
        chosen = self.data or data
        if chosen is None:
            raise ConfigError(
                "no images were given to judge the gates on; give --data a folder of some that the "
                "conversion does not see"
            )
        require_judgeable(gates, chosen)
        return gates, chosen


def _with_those_of_the_file(context: typer.Context, gates: list[str] | None) -> list[str]:
    """Put typed gates behind those of the project file; of one name the last counts."""
    return [*(context.default_map or {}).get("gate", ()), *(gates or ())]


def judge(
    original: Path,
    converted: Path,
    data: Path,
    gates: Gates,
    seconds: float,
    *,
    preprocessing: Preprocessing,
    target: Target,
    json: Path | None,
    junit: Path | None,
    quiet: bool,
    html: Path | None = None,
    report: Path | None = None,
) -> None:
    """Judge, write what is asked for, and end with a sentence where a gate does not hold."""
    verdict = converter.check(
        original,
        converted,
        data,
        gates,
        preprocessing=preprocessing,
        target=target,
        seconds=seconds,
        progress=progress_of(quiet=quiet),
    )
    from converter.report.console.validation import print_verdict
    from converter.report.files import write_report

    if json is not None:
        write_report(json, verdict.to_dict())
    if junit is not None:
        from converter.report.junit import write_junit

        write_junit(junit, verdict)
    if html is not None and report is not None:
        from converter.report.page import read_report, write_page

        write_page(html, read_report(report), validation=verdict.to_dict())
    summary = os.environ.get(SUMMARY)
    if summary:
        from converter.report.markdown import append_summary

        append_summary(Path(summary), verdict)
    if not quiet:
        print_verdict(verdict, [each for each in (json, junit) if each is not None])
    if not verdict.passed:
        raise ValidationError(verdict.sentence())
