"""Replace a layer by its two branches: S on few input channels, and L of low rank.

A layer y = W x + b with W ≈ S + L becomes

    Conv    x → Gather(kept channels) → Conv(S)            ┐
            x → Conv(down, kh×kw, C→r) → Conv(up, 1×1, r→N) ┴ Add → y
    Gemm    x → Gather → Gemm(S);  x → Gemm(down) → Gemm(up, + that) → y
    MatMul  x → Gather → MatMul(S);  x → MatMul(down) → MatMul(up) → Add(b) → Add → y

The bias is added once. Where every channel is kept there is no Gather. The response keeps its name,
so that all that follows stays as it is.

How onnxruntime takes it (1.32, x86 CPU, default level, read off its optimised graphs): for 2-D
Convs of a fixed image size the Add, and a Relu behind it, become part of one of the two Convs that
feed the Add, whichever operand comes first. A Conv is in the blocked layout where its input
channels (r for the 1×1 Conv, the kept ones for S) are a multiple of 4 or below the block of 8 or
16. Where both are, either takes the sum; where one is not, that one does, and only if it has a
bias: hence `_bias_on_sparse`. HardSwish fuses in the blocked layout only, Clip and LeakyRelu
outside of it only; SiLU becomes one node of its own. For 1-D and 3-D Convs, and for images of a
dynamic size beside a Gather, the Add and the activation stay. For Gemm the sum is Gemm's own third
operand, so a Relu fuses as it did before. The sum with a shortcut is another matter: see
`passes.reorder_sums`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.base import Pass, PassError, PassLog
from passes.exchange import origin_of
from passes.layers import Layer
from passes.wiring import fresh_name, names_in, replace_nodes

__all__ = ["Branches", "Split"]

Floats = NDArray[np.floating]

_SMALLEST_BLOCK = 8  # of onnxruntime's blocked layout, on AVX2; 16 on AVX-512
_GEMM_WITHOUT_BIAS = 11  # the first opset whose Gemm may lack its third operand


@dataclass(frozen=True, eq=False)
class Branches:
    """What a layer with weight (N, C, *kernel) is replaced by; at least one of S and L.

    Attributes
    ----------
    support : ndarray of shape (s,), dtype int64, or None
        Input channels that S reads, ascending, each once, in [0, C).
    sparse : ndarray of shape (N, s, *kernel) or None
        S on these channels; given exactly where `support` is.
    down : ndarray of shape (r, C, *kernel) or None
        First factor of L.
    up : ndarray of shape (N, r) or None
        Second factor of L; given exactly where `down` is.
    bias : ndarray of shape (N,) or None
        The whole bias; None for none.

    Raises
    ------
    ValueError
        Where shapes do not fit each other, or a number is not finite in float32.
    """

    support: NDArray[np.int64] | None = None
    sparse: Floats | None = None
    down: Floats | None = None
    up: Floats | None = None
    bias: Floats | None = None

    def __post_init__(self) -> None:
        _require(
            (self.support is None) == (self.sparse is None),
            "the sparse branch needs both its support and its weight",
        )
        _require((self.down is None) == (self.up is None), "the low-rank branch needs both factors")
        _require(self.sparse is not None or self.down is not None, "neither branch is given")
        outputs = set()
        if self.support is not None and self.sparse is not None:
            _require_support(self.support)
            _require(
                self.sparse.ndim >= 2 and self.sparse.shape[1] == len(self.support),
                f"the sparse weight of shape {self.sparse.shape} does not fit "
                f"a support of {len(self.support)} channels",
            )
            outputs.add(len(self.sparse))
        if self.down is not None and self.up is not None:
            _require(
                self.up.ndim == 2
                and self.down.ndim >= 2
                and len(self.down) == self.up.shape[1] > 0,
                f"the factors of shapes {self.down.shape} and {self.up.shape} do not chain",
            )
            outputs.add(len(self.up))
        if self.sparse is not None and self.down is not None:
            _require(
                self.sparse.shape[2:] == self.down.shape[2:],
                f"the kernels {self.sparse.shape[2:]} and {self.down.shape[2:]} differ",
            )
        if self.bias is not None:
            _require(self.bias.ndim == 1, f"the bias of shape {self.bias.shape} is not a vector")
            outputs.add(len(self.bias))
        _require(len(outputs) == 1, f"the branches differ in their outputs: {sorted(outputs)}")
        for array in (self.sparse, self.down, self.up, self.bias):
            if array is not None:
                _require_float32(array)

    @property
    def rank(self) -> int:
        """Rank of L; 0 where there is no such branch."""
        return 0 if self.down is None else len(self.down)

    @property
    def kept(self) -> int:
        """How many input channels S reads; 0 where there is no such branch."""
        return 0 if self.support is None else len(self.support)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_support(support: NDArray[np.int64]) -> None:
    _require(
        support.dtype == np.int64 and support.ndim == 1 and len(support) > 0,
        f"the support is {support.dtype} of shape {support.shape}, not a list of int64",
    )
    _require(
        bool(support[0] >= 0 and np.all(np.diff(support) > 0)),
        "the support does not name channels in ascending order, each once",
    )


def _require_float32(array: Floats) -> None:
    _require(array.dtype.kind == "f", f"a weight is {array.dtype}, not a floating-point array")
    largest = float(np.finfo(np.float32).max)
    _require(bool(np.all(np.abs(array) <= largest)), "a weight is not finite in float32")


class Split(Pass):
    """Replace one layer by its branches; its old weight and bias go when nothing else reads them.

    Parameters
    ----------
    layer : Layer
        From `find_layers` on the graph that the pass will run on, without a reason.
    branches : Branches
        Its new weights; they are stored in float32, with denormal numbers as exact zeros.

    Raises
    ------
    ValueError
        Where the layer cannot be converted, or the branches do not fit it.
    """

    name = "split"

    def __init__(self, layer: Layer, branches: Branches) -> None:
        _require(
            layer.reason is None and layer.weight is not None,
            f"layer {layer.name!r} cannot be converted: {layer.reason}",
        )
        assert layer.weight is not None  # for the type checker; required just above
        outputs, channels, *kernel = layer.weight.shape
        _require_fit(layer.name, branches, outputs, channels, tuple(kernel))
        self.layer = layer
        self.branches = branches
        self._channels = channels

    def requires(self, graph: gs.Graph) -> None:
        """Raise `PassError` where the graph does not have the layer."""
        _layer_nodes(graph, self.layer)

    def rewrite(self, graph: gs.Graph, log: PassLog) -> None:
        """Put the branches in the place of the layer."""
        old = _layer_nodes(graph, self.layer)
        node, response = old[0], old[-1].outputs[0]
        overridable = origin_of(graph).overridable
        lost = [t.name for each in old for t in each.inputs if t.name in overridable]
        parts = _Parts(
            node, self.layer, self.branches, self._channels, graph.opset, names_in(graph)
        )
        {"Conv": _split_conv, "Gemm": _split_gemm, "MatMul": _split_matmul}[node.op](parts)
        replace_nodes(graph, old, parts.nodes)
        parts.nodes[-1].outputs = [response]
        what = f"{self.layer.op} became {self._summary()}"
        if lost:
            what += f"; the model no longer has the input {', '.join(lost)}"
        log.changed(self.layer.name, what)

    def ensures(self, graph: gs.Graph) -> None:
        """Raise `PassError` where the response is not written exactly once."""
        writers = [n for n in graph.nodes for t in n.outputs if t.name == self.layer.response]
        if len(writers) != 1:
            raise PassError(
                f"{self.layer.response!r} is written {len(writers)} times after a split"
            )

    def _summary(self) -> str:
        branches = []
        if self.branches.kept:
            branches.append(f"a sparse branch of {self.branches.kept} of {self._channels} channels")
        if self.branches.rank:
            branches.append(f"a branch of rank {self.branches.rank}")
        return " and ".join(branches)


def _require_fit(
    name: str, branches: Branches, outputs: int, channels: int, kernel: tuple[int, ...]
) -> None:
    wanted = f"layer {name!r} of shape {(outputs, channels, *kernel)}"
    if branches.support is not None and branches.sparse is not None:
        _require(
            int(branches.support[-1]) < channels
            and branches.sparse.shape == (outputs, len(branches.support), *kernel),
            f"the sparse branch of shape {branches.sparse.shape} does not fit {wanted}",
        )
    if branches.down is not None and branches.up is not None:
        _require(
            branches.down.shape[1:] == (channels, *kernel) and len(branches.up) == outputs,
            f"the factors of shapes {branches.down.shape} and {branches.up.shape} do not fit "
            f"{wanted}",
        )


def _layer_nodes(graph: gs.Graph, layer: Layer) -> list[gs.Node]:
    """Return the layer's node, and the Add of its bias where that is a node of its own."""
    wanted = [layer.output] if layer.output == layer.response else [layer.output, layer.response]
    writers = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    nodes = [writers.get(name) for name in wanted]
    if nodes[0] is None or nodes[0].op != layer.op or nodes[-1] is None:
        raise PassError(f"the graph has no {layer.op} {layer.name!r} that writes {layer.output!r}")
    return nodes


