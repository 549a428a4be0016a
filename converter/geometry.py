"""A layer as it is, before anything becomes of it: its weight and bias, and the shapes that costs need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converter.schemes import Geometry
from passes.layers import Layer

__all__ = ["bias_of", "geometry_of", "weight_of"]


def weight_of(layer: Layer) -> NDArray[np.float32]:
    """Return the weight of a convertible layer, (N, C, *kernel), float32."""
    assert layer.weight is not None, "a convertible layer has a constant weight"
    return np.asarray(layer.weight, dtype=np.float32)


def bias_of(layer: Layer) -> NDArray[np.float32]:
    """Return the bias of a convertible layer, (N,), float32; zeros where it has none."""
    if layer.bias is None:
        return np.zeros(len(weight_of(layer)), np.float32)
    return np.array(layer.bias, dtype=np.float32)


def geometry_of(
    layer: Layer, in_shape: tuple[int, ...], out_shape: tuple[int, ...], fold: int = 1
) -> Geometry:
    """Gather the shapes that costs depend on.

    Parameters
    ----------
    layer : Layer
    in_shape, out_shape : tuple of int
        Spatial shape of its input and its response, as in `Geometry`.
    fold : int, default 1
        How many blocks of these shapes one sample has.
    """
    outputs, channels, *kernel = weight_of(layer).shape
    return Geometry(
        op=layer.op,
        outputs=outputs,
        channels=channels,
        kernel=tuple(kernel),
        in_shape=in_shape,
        out_shape=out_shape,
        bias=layer.bias is not None,
        fold=fold,
    )
