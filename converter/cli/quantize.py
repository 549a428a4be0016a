"""`twofold quantize`: a converted model in 8-bit integers or half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli.groups import Preparation, Quantizing, Running
from converter.cli.options import (
    RUNNING,
    Batch,
    Calib,
    CalibBatch,
    Images,
    Json,
    Original,
    Out,
    Quiet,
    Timing,
)
from converter.cli.outputs import check_outputs
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence, progress_of
from converter.config import QuantizationSettings, Target

__all__ = ["quantize"]


@grouped
def quantize(
    *,
    original: Original,
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="What it was converted to, or the same.")
    ],
    calib: Calib,
    out: Out,
    quantizing: Quantizing,
    preparation: Preparation,
    images: Images = QuantizationSettings.images,
    running: Running,
    batch: Batch = Target.batch,
    calib_batch: CalibBatch = QuantizationSettings.batch,
    memory: Annotated[
        int,
        typer.Option(metavar="MIB", help="Bound on tensors in memory.", rich_help_panel=RUNNING),
    ] = QuantizationSettings.memory_mib,
    timing: Timing = True,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a converted model: --int8, which is taken where none is given, or --fp16."""
    with one_sentence():
        check_outputs([out, json], read=[original, converted, calib])
        chosen = quantizing if quantizing.fp16 else replace(quantizing, int8=True)
        quantized = converter.quantize(
            original,
            converted,
            calib,
            out,
            chosen.settings(images=images, batch=calib_batch, memory_mib=memory),
            preprocessing=preparation.preprocessing(calib, quiet=quiet),
            target=Target(running.runtime(), batch),
            timing=timing,
            progress=progress_of(quiet=quiet),
        )
        from converter.report.console.quantization import print_quantization
        from converter.report.files import write_report

        if json is not None:
            write_report(json, {"format": "twofold-quantization-1", **quantized.to_dict()})
        if not quiet:
            print_quantization(quantized, out)
