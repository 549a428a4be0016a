"""`twofold init`: a project file for a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.options import Size
from converter.cli.outputs import check_outputs
from converter.cli.run import project_settings
from converter.cli.terminal import one_sentence
from converter.config import Preprocessing, preprocessing_from_options
from converter.errors import ConfigError
from converter.project import PROJECT_FILE, SCHEMA_FILE, schema, starter

__all__ = ["init"]


def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model to write it for.")],
    config: Annotated[
        Path | None,
        typer.Option(help=f"File to write; {PROJECT_FILE} beside the model where none is given."),
    ] = None,
    size: Size = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a commented twofold.toml for a model, and the schema that editors complete it by."""
    with one_sentence():
        target = model.parent / PROJECT_FILE if config is None else config
        rules = target.parent / SCHEMA_FILE
        check_outputs([target, rules], read=[model])
        if target.exists() and not force:
            raise ConfigError(f"{target} is there already; --force writes over it")
        sides = Preprocessing() if size is None else preprocessing_from_options(size=size)
        inspection = converter.inspect(model, sides.size)
        from converter.output_file import write_text_atomically
        from converter.report.console.output import print_written
        from converter.report.files import write_report

        path = Path(os.path.relpath(model, target.parent)).as_posix()
        write_report(rules, schema(project_settings()))
        write_text_atomically(
            target, starter(inspection, path, project_settings(), size=sides.size)
        )
        print_written([target, rules])
