"""What is recorded of a layer, and how it is gathered batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.moments import Moments
from converter.calibration.patches import (
    Floats,
    ResponseShape,
    Tensors,
    patch_chunks,
    response_shape,
    rows_at,
)
from converter.errors import CalibrationError
from passes.layers import Layer

__all__ = ["Draw", "Fed", "Inputs", "PatchGatherer", "Sample", "TargetGatherer", "require_finite"]


@dataclass(frozen=True, eq=False)
class Sample:
    """Where the patches of a layer are sampled, and what the original model did there.

    Attributes
    ----------
    positions : ndarray of shape (images, per), int64
        Flat positions in the response of each image, in [0, P), ascending, each once.
    out_shape : tuple of int
        Spatial shape of the response; () for Gemm; for MatMul the axes between the batch and the
        last one.
    target : ndarray of shape (n, N), float32
        The original's tensor before the activation: the response, plus the shortcut where the
        layer has one. n = images · per, image by image.
    mean : ndarray of shape (N,), float64
        Mean of the layer's own response, without the shortcut, over the sample.
    covariance : ndarray of shape (N, N), float64
        Its covariance over the sample, E[(y − mean)(y − mean)ᵀ].
    """

    positions: NDArray[np.int64]
    out_shape: tuple[int, ...]
    target: Floats
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def joined(self, following: Sample) -> Sample:
        """Return the sample of these images and those that follow; neither part is changed."""
        moments = self._moments().joined(following._moments())
        return Sample(
            np.concatenate([self.positions, following.positions]),
            self.out_shape,
            np.concatenate([self.target, following.target]),
            moments.mean,
            moments.covariance,
        )

    def _moments(self) -> Moments:
        count = len(self.target)
        return Moments(count, self.mean, self.covariance * count)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer reads at the positions of its sample, in the graph as converted so far.

    Attributes
    ----------
    features : ndarray of shape (n, D), float32
        Patches, flattened as the weight is (C, *kernel).
    offset : ndarray of shape (n, N), float32, or None
        The shortcut that is added to the response; None where the layer has none.
    """

    features: Floats
    offset: Floats | None


@dataclass(frozen=True, eq=False)
class Fed:
    """Tensors of one batch of `fed` images, of which the first `count` are real."""

    tensors: Tensors
    count: int
    fed: int


@dataclass(frozen=True, eq=False)
class Draw:
    """Where the patches of a layer are sampled, before anything is recorded there."""

    geometry: ResponseShape
    positions: NDArray[np.int64]  # (images, per)

    @property
    def nbytes(self) -> int:
        """Bytes that the sample will hold."""
        outputs = self.geometry.outputs
        return self.positions.nbytes + 4 * self.positions.size * outputs + 8 * outputs**2


class TargetGatherer:
    """Gathers the sample of one layer, batch by batch."""

    def __init__(self, layer: Layer, draw: Draw) -> None:
        self.layer = layer
        self._geometry = draw.geometry
        self._positions = draw.positions
        self._target: Floats = np.empty((draw.positions.size, draw.geometry.outputs), np.float32)
        self._moments = Moments.none(draw.geometry.outputs)
        self._done = 0

    def add(self, tensors: Tensors, batch: Fed, first: int, index: int) -> None:
        """Take the positions of the next images, from number `first` on, out of the batch's tensors."""
        layer = self.layer
        response = tensors[layer.response]
        if response_shape(layer, response, batch.fed) != self._geometry:
            raise CalibrationError(
                f"layer {layer.name!r} answers with other shapes in batch {index} than before; "
                "give samples of one size, or leave the layer out of the conversion"
            )
        positions = self._positions[self._done :][: batch.count]
        rows = rows_at(layer.op, response, positions, batch.fed)
        require_finite(rows, layer, "response", index, first, batch.count)
        self._moments.add(rows)
        if layer.shortcut is not None:
            shortcut = rows_at(layer.op, tensors[layer.shortcut], positions, batch.fed)
            require_finite(shortcut, layer, "shortcut", index, first, batch.count)
            rows = rows + shortcut
        per = positions.shape[1]
        self._target[self._done * per :][: len(rows)] = rows
        self._done += batch.count

    def sample(self) -> Sample:
        """Return what was gathered."""
        mean, covariance = self._moments.mean, self._moments.covariance
        return Sample(self._positions, self._geometry.out_shape, self._target, mean, covariance)


class PatchGatherer:
    """Gathers the inputs of one layer, batch by batch."""

    def __init__(self, layer: Layer, sample: Sample) -> None:
        if layer.weight is None or layer.group != 1:
            raise ValueError(f"layer {layer.name!r} cannot be converted: {layer.reason}")
        self._layer = layer
        self._sample = sample
        columns = math.prod(layer.weight.shape[1:])
        self._out: Floats = np.empty((len(sample.target), columns), np.float32)
        self._offset: Floats | None = None
        if layer.shortcut is not None:
            self._offset = np.empty_like(sample.target)

    @property
    def wanted(self) -> list[str]:
        """Tensors that are recorded from."""
        layer = self._layer
        return [layer.input] if layer.shortcut is None else [layer.input, layer.shortcut]

    def add(self, tensors: Tensors, batch: Fed, first: int, index: int) -> None:
        """Take the positions of the images from `first` on out of the batch's tensors."""
        layer = self._layer
        positions = self._sample.positions[first : first + batch.count]
        per = positions.shape[1]
        span = slice(first * per, (first + batch.count) * per)
        place = (layer, index, first, batch.count)
        features = self._out[span]
        out_shape = self._sample.out_shape
        for part, patches in patch_chunks(
            layer, tensors[layer.input], positions, batch.fed, out_shape
        ):
            require_finite(patches, layer, "input", *place[1:])
            features[part] = patches
        if layer.shortcut is not None and self._offset is not None:
            rows = rows_at(layer.op, tensors[layer.shortcut], positions, batch.fed)
            require_finite(rows, layer, "shortcut", *place[1:])
            self._offset[span] = rows

    def inputs(self) -> Inputs:
        """Return what was gathered."""
        return Inputs(self._out, self._offset)


def require_finite(
    values: NDArray[Any], layer: Layer, what: str, index: int, first: int, count: int
) -> None:
    """Refuse values of images `first` on that are NaN or infinite."""
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"the {what} of layer {layer.name!r} is NaN or infinite in batch {index} of the "
            f"calibration set (samples {first} to {first + count - 1}); check the preprocessing "
            "and these samples, or leave the layer out of the conversion"
        )
