"""Give a layer another dense weight and bias; its name, its place and what it reads and writes stay."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.base import PassLog
from passes.layers import Layer
from passes.split import Branches, Split

__all__ = ["Densify"]


class Densify(Split):
    """A split into one branch that reads every channel, under the layer's own name.

    Parameters
    ----------
    layer : Layer
        From `find_layers` on the graph that the pass will run on, without a reason.
    weight : ndarray of shape (N, C, *kernel), or (N, C) for Gemm and MatMul
    bias : ndarray of shape (N,) or None
        The whole bias.

    Raises
    ------
    ValueError
        Where the layer cannot be converted, or the weight does not fit it.
    """

    name = "densify"

    def __init__(
        self, layer: Layer, weight: NDArray[np.floating], bias: NDArray[np.floating] | None
    ) -> None:
        every = np.arange(weight.shape[1], dtype=np.int64)
        super().__init__(layer, Branches(support=every, sparse=weight, bias=bias))

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Put the weight in the place of the old one."""
        super().rewrite(graph, log)
        for node in graph.nodes:
            if node.op == self.layer.op and node.name == f"{self.layer.name}/sparse":
                node.name = self.layer.name

    def _summary(self) -> str:
        return "the same with another weight"
