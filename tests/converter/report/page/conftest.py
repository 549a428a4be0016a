"""Reports as they are saved, for pages to be made of."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from converter.front import Front, FrontPoint, Verified
from converter.gates import GateResult
from converter.latency import Speedup, Timing
from converter.outcome import Answers, Conversion, Drop, LayerOutcome, Stage
from converter.outcome import Latency as Timed
from converter.quantization.quantizing import Alone, InTurns, Quantized
from converter.quantization.search import LeftInFloat, Trial
from converter.report.files import report_text
from converter.solver.solution import Iteration
from converter.validation.findings import (
    Accuracy,
    Agreement,
    Latency,
    OutputComparison,
    Size,
    Validation,
)
from converter.worst import WorstImage
from passes.base import Change, PassResult, Skip

TRACE = tuple(
    Iteration(step, 100.0 / (step + 1), 50.0 / (step + 1), 0.5, 10.0, 16, 8, 0.01)
    for step in range(120)
)
LAYER = LayerOutcome(
    name="/block1/conv1/Conv",
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
    effect=0.0004,
    status="iteration limit",
    iterations=120,
    seconds=1.25,
    trace=TRACE,
    ms_before=2.5,
    ms_after=0.9,
)
SPATIAL = replace(
    LAYER,
    name="/block2/conv2/Conv",
    scheme="spatial",
    support=0,
    macs_after=9_000_000,
    error=0.0004,
    trace=(),
    status="closed form",
    ms_after=1.4,
)
KEPT = replace(
    SPATIAL,
    name="/head/Gemm",
    scheme="kept",
    ranks=(),
    macs_after=LAYER.macs_before,
    error=None,
    reason="depthwise",
    ms_before=None,
    ms_after=None,
)
POINTS = tuple(
    FrontPoint(effect, gain, gain, 12.0 / gain, gain, {})
    for effect, gain in ((0.0, 1.0), (0.001, 1.5), (0.01, 2.0), (0.05, 3.0), (0.3, 5.0))
)
DIGEST = "ab" * 32
RUN = Conversion(
    source=Path("models/net.onnx"),
    out=Path("models/fast.onnx"),
    macs_before=40_000_000,
    macs_after=10_000_000,
    params_before=270_000,
    params_after=90_000,
    layers=(LAYER, SPATIAL, KEPT),
    passes=(
        PassResult(
            "fold-batch-norm", (Change("bn", "folded"),), (Skip("bn2", "its weights are shared"),)
        ),
    ),
    latency=Timed("cpu", 2, 32, 12.34, 4.111, 3.0, 2.9, 3.1, 4.2),
    stages=(Stage("record", 1.5), Stage("fit layers", 2.0)),
    notes=("the memory bound halved the patches",),
    settings={"budget": {"macs": 4.0}, "target": {"batch": 32}},
    calibration={"data": "200 images of calib", "digest": "cd" * 32},
    machine={"processor": "a processor", "cores": 2},
    source_digest=DIGEST,
    out_digest="ef" * 32,
    peak_memory_mib=512.0,
    front=POINTS,
    planned=FrontPoint(0.012, 3.5, 2.5, 4.2, 2.86, {}),
)
QUANTIZED = Quantized(
    model=onnx.ModelProto(),
    shipped=True,
    precision="int8",
    types="u8 × s8",
    ranges="percentile 99.99",
    layers=5,
    balanced=2,
    left=(LeftInFloat(("/block1/conv1/Conv/core", "/block1/conv1/Conv/out"), 0.2),),
    trials=(Trial("u8 × s8, min-max", 0, 0.002, 0.985, 0.4),),
    before=Answers(0.0091, 0.96, 100),
    after=Answers(0.012, 0.955, 100),
    images=1800,
    held_out=200,
    bytes_before=3 * 2**20,
    bytes_after=2**20,
    latency=InTurns(
        *("cpu", 1, 32, 12.3, 4.1, 1.6), Speedup(7.7, 7.5, 7.9), Speedup(2.56, 2.5, 2.6)
    ),
    alone=Alone(Answers(0.003, 0.99, 100), 2 * 2**20, 2.4, Speedup(1.5, 1.4, 1.6)),
    notes=("ranges were taken from 1800 of 2000 images, which is enough",),
)
TIMING = Timing(4.0, 3.9, 4.1, 100, (4.0,), 1, "cpu", 2, spinning=True, settled=True)
SIZE = Size(9 * 2**20, 270_000, 40_000_000, (), "models/net.onnx", DIGEST)


def _picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def _saved(report: Any) -> dict[str, Any]:
    """Return what is in the JSON file of a report."""
    content: dict[str, Any] = json.loads(report_text(report.to_dict()))
    return content


@pytest.fixture
def run() -> dict[str, Any]:
    return _saved(RUN)


@pytest.fixture
def quantized() -> dict[str, Any]:
    """A conversion whose model was written in int8."""
    return _saved(replace(RUN, quantization=QUANTIZED.to_dict()))


@pytest.fixture
def kept_only() -> dict[str, Any]:
    return _saved(replace(RUN, layers=(KEPT,), latency=None, front=(), planned=None))


@pytest.fixture
def large() -> dict[str, Any]:
    """A conversion of 150 layers."""
    layers = [
        replace(
            each, name=f"/stage{index // 10}/layer{index}/Conv", macs_before=10**6 * (index + 1)
        )
        for index, each in enumerate((LAYER, SPATIAL, KEPT) * 50)
    ]
    return _saved(replace(RUN, layers=tuple(layers)))


@pytest.fixture
def front() -> dict[str, Any]:
    done = Verified(RUN.latency, 3.4, 2.4, Drop("accuracy", 0.42, 0.1, 500))
    return _saved(
        Front(
            source=Path("models/net.onnx"),
            points=(*POINTS[:3], replace(POINTS[3], verified=done), POINTS[4]),
            judged_on="500 images of val",
            stages=(),
            notes=(),
            settings={},
            calibration={},
            machine={},
            source_digest=DIGEST,
        )
    )


@pytest.fixture
def validation() -> dict[str, Any]:
    return _saved(
        Validation(
            images=5000,
            outputs=(
                OutputComparison(
                    "logits", 10, 0.5, 0.1, 0.05, 0.4, 20.0, 0.025, 0.01, 0.2, None, 0, 0
                ),
            ),
            agreement=Agreement("logits", 0.97, 0.999),
            accuracy=Accuracy(5000, 0.879, 0.874, 0.5, 0.2, 35, 10),
            latencies=(
                Latency(1, TIMING, replace(TIMING, median_ms=2.0), Speedup(2.0, 1.9, 2.1)),
                Latency(32, TIMING, replace(TIMING, median_ms=1.0), Speedup(3.9, 3.8, 4.0)),
            ),
            original=SIZE,
            converted=replace(
                SIZE, bytes=2**20, params=90_000, file="models/fast.onnx", digest="ef" * 32
            ),
            data="5000 images of val",
            class_names=("cat", "dog"),
            worst=(
                WorstImage(7, 0, 1, 0, 0.71, "val/cat/0007.jpg", _picture()),
                WorstImage(9, 1, -1, None, None),
            ),
        )
    )


@pytest.fixture(scope="session")
def judged() -> Callable[..., dict[str, Any]]:
    """Make what `check` writes: one gate that holds and one that does not, and the comparison."""

    def verdict(validation: dict[str, Any] | None = None, keep: int = 2) -> dict[str, Any]:
        gates = [
            GateResult("min_speedup", 1.8, 3.0, "passed", "", "fast enough"),
            GateResult("max_accuracy_drop", 0.1, 0.5, "failed", "points", "too much"),
        ]
        return {
            "format": "twofold-verdict-1",
            "gates": [each.to_dict() for each in gates[:keep]],
            "validation": validation or {},
        }

    return verdict