class _Parts:
    """Makes the nodes and constants of one split, with names that are new to the whole graph."""

    def __init__(
        self,
        node: gs.Node,
        layer: Layer,
        branches: Branches,
        channels: int,
        opset: int,
        names: set[str],
    ) -> None:
        self.node = node
        self.input = node.inputs[0]
        self.branches = branches
        self.opset = opset
        self._stem = layer.name
        self._channels = channels
        self._names = names
        self.nodes: list[gs.Node] = []

    def constant(self, role: str, values: NDArray[np.generic]) -> gs.Constant:
        return gs.Constant(fresh_name(self._names, f"{self._stem}/{role}"), values)

    def weight(self, role: str, values: Floats) -> gs.Constant:
        """Make a float32 constant; denormal numbers, which slow a Conv many times, become 0."""
        with np.errstate(under="ignore"):
            stored = np.ascontiguousarray(values, dtype=np.float32)
        tiny = np.abs(stored) < np.finfo(np.float32).tiny
        return self.constant(role, np.where(tiny, np.float32(0), stored))

    def bias(self) -> list[gs.Constant]:
        """Operands that add the bias to a Conv or Gemm: one or none."""
        return [] if self.branches.bias is None else [self.weight("bias", self.branches.bias)]

    def gemm_summand(self, given: Sequence[gs.Tensor]) -> list[gs.Tensor]:
        """Third operand of a Gemm: `given`, or a zero where the opset wants one at all."""
        if given or self.opset >= _GEMM_WITHOUT_BIAS:
            return list(given)
        return [self.constant("zero", np.zeros(1, np.float32))]

    def add(self, op: str, role: str, inputs: Sequence[gs.Tensor], **attrs: Any) -> gs.Tensor:
        """Append a node and return what it writes."""
        name = fresh_name(self._names, f"{self._stem}/{role}")
        output = gs.Variable(fresh_name(self._names, f"{name}_output"))
        self.nodes.append(gs.Node(op, name, attrs=attrs, inputs=list(inputs), outputs=[output]))
        return output

    def kept_channels(self, axis: int) -> gs.Tensor:
        """Return the input, with only the channels of the support where these are not all."""
        support = self.branches.support
        if support is None or len(support) == self._channels:
            return self.input
        indices = self.constant("support", support)
        return self.add("Gather", "gather", [self.input, indices], axis=axis)


