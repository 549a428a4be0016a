"""Whose a node of the optimised graph is.

Nodes are counted to layers by the names of the tensors that they write. onnxruntime names a node in the
blocked layout after such a tensor; a reorder into or out of that layout belongs to the layers that read its
result, since one of them asked for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import onnx

from converter.planner.milliseconds.profiling import Profile
from passes.layers import Layer

__all__ = ["Owners", "by_layer"]

_REORDERS = ("ReorderInput", "ReorderOutput")
_FUSED = "fused "
"""What onnxruntime puts before the name of a Gemm with an activation in it."""


def by_layer(profile: Profile, layers: Sequence[Layer], overhead: float) -> dict[str, float]:
    """Milliseconds of each layer that has a node in the profile, without an overhead for each."""
    owners = Owners(layers)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in profile.graph.node:
        for name in node.input:
            readers[name].append(node)
    times: dict[str, float] = defaultdict(float)
    for node in profile.graph.node:
        if node.name not in profile.nodes:
            continue
        whose = [owners.of_node(node)]
        if node.op_type in _REORDERS:
            inside = owners.inside(node.input[0]) or owners.inside(node.output[0])
            asked = [owners.of_node(each) for name in node.output for each in readers[name]]
            whose = [inside] if inside else list(dict.fromkeys(asked))
        if None in whose:  # also where something besides the layers needs a reorder
            continue
        for name in whose:
            times[str(name)] += max(profile.nodes[node.name] - overhead, 0.0) / len(whose)
    return dict(times)


class Owners:
    """Which layer a tensor or node of a model belongs to, however the layer is written."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._named: dict[str, str] = {}
        self._stems = {layer.name for layer in layers}
        for layer in layers:
            for tensor in (layer.output, layer.response, layer.sum, layer.activated):
                if tensor:
                    self._named[tensor] = layer.name

    def of_node(self, node: onnx.NodeProto) -> str | None:
        """Name the layer of a node, by what it writes or by the name that onnxruntime gave it.

        A Gemm takes any activation after it into itself, and then writes what that wrote.
        """
        name = node.name.removeprefix(_FUSED).removesuffix("_nchwc")
        if name in self._stems:
            return name
        written = [name, *node.output]
        found = (self._named.get(name) or self.inside(name) for name in written)
        return next(filter(None, found), None)

    def inside(self, tensor: str) -> str | None:
        """Name the layer whose branches alone use a tensor: they are named after it."""
        stem = tensor
        while stem:
            stem = stem.rpartition("/")[0]
            if stem in self._stems:
                return stem
        return None
