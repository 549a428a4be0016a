"""`twofold convert`: a model and images in, a faster model out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.groups import Planning, Preparation, Quantizing, Running, Training
from converter.cli.options import BUDGET, OUTPUT, RECOVERY, Calib, Html, Model, Out, Quiet
from converter.cli.outputs import check_outputs
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence, progress_of
from converter.config import Budget
from converter.errors import ConfigError

__all__ = ["convert"]


@grouped
def convert(
    *,
    model: Model,
    calib: Calib,
    out: Out,
    speedup: Annotated[
        float | None,
        typer.Option(help="Make it so many times faster; above 1.", rich_help_panel=BUDGET),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds that one batch may take.", rich_help_panel=BUDGET),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(
            help="Divide the multiply-accumulates by so much; above 1.", rich_help_panel=BUDGET
        ),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Divide the parameters by so much; above 1.", rich_help_panel=BUDGET),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="In place of a budget: the fastest model that loses no more than so many percentage "
            "points of accuracy, or of top-1 agreement without labels (an output error in percent "
            "where there are no classes).",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            help="What --max-drop is measured on, class folders for accuracy; every fifth calibration "
            "image where none is given.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|EPOCHS",
            help="Then train the result to answer as the original does: for a time as 90s, 10m, 1h, or "
            "for epochs as 20e.",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    recover_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder, .npy or .npz to learn from, the more the better; --calib where none is given.",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    gradual: Annotated[
        int | None,
        typer.Option(
            metavar="PARTS",
            help="Convert and recover in so many parts, each from what the one before computes; 2 where "
            "none is given and the budget is a half or less.",
            show_default=False,
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    training: Training,
    quantizing: Quantizing,
    preparation: Preparation,
    planning: Planning,
    running: Running,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON report to write; OUT with .json where none is given.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Convert a model, within a budget, and say what became of each layer."""
    with one_sentence():
        read = [model, calib, val]
        check_outputs([out], read=read)
        report = out.with_suffix(".json") if report is None else report
        check_outputs([report, html], read=[*read, out])
        asked = {"macs": macs, "params": params, "speedup": speedup, "latency_ms": latency_ms}
        if max_drop is not None and any(each is not None for each in asked.values()):
            raise ConfigError("--max-drop takes the place of a budget; leave one of the two out")
        if recover is None and recover_images is not None:
            raise ConfigError(
                "--recover-images is what --recover learns from; say how long, as in --recover 10m"
            )
        if recover is None and gradual is not None:
            raise ConfigError(
                "--gradual recovers after each part; say how long, as in --recover 10m"
            )
        if max_drop is not None and gradual is not None:
            raise ConfigError("--gradual is for a budget; leave it or --max-drop out")
        recovery = None
        if recover is not None:
            recovery = dataclasses.replace(
                training.settings(
                    recover, device=planning.device, memory=planning.memory, seed=planning.seed
                ),
                gradual=gradual,
            )
        with planning.place() as executor:
            conversion = converter.convert(
                model,
                calib,
                out,
                Budget(**asked) if max_drop is None else None,
                max_drop=max_drop,
                val=val,
                recovery=recovery,
                recover_images=recover_images,
                quantization=quantizing.settings(
                    batch=planning.calib_batch, memory_mib=planning.memory
                ),
                **planning.settings(running),
                preprocessing=preparation.preprocessing(calib, quiet=quiet),
                executor=executor,
                progress=progress_of(quiet=quiet),
            )
        from converter.report.files import write_report

        write_report(report, conversion.to_dict())
        if html is not None:
            from converter.report.page import write_page

            write_page(html, conversion.to_dict())
        if not quiet:
            from converter.report.console.conversion import print_conversion

            print_conversion(conversion, [each for each in (report, html) if each is not None])
