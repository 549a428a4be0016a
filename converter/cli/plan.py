"""`twofold plan`: what a model could become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.groups import Planning, Preparation, Running
from converter.cli.options import OUTPUT, Calib, Json, Model, Quiet
from converter.cli.outputs import check_outputs
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence, progress_of

__all__ = ["plan"]


@grouped
def plan(
    *,
    model: Model,
    calib: Calib,
    val: Annotated[
        Path | None,
        typer.Option(
            help="What points are verified on, class folders for accuracy; every fifth calibration "
            "image where none is given."
        ),
    ] = None,
    verify: Annotated[
        int, typer.Option(help="Points to carry out, time and compare; 0 for none.")
    ] = 2,
    preparation: Preparation,
    planning: Planning,
    running: Running,
    json: Json = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|svg", help="Picture to write.", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Say what a model could become, error against time; no model is written."""
    with one_sentence():
        check_outputs([json, picture], read=[model, calib, val])
        if picture is not None:
            from converter.report.picture import check_picture

            check_picture(picture)
        with planning.place() as executor:
            front = converter.plan(
                model,
                calib,
                val=val,
                verify=verify,
                **planning.settings(running),
                preprocessing=preparation.preprocessing(calib, quiet=quiet),
                executor=executor,
                progress=progress_of(quiet=quiet),
            )
        from converter.report.console.front import print_front
        from converter.report.files import write_report

        if json is not None:
            write_report(json, front.to_dict())
        if picture is not None:
            from converter.report.picture import draw_front

            draw_front(front, picture)
        if not quiet:
            print_front(front, [each for each in (json, picture) if each is not None])
