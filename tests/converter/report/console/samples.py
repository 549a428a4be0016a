"""Results to print, and consoles to print them to."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from converter.outcome import Conversion, Drop, LayerOutcome, Stage
from converter.outcome import Latency as Timed

LAYER = LayerOutcome(
    name="conv1",
    op="Conv",
    shape=(64, 32, 3, 3),
    activation="relu",
    scheme="sparse + channel",
    ranks=(16,),
    support=8,
    macs_before=18_874_368,
    macs_after=6_291_456,
    params_before=18_496,
    params_after=6_000,
    error=0.0123,
    status="converged",
)
KEPT = replace(
    LAYER,
    name="conv2",
    scheme="kept",
    ranks=(),
    support=0,
    error=None,
    status="",
    reason="depthwise",
)
CONVERSION = Conversion(
    source=Path("in.onnx"),
    out=Path("out.onnx"),
    macs_before=40_000_000,
    macs_after=20_000_000,
    params_before=270_000,
    params_after=135_000,
    layers=(LAYER, KEPT),
    passes=(),
    latency=None,
    stages=(Stage("record", 1.5), Stage("solve", 2.0)),
    notes=("the memory bound halved the patches",),
    settings={},
    calibration={},
    machine={},
    source_digest="",
    out_digest="",
    peak_memory_mib=512.0,
)
TIMED = Timed("cpu", 2, 1, 12.34, 4.111, 3.0, 2.9, 3.1, 4.2)
DROP = Drop("accuracy", 0.42, 0.1, 500)


def wide() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=200, markup=False, highlight=False), stream


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)