def _bias_on_sparse(branches: Branches) -> bool:
    """Whether S's Conv adds the bias: alone, or outside of the blocked layout beside L inside."""
    if branches.rank == 0:
        return True
    return _leaves_layout(branches.kept) and not _leaves_layout(branches.rank)


def _leaves_layout(channels: int) -> bool:
    return channels > _SMALLEST_BLOCK and channels % 4 != 0


def _split_conv(parts: _Parts) -> None:
    branches = parts.branches
    spatial: dict[str, Any] = {
        name: value for name, value in parts.node.attrs.items() if name != "group"
    }
    bias = parts.bias()
    sparse = None
    if branches.sparse is not None:
        inputs = [parts.kept_channels(axis=1), parts.weight("sparse/weight", branches.sparse)]
        if _bias_on_sparse(branches):
            inputs, bias = [*inputs, *bias], []
        sparse = parts.add("Conv", "sparse", inputs, **spatial)
    if branches.down is None or branches.up is None:
        return
    down_weight = parts.weight("down/weight", branches.down)
    down = parts.add("Conv", "down", [parts.input, down_weight], **spatial)
    axes = branches.down.ndim - 2
    up_weight = parts.weight("up/weight", branches.up.reshape(*branches.up.shape, *[1] * axes))
    up = parts.add("Conv", "up", [down, up_weight, *bias], kernel_shape=[1] * axes)
    if sparse is not None:
        parts.add("Add", "sum", [up, sparse])


def _split_gemm(parts: _Parts) -> None:
    branches = parts.branches
    summand: list[gs.Tensor] = list(parts.bias())
    if branches.sparse is not None:
        inputs = [parts.kept_channels(axis=1), parts.weight("sparse/weight", branches.sparse)]
        sparse = parts.add("Gemm", "sparse", [*inputs, *parts.gemm_summand(summand)], transB=1)
        summand = [sparse]
    if branches.down is not None and branches.up is not None:
        inputs = [parts.input, parts.weight("down/weight", branches.down)]
        down = parts.add("Gemm", "down", [*inputs, *parts.gemm_summand([])], transB=1)
        inputs = [down, parts.weight("up/weight", branches.up)]
        parts.add("Gemm", "up", [*inputs, *parts.gemm_summand(summand)], transB=1)


def _split_matmul(parts: _Parts) -> None:
    branches = parts.branches
    summands = []
    if branches.sparse is not None:
        inputs = [parts.kept_channels(axis=-1), parts.weight("sparse/weight", branches.sparse.T)]
        summands.append(parts.add("MatMul", "sparse", inputs))
    if branches.down is not None and branches.up is not None:
        down_weight = parts.weight("down/weight", branches.down.T)
        down = parts.add("MatMul", "down", [parts.input, down_weight])
        inputs = [down, parts.weight("up/weight", branches.up.T)]
        summands.append(parts.add("MatMul", "up", inputs))
    total = summands.pop()
    # The bias right behind a MatMul: onnxruntime makes one Gemm of these two for matrices.
    for bias in parts.bias():
        total = parts.add("Add", "biased", [total, bias])
    for other in summands:
        total = parts.add("Add", "sum", [total, other])
