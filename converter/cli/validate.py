"""`twofold validate`: two models on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.groups import Preparation, Running
from converter.cli.options import RUNNING, Html, Json, Quiet
from converter.cli.outputs import check_outputs
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence, progress_of
from converter.errors import ValidationError

__all__ = ["validate"]


@grouped
def validate(
    *,
    original: Annotated[Path, typer.Argument(metavar="A", help="The model as it was.")],
    converted: Annotated[Path, typer.Argument(metavar="B", help="The model to compare with it.")],
    data: Annotated[
        Path, typer.Option(help="Folder of images, .npy or .npz file that both run on.")
    ],
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels",
            help="Whether subfolders are classes; as a rule, where all images are in subfolders.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="At most so many images, spread evenly.")
    ] = None,
    preparation: Preparation,
    running: Running,
    batch: Annotated[
        int,
        typer.Option(help="Images that run at once for the comparison.", rich_help_panel=RUNNING),
    ] = 32,
    time_batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch to time, once for each; 1 and 32.", rich_help_panel=RUNNING),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="Timed seconds for each model and batch.", rich_help_panel=RUNNING),
    ] = 2.0,
    json: Json = None,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Compare two models under onnxruntime: outputs, accuracy, latency, size and cost."""
    with one_sentence():
        check_outputs([json, html], read=[original, converted, data])
        validation = converter.validate(
            original,
            converted,
            data,
            preprocessing=preparation.preprocessing(data, quiet=quiet),
            labels=labels,
            images=images,
            batch=batch,
            time_batches=time_batch or (1, 32),
            seconds=seconds,
            runtime=running.runtime(),
            progress=progress_of(quiet=quiet),
        )
        from converter.report.console.validation import print_validation
        from converter.report.files import write_report

        if json is not None:
            write_report(json, validation.to_dict())
        if html is not None:
            from converter.report.page import write_page

            write_page(html, validation.to_dict())
        if not quiet:
            print_validation(validation)
        if not validation.finite:
            raise ValidationError(
                f"{converted} gives NaN or infinity where {original} does not; do not use it"
            )
