"""A model as it is quantized: in the form for int8, its factors balanced, with the ranges of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from converter.calibration.sets import CalibrationSet
from converter.config import QuantizationSettings, Runtime
from converter.progress import Progress
from converter.quantization.balance import balanced, find_pairs, largest_by_channel
from converter.quantization.integers import quantizable_tensors, ready_for_int8
from converter.quantization.ranges import Ranges, collect_ranges
from converter.quantization.recording import Recording

__all__ = ["Ranged", "find_ranges"]

_BALANCING_WORK = 1e9
"""Responses that the largest of each channel is taken from."""


@dataclass(frozen=True, eq=False)
class Ranged:
    """A model that is ready for int8.

    Attributes
    ----------
    model : onnx.ModelProto
    balanced : int
        Pairs of factors whose channels were scaled to one another.
    ranges : Ranges
        Of its `quantizable_tensors`.
    images : int
        Images that they come from.
    """

    model: onnx.ModelProto
    balanced: int
    ranges: Ranges
    images: int


def find_ranges(
    model: onnx.ModelProto,
    path: Path,
    data: CalibrationSet,
    settings: QuantizationSettings,
    runtime: Runtime,
    progress: Progress,
) -> Ranged:
    """Make a model ready for int8.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    path : Path
        Where it came from, for messages.
    data : CalibrationSet
        Images that ranges are taken from.
    settings : QuantizationSettings
    runtime : Runtime
    progress : Progress

    Raises
    ------
    ModelError, CalibrationError
        Where its opset is too old, or where onnxruntime refuses it or the images.
    SolverError
        Where a tensor becomes NaN or infinite.
    """
    ready = ready_for_int8(model, path)
    pairs = find_pairs(ready)
    if pairs:
        _, recorded = Recording(ready, data, settings, runtime).of(
            [pair.response for pair in pairs], work=_BALANCING_WORK
        )
        ready = balanced(ready, pairs, largest_by_channel(values for _, values in recorded))
    recording = Recording(ready, data, settings, runtime)
    ranges, images = collect_ranges(recording, quantizable_tensors(ready), progress)
    return Ranged(ready, len(pairs), ranges, images)
