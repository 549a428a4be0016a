"""`twofold inspect`: the layers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.options import Size
from converter.cli.outputs import check_outputs
from converter.cli.terminal import one_sentence
from converter.config import Preprocessing, preprocessing_from_options

__all__ = ["inspect"]


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model to look at.")],
    size: Size = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """List every Conv and Gemm: shape, cost, activation, and whether it can be converted."""
    with one_sentence():
        check_outputs([json], read=[model])
        sides = Preprocessing() if size is None else preprocessing_from_options(size=size)
        inspection = converter.inspect(model, sides.size)
        from converter.report.console.inspection import print_inspection
        from converter.report.files import write_report

        if json is not None:
            write_report(json, inspection.to_dict())
        print_inspection(inspection)
