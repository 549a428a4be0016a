"""A layer's tensors to rows: what it reads and answers at sampled positions, a row for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from converter.errors import CalibrationError
from passes.layers import Layer
from passes.windows import padding, spans_of

__all__ = [
    "Floats",
    "ResponseShape",
    "Tensors",
    "bytes_of",
    "patch_chunks",
    "response_shape",
    "rows_at",
    "shape_for_each",
]

Floats: TypeAlias = NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, NDArray[Any]]

CHUNK_BYTES = 2**26  # patches that are gathered at once


def bytes_of(tensors: Tensors) -> int:
    """Return the bytes of some tensors together."""
    return sum(int(array.nbytes) for array in tensors.values())


@dataclass(frozen=True)
class ResponseShape:
    """Shape of a response: `fold` blocks of `spatial` positions for each image, N outputs."""

    fold: int
    spatial: tuple[int, ...]
    out_shape: tuple[int, ...]
    outputs: int

    @property
    def positions(self) -> int:
        """Positions of one image."""
        return self.fold * math.prod(self.spatial)


def response_shape(layer: Layer, response: NDArray[Any], fed: int) -> ResponseShape:
    """Read the shape of a response to `fed` images; raise where it has no such shape."""
    found = shape_for_each(layer, response.shape, fed)
    if found is None:
        raise CalibrationError(
            f"the response of layer {layer.name!r} has the shape {response.shape} for {fed} "
            "images, which is not the same number of positions for each of them; leave the layer "
            "out of the conversion"
        )
    return found


def shape_for_each(layer: Layer, shape: tuple[int, ...], fed: int) -> ResponseShape | None:
    """Read the shape of a response to `fed` images; None where it is not the same for each of them."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    conv = layer.op == "Conv"
    blocks, outputs = (shape[0], shape[1]) if conv else (math.prod(shape[:-1]), shape[-1])
    if math.prod(shape) == 0 or blocks % fed or outputs != len(layer.weight):
        return None
    spatial = shape[2:] if conv else ()
    return ResponseShape(blocks // fed, spatial, spatial if conv else shape[1:-1], outputs)


def _blocks(op: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """Bring a tensor of a layer to (blocks, channels, positions)."""
    shape = tensor.shape
    if op == "Conv":
        return tensor.reshape(shape[0], shape[1], math.prod(shape[2:]))
    return tensor.reshape(math.prod(shape[:-1]), shape[-1], 1)


def rows_at(
    op: str,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    fed: int,
    part: slice = slice(None),
) -> NDArray[Any]:
    """Return the channels at positions (images, per) of a batch, (images · per, channels)."""
    blocks = _blocks(op, tensor)
    size = blocks.shape[2]
    fold = len(blocks) // fed
    images = np.repeat(np.arange(len(positions)), positions.shape[1])[part]
    flat = positions.reshape(-1)[part]
    rows: NDArray[Any] = blocks[images * fold + flat // size, :, flat % size]
    return rows


def patch_chunks(
    layer: Layer,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    fed: int,
    out_shape: tuple[int, ...],
) -> Iterator[tuple[slice, Floats]]:
    """Give the patches at positions (images, per) of a batch, so many at once as fit into a chunk."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    step = max(1, CHUNK_BYTES // (4 * math.prod(layer.weight.shape[1:])))
    for start in range(0, positions.size, step):
        part = slice(start, min(start + step, positions.size))
        yield part, _gather(layer, tensor, positions, part, fed, out_shape)


def _gather(
    layer: Layer,
    tensor: NDArray[Any],
    positions: NDArray[np.int64],
    part: slice,
    fed: int,
    out_shape: tuple[int, ...],
) -> Floats:
    """Return the patches of some of the positions of a batch, (rows, D)."""
    assert layer.weight is not None, "listed layers that can be converted have a weight"
    if layer.op != "Conv":
        return rows_at(layer.op, tensor, positions, fed, part)
    per = positions.shape[1]
    flat = positions.reshape(-1)[part]
    images = np.arange(part.start, part.stop) // per
    fold = len(tensor) // fed
    patches = np.empty((len(flat), math.prod(layer.weight.shape[1:])), np.float32)
    # as many images at once as fit into a chunk: one at a time, small images took longer than their network
    together = max(1, CHUNK_BYTES // max(1, fold * tensor[0].nbytes))
    for first in range(images[0], images[-1] + 1, together):
        low, high = np.searchsorted(images, (first, first + together))
        block = tensor[first * fold : (first + together) * fold]
        places = flat[low:high] + (images[low:high] - first) * fold * math.prod(out_shape)
        patches[low:high] = _conv_patches(layer, block, places, out_shape)
    return patches


def _conv_patches(
    layer: Layer,
    block: NDArray[Any],
    flat: NDArray[np.int64],
    out_shape: tuple[int, ...],
) -> NDArray[Any]:
    """Return the patches of some images, (rows, D).

    Parameters
    ----------
    layer : Layer
        A Conv.
    block : ndarray of shape (images · fold, C, *spatial)
        Its input for these images.
    flat : ndarray of shape (rows,), int64
        Flat positions in (images · fold, *out_shape).
    out_shape : tuple of int
        Spatial shape of the response.
    """
    assert layer.weight is not None, "required where the recording starts"
    kernel = layer.weight.shape[2:]
    spans = spans_of(kernel, layer.dilations)
    pads = padding(layer.auto_pad, layer.pads, block.shape[2:], spans, layer.strides)
    if any(before or after for before, after in pads):
        block = np.pad(block, [(0, 0), (0, 0), *pads])
    sides = zip(block.shape[2:], spans, layer.strides, strict=True)
    found = tuple((side - span) // stride + 1 for side, span, stride in sides)
    if found != out_shape:
        raise ValueError(
            f"layer {layer.name!r} has responses of shape {found}, its sample of {out_shape}"
        )
    axes = tuple(range(2, block.ndim))
    windows = sliding_window_view(block, tuple(spans), axis=axes)
    taps: tuple[Any, ...] = (
        Ellipsis,
        *(slice(None, None, dilation) for dilation in layer.dilations),
    )
    fold, *places = np.unravel_index(flat, (len(block), *out_shape))
    starts = [place * stride for place, stride in zip(places, layer.strides, strict=True)]
    chosen: tuple[Any, ...] = (fold, slice(None), *starts)
    patches: NDArray[Any] = windows[taps][chosen]  # (rows, C, *kernel)
    return patches.reshape(len(flat), -1)
