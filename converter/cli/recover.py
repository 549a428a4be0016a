"""`twofold recover`: a converted model learns from its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.groups import Preparation, Running, Training
from converter.cli.options import RUNNING, Device, Json, Original, Out, Quiet, Seed
from converter.cli.outputs import check_outputs
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence, progress_of
from converter.config import RecoverySettings

__all__ = ["recover"]


@grouped
def recover(
    *,
    original: Original,
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="What it was converted to.")
    ],
    images: Annotated[
        Path, typer.Option(help="Folder of images, .npy or .npz file to learn from.")
    ],
    out: Out,
    length: Annotated[
        str,
        typer.Option(
            "--for", metavar="TIME|EPOCHS", help="How long: 90s, 10m, 1h, or epochs as 20e."
        ),
    ] = "10m",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File that an interrupted run goes on from; OUT with .recovery.npz where none is given."
        ),
    ] = None,
    training: Training,
    preparation: Preparation,
    running: Running,
    device: Device = RecoverySettings.device,
    memory: Annotated[
        int,
        typer.Option(metavar="MIB", help="Bound on images in memory.", rich_help_panel=RUNNING),
    ] = RecoverySettings.memory_mib,
    seed: Seed = RecoverySettings.seed,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to answer as its original does, without labels."""
    with one_sentence():
        check_outputs([out, json], read=[original, converted, images])
        recovered = converter.recover(
            original,
            converted,
            images,
            out,
            training.settings(length, device=device, memory=memory, seed=seed),
            preprocessing=preparation.preprocessing(images, quiet=quiet),
            runtime=running.runtime(),
            checkpoint=checkpoint,
            progress=progress_of(quiet=quiet),
        )
        from converter.report.console.recovery import print_recovery
        from converter.report.files import write_report

        if json is not None:
            write_report(json, {"format": "twofold-recovery-1", **recovered.to_dict()})
        if not quiet:
            print_recovery(recovered, out)
