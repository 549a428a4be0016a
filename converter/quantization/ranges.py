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
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationMethod, HistogramCollector, TensorsData

from converter.errors import SolverError
from converter.progress import Progress
from converter.quantization.recording import Recording

__all__ = ["METHODS", "Ranges", "collect_ranges"]

METHODS = ("min-max", "percentile 99.999", "percentile 99.99", "entropy")
"""Ways to take a range, by name."""

_BINS = 2048
_ENTROPY_BINS = 256
"""Entropy tries every second bin as an end, in Python; with more bins than this it takes minutes."""
_ENTROPY_LEVELS = 128
_WIDER = 4
"""How many times its bins a histogram may grow to: they are as wide as those of the first images, and one
that saw next to nothing there would get millions."""
_WORK = 1e9
"""Values that histograms are made of: a few seconds for each ten networks' worth of 10⁸. Large networks take
fewer images."""


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
        reach = {}
        for name, array in values.items():
            reach[name] = float(np.abs(array).max(initial=0.0))
            if not np.isfinite(reach[name]):
                raise SolverError(
                    f"tensor '{name}' becomes NaN or infinite on the calibration images, so it has no "
                    "range; correct the images' preprocessing, or keep the model in float"
                )
        with redirect_stdout(io.StringIO()):  # the collectors print
            for collector in (self._fine, self._coarse):
                for name, far in reach.items():
                    _widen(collector, name, far)
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


def _widen(collector: Any, name: str, reach: float) -> None:
    """Put a histogram into wider bins where it would get too many to hold what is as far as `reach`."""
    known = collector.histogram_dict.get(name)
    if known is None:
        return
    counts, edges, low, high, threshold = known
    bins = collector.num_bins
    if threshold == 0 or len(counts) * reach / threshold <= _WIDER * bins:
        return
    middles = (edges[:-1] + edges[1:]) / 2
    wider, ends = np.histogram(middles, bins, range=(-reach, reach), weights=counts)
    collector.histogram_dict[name] = (
        wider.astype(counts.dtype),
        ends,
        low,
        high,
        np.asarray(reach, np.float32),
    )


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
    recording: Recording, tensors: Sequence[str], progress: Progress
) -> tuple[Ranges, int]:
    """Collect what some tensors hold on the calibration images.

    Parameters
    ----------
    recording : Recording
    tensors : sequence of str
        Float tensors of its main graph, inputs and outputs among them.
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
    ranges = Ranges(tensors)
    count, batches = recording.of(tensors, work=_WORK)
    with progress.stage("collect ranges", count) as advance:
        for images, values in batches:
            ranges.add(values)
            advance(images)
    return ranges, count
