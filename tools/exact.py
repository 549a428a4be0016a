"""Branches that equal a layer: they separate mistakes in the surgery from errors of an approximation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle, islice

import numpy as np
import onnx
from numpy.typing import NDArray

from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Factor, Split

__all__ = ["exact_branches", "exact_factors", "in_rotation", "split_all"]

SCHEMES = ("channel", "spatial", "depthwise", "tucker")


def split_all(
    model: onnx.ModelProto, make: Callable[[Layer], Branches]
) -> tuple[onnx.ModelProto, list[Layer]]:
    """Replace every layer that can be converted by what `make` gives; return also which ones."""
    graph = import_graph(model)
    run_passes(graph, (*normalising(), FoldBatchNorm()))
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    for layer in layers:
        Split(layer, make(layer))(graph)
    return export_model(graph, model), layers


def in_rotation(way: str, start: int = 0) -> Callable[[Layer], Branches]:
    """Make exact branches, of one Conv after another by all the schemes, so that these meet."""
    schemes = islice(cycle(SCHEMES), start, None)
    # An identity of Gemm's channels, as for "tucker", would fill the memory.
    return lambda layer: exact_branches(
        layer, way, next(schemes) if layer.op == "Conv" else "channel"
    )


def exact_branches(layer: Layer, way: str, scheme: str = "channel", seed: int = 0) -> Branches:
    """Give branches that together are the layer's weight itself, up to float32.

    Ways: "sparse" (all channels in S), "low rank" (full rank), "parts" (half of the channels in S,
    the others in L), "overlap" (S is noise on half of the channels, and L what is missing).
    Schemes of L: see `exact_factors`.
    """
    assert layer.weight is not None
    weight = layer.weight.astype(np.float64)
    channels = weight.shape[1]
    if way == "sparse":
        return Branches(support=np.arange(channels), sparse=weight, bias=layer.bias)
    support = sparse = None
    rest = weight
    if way != "low rank":
        rng = np.random.default_rng(seed)
        support = np.sort(rng.permutation(channels)[: (channels + 1) // 2]).astype(np.int64)
        sparse = weight[:, support]
        if way == "overlap":
            sparse = rng.normal(size=sparse.shape) * weight.std()
        rest = weight.copy()
        rest[:, support] -= sparse
    return Branches(support, sparse, exact_factors(rest, scheme, seed), layer.bias)


def exact_factors(weight: NDArray[np.float64], scheme: str, seed: int = 0) -> tuple[Factor, ...]:
    """Give factors of full rank whose product is `weight`, (N, C, *kernel).

    "channel": all axes in the first of two; "spatial": the first half of the axes in the first of
    two, the others in the second; "tucker": all axes in the middle one of three; "depthwise": the
    same, with a filter for each tap of each channel.
    """
    outputs, channels, *kernel = weight.shape
    if scheme == "tucker":
        rng = np.random.default_rng(seed)
        into, out = rng.permutation(channels), rng.permutation(outputs)
        return (
            Factor(padded(np.eye(channels)[into], weight.ndim)),
            Factor(weight[out][:, into], tuple(range(len(kernel)))),
            Factor(padded(np.eye(outputs)[:, out], weight.ndim)),
        )
    if scheme == "depthwise" and kernel:
        into, taps = np.random.default_rng(seed).permutation(channels), math.prod(kernel)
        each_tap = np.repeat(
            np.eye(taps), channels, 0
        )  # the first tap of all channels, then the next
        by_tap = weight.reshape(outputs, channels, taps)[:, into].swapaxes(1, 2)
        return (
            Factor(padded(np.eye(channels)[into], weight.ndim)),
            Factor(each_tap.reshape(-1, 1, *kernel), tuple(range(len(kernel))), taps),
            Factor(padded(by_tap.reshape(outputs, -1), weight.ndim)),
        )
    cut = len(kernel) // 2 if scheme == "spatial" else len(kernel)
    first, second = kernel[:cut], kernel[cut:]
    kernel_last = np.moveaxis(weight.reshape(outputs, channels, *first, -1), -1, 1)
    left, right = full_rank_factors(kernel_last.reshape(outputs * math.prod(second), -1), seed)
    up = np.moveaxis(left.reshape(outputs, *second, -1), -1, 1)  # (N, r, *second)
    return (
        Factor(padded(right.reshape(-1, channels, *first), weight.ndim), tuple(range(cut))),
        Factor(up.reshape(*up.shape[:2], *[1] * cut, *second), tuple(range(cut, len(kernel)))),
    )


def padded(array: NDArray[np.float64], axes: int) -> NDArray[np.float64]:
    """Give the array axes of length 1 behind its own, `axes` in all."""
    return array.reshape(*array.shape, *[1] * (axes - array.ndim))


def full_rank_factors(
    matrix: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give factors (N, r) and (r, D) with r = min(N, D): U S and Vᵀ, or for large ones W Q and Qᵀ.

    Q is a reflection: LAPACK takes its time with large matrices, most of all on busy cores.
    """
    if matrix.size <= 1 << 14:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left * values, right
    rank = min(matrix.shape)
    normal = np.random.default_rng(seed).normal(size=rank)
    normal /= np.linalg.norm(normal)
    mixing = np.eye(rank) - 2 * np.outer(normal, normal)
    if rank == len(matrix):
        return mixing, matrix - 2 * np.outer(normal, normal @ matrix)
    return matrix - 2 * np.outer(matrix @ normal, normal), mixing
