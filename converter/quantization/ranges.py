"""Ranges of tensors over the calibration images, streamed through the collectors of onnxruntime.

One run of the model feeds all methods: histograms grow batch by batch and nothing else is kept. The
methods are onnxruntime's: the smallest and largest value; two quantiles; and the range of least
Kullback-Leibler divergence between the values and their quantized form (Migacz, GTC 2017).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationMethod, HistogramCollector, TensorsData

from converter.calibration.sets import CalibrationSet, Subset, fixed_batch, padded
from converter.config import Runtime
from converter.errors import SolverError
from converter.progress import Progress
from converter.runtime import model_inputs, open_session, run
from passes.expose import expose

__all__ = ["METHODS", "Ranges", "collect_ranges"]

METHODS = ("min-max", "percentile 99.999", "percentile 99.99", "entropy")
"""Ways to take a range, by name."""

_BINS = 2048
_ENTROPY_BINS = 256
"""Entropy tries every second bin as an end, in Python; with more bins than this it takes minutes."""
_ENTROPY_LEVELS = 128
_WORK = 1e9
"""Values that histograms are made of: a few seconds for each ten networks' worth of 10⁸. Large networks take
fewer images, and 32 at least."""
_LEAST_IMAGES = 32


class Ranges:
    """Histograms of some tensors.

    Parameters
    ----------
    tensors : sequence of str
    """

    def __init__(self, tensors: Sequence[str]) -> None:
        self.tensors = tuple(tensors)
        self._fine = _collector("percentile", _BINS)
        self._coarse = _collector("entropy", _ENTROPY_BINS)

    def add(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Take in one batch.

        Raises
        ------
        SolverError
            Where a value is NaN or infinite: no range could hold it.
        """
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise SolverError(
                    f"tensor '{name}' becomes NaN or infinite on the calibration images, so it has no "
                    "range; correct the images' preprocessing, or keep the model in float"
                )
        with redirect_stdout(io.StringIO()):  # the collectors print
            for collector in (self._fine, self._coarse):
                collector.collect(dict(values))

    def by(self, method: str) -> TensorsData:
        """Give the ranges by one of `METHODS`, as onnxruntime's quantizer takes them."""
        if method == "min-max":
            found = {name: each[2:4] for name, each in self._fine.histogram_dict.items()}
            return TensorsData(CalibrationMethod.MinMax, found)
        with redirect_stdout(io.StringIO()):
            if method == "entropy":
                found = self._coarse.compute_collection_result()
                return TensorsData(CalibrationMethod.Entropy, found)
            self._fine.percentile = float(method.removeprefix("percentile "))
            found = self._fine.compute_collection_result()
            return TensorsData(CalibrationMethod.Percentile, found)


def _collector(method: str, bins: int) -> Any:
    return HistogramCollector(
        method=method,
        symmetric=False,
        num_bins=bins,
        num_quantized_bins=_ENTROPY_LEVELS,
        percentile=99.999,
        scenario="same",
    )


def collect_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    data: CalibrationSet,
    runtime: Runtime,
    *,
    batch: int,
    memory_mib: int,
    progress: Progress,
) -> tuple[Ranges, int]:
    """Run a model on the calibration images and collect what its tensors hold.

    Parameters
    ----------
    model : onnx.ModelProto
        It is not changed.
    tensors : sequence of str
        Float tensors of its main graph, inputs and outputs among them.
    data : CalibrationSet
    runtime : Runtime
    batch : int
        Images that run at once at most; a model with a fixed batch overrides it.
    memory_mib : int
        Bound on the tensors of one batch, in MiB.
    progress : Progress

    Returns
    -------
    tuple of (Ranges, int)
        The ranges, and how many images they come from.

    Raises
    ------
    SolverError
        Where a tensor becomes NaN or infinite.
    ModelError, CalibrationError
        Where onnxruntime refuses the model or the images.
    """
    inputs = model_inputs(model)
    fed = {each.name for each in inputs}
    inner = [name for name in tensors if name not in fed]
    label = "the converted model"
    session = open_session(expose(model, inner), runtime, spinning=False, label=label)
    fixed = fixed_batch(inputs)

    def values(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = dict(zip(inner, run(session, inner, feeds, label=label), strict=True))
        return found | {name: feed for name, feed in feeds.items() if name in tensors}

    first = next(iter(data.batches(fixed or 1)))
    one = values((padded(first, fixed) if fixed else first).feeds)
    elements = sum(array.size for array in one.values()) / (fixed or 1)
    wanted = max(_LEAST_IMAGES, int(_WORK / max(elements, 1.0)))
    if wanted < len(data):
        data = Subset(data, wanted)
    # histograms copy a batch and count it in a wider type
    together = max(1, min(batch, int(memory_mib * 2**20 / (16 * max(elements, 1.0)))))
    ranges = Ranges(tensors)
    with progress.stage("collect ranges", len(data)) as advance:
        for given in data.batches(fixed or together):
            ranges.add(values((padded(given, fixed) if fixed else given).feeds))
            advance(given.count)
    return ranges, len(data)
