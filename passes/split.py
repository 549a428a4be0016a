"""Replace a layer by its two branches: S on few input channels, and L as a chain of thin factors.

A layer y = W x + b with W ≈ S + L and L = F_k … F_1 becomes

    Conv    x → Gather(kept channels) → Conv(S)            ┐
            x → Conv(F_1) → … → Conv(F_k, + b)             ┴ Add → y
    Gemm    x → Gather → Gemm(S);  x → Gemm(F_1) → … → Gemm(F_k, + that) → y
    MatMul  x → Gather → MatMul(S);  x → MatMul(F_1) → … → MatMul(F_k) → Add(b) → Add → y

The factors of a Conv share out its spatial axes. The one that takes over an axis has the layer's
kernel, stride, pads and dilation along it; along all other axes it is a 1×1 Conv, of stride 1 and
without pads. With C input channels, N outputs, kernel kh×kw and ranks r:

    channel   kh×kw, C→r;  1×1, r→N
    spatial   kh×1, C→r;  1×kw, r→N
    tucker    1×1, C→r₁;  kh×kw, r₁→r₂;  1×1, r₂→N
    depthwise 1×1, C→r;  kh×kw for each channel alone, r→M·r;  1×1, M·r→N

The chain is one Conv whose weight is the product of the factors over the channels between them:
with each axis in one factor only, tap, step and border along it are the layer's own. That holds at
the border too. The layer pads its input with zeros, and a factor without a bias answers zeros with
zeros, so that it is the same to pad behind it, where the factor of that axis does. Therefore no
factor but the last carries the bias. SAME and VALID padding stay attributes: they look at each axis
alone, whose size is the layer's own where its factor stands, and pad nothing where kernel and
stride are 1.

A factor that filters each channel alone is a Conv of as many groups as channels. Where it has several
filters for each, a Concat repeats the channels so often before it: onnxruntime's kernel for such Convs,
and its blocked layout, take one filter to a channel only.

The bias is added once. Where every channel is kept there is no Gather. A 1×1 Conv with a one-hot
weight can select the channels instead, which keeps them in onnxruntime's blocked layout at the
price of its own multiplications. The response keeps its name, so that all that follows stays as it
is.

How onnxruntime takes it (1.32, x86 CPU, default level, read off its optimised graphs): for 2-D
Convs of a fixed image size the Add, and a Relu behind it, become part of one of the two Convs that
feed the Add, S or the last factor, whichever operand comes first. A Conv is in the blocked layout
where its input channels (the last rank for the last factor, the kept ones for S) are a multiple of
4 or below the block of 8 or 16. Where both are, either takes the sum; where one is not, that one
does, and only if it has a bias: hence `_bias_on_sparse`. The factors before the last take no sum;
one outside of the layout costs them reorders only. HardSwish fuses in the blocked layout only, Clip
and LeakyRelu outside of it only; SiLU becomes one node of its own. For 1-D and 3-D Convs, and for
images of a dynamic size beside a Gather, the Add and the activation stay. For Gemm the sum is
Gemm's own third operand, so a Relu fuses as it did before. The sum with a shortcut is another
matter: see `passes.reorder_sums`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.base import Pass, PassError, PassLog
from passes.exchange import origin_of
from passes.layers import Layer
from passes.wiring import fresh_name, names_in, replace_nodes

__all__ = ["Branches", "Factor", "Split"]

Floats = NDArray[np.floating]

_SMALLEST_BLOCK = 8  # of onnxruntime's blocked layout, on AVX2; 16 on AVX-512
_GEMM_WITHOUT_BIAS = 11  # the first opset whose Gemm may lack its third operand
_ROLES = {2: ("down", "up"), 3: ("in", "core", "out")}  # of the factors; of more: by number


@dataclass(frozen=True, eq=False)
class Factor:
    """One Conv, Gemm or MatMul of the chain that is L.

    Attributes
    ----------
    weight : ndarray of shape (out, in, *kernel)
        Along each axis in `axes` of the layer's own kernel length, along all others of length 1;
        (out, in) for Gemm and MatMul.
    axes : tuple of int
        Spatial axes, 0 for the first, along which this factor takes over the layer's kernel,
        stride, pads and dilation; () for none, and for Gemm and MatMul.
    filters : int, default 0
        How many filters each input channel has where these read it alone; the weight is then
        (filters · in, 1, *kernel), one filter of every channel and then the next of each. 0 for a factor that
        reads all channels together.

    Raises
    ------
    ValueError
        Where the weight is no such array or is not finite in float32, or its kernel is longer than
        1 along an axis that is not in `axes`.
    """

    weight: Floats
    axes: tuple[int, ...] = ()
    filters: int = 0

    def __post_init__(self) -> None:
        shape = self.weight.shape
        _require(
            len(shape) >= 2 and 0 not in shape,
            f"a factor of shape {shape} is not (out, in, *kernel) with something in it",
        )
        spatial = range(len(shape) - 2)
        _require(
            set(self.axes) <= set(spatial) and len(set(self.axes)) == len(self.axes),
            f"the axes {self.axes} of a factor of shape {shape} are not some of its "
            f"{len(spatial)} spatial axes, each once",
        )
        for axis in spatial:
            _require(
                axis in self.axes or shape[2 + axis] == 1,
                f"the factor of shape {shape} has a kernel along axis {axis}, "
                f"which is not among its axes {self.axes}",
            )
        _require(
            self.filters == 0
            or (
                len(shape) > 2
                and shape[1] == 1
                and self.filters > 0
                and shape[0] % self.filters == 0
            ),
            f"a factor of shape {shape} is not {self.filters} filters for each of its channels",
        )
        _require_float32(self.weight)


@dataclass(frozen=True, eq=False)
class Branches:
    """What a layer with weight (N, C, *kernel) is replaced by; at least one of S and L.

    Attributes
    ----------
    support : ndarray of shape (s,), dtype int64, or None
        Input channels that S reads, ascending, each once, in [0, C).
    sparse : ndarray of shape (N, s, *kernel) or None
        S on these channels; given exactly where `support` is.
    factors : tuple of Factor
        L, from the input on: C channels into the first and N out of the last, two factors or more,
        and each spatial axis in the `axes` of exactly one, also where the kernel is 1 long. () for
        no such branch.
    bias : ndarray of shape (N,) or None
        The whole bias; None for none.
    select : {"gather", "conv"}
        What selects the channels of S: a Gather, or a 1×1 Conv with a one-hot weight, which is for
        Conv layers only.

    Raises
    ------
    ValueError
        Where shapes do not fit each other, or a number is not finite in float32.
    """

    support: NDArray[np.int64] | None = None
    sparse: Floats | None = None
    factors: tuple[Factor, ...] = ()
    bias: Floats | None = None
    select: Literal["gather", "conv"] = "gather"

    def __post_init__(self) -> None:
        _require(
            (self.support is None) == (self.sparse is None),
            "the sparse branch needs both its support and its weight",
        )
        _require(self.sparse is not None or len(self.factors) > 0, "neither branch is given")
        outputs, kernels = set(), set()
        if self.support is not None and self.sparse is not None:
            _require_support(self.support)
            _require(
                self.sparse.ndim >= 2 and self.sparse.shape[1] == len(self.support),
                f"the sparse weight of shape {self.sparse.shape} does not fit "
                f"a support of {len(self.support)} channels",
            )
            _require_float32(self.sparse)
            outputs.add(len(self.sparse))
            kernels.add(self.sparse.shape[2:])
        if self.factors:
            _require_chain(self.factors)
            outputs.add(len(self.factors[-1].weight))
            kernels.add(_kernel(self.factors))
        if self.bias is not None:
            _require(self.bias.ndim == 1, f"the bias of shape {self.bias.shape} is not a vector")
            _require_float32(self.bias)
            outputs.add(len(self.bias))
        _require(len(outputs) == 1, f"the branches differ in their outputs: {sorted(outputs)}")
        _require(len(kernels) == 1, f"the branches differ in their kernels: {sorted(kernels)}")
        _require(
            self.select == "gather" or (self.select == "conv" and () not in kernels),
            f"nothing selects channels by {self.select!r} here: take 'gather', or 'conv' for a Conv",
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of L, the output channels of all factors but the last; () for no such branch."""
        return tuple(len(factor.weight) for factor in self.factors[:-1])

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


def _require_chain(factors: Sequence[Factor]) -> None:
    _require(len(factors) > 1, "a single factor is no low-rank branch: give two or more")
    _require(
        factors[0].filters == 0,
        "the first factor reads each channel alone: give one before it that reads all",
    )
    for first, second in pairwise(factors):
        reads = len(second.weight) // second.filters if second.filters else second.weight.shape[1]
        _require(
            first.weight.ndim == second.weight.ndim and len(first.weight) == reads,
            f"the factors of shapes {first.weight.shape} and {second.weight.shape} do not chain",
        )
    axes = sorted(axis for factor in factors for axis in factor.axes)
    _require(
        axes == list(range(factors[0].weight.ndim - 2)),
        f"the factors take over the axes {axes}, not each of "
        f"{factors[0].weight.ndim - 2} exactly once",
    )


def _kernel(factors: Sequence[Factor]) -> tuple[int, ...]:
    """Kernel of the whole chain: each length is one factor's, and 1 in all others."""
    kernels = [factor.weight.shape[2:] for factor in factors]
    return tuple(math.prod(lengths) for lengths in zip(*kernels, strict=True))


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
        if self.branches.factors:
            branches.append(f"factors of rank {'×'.join(map(str, self.branches.ranks))}")
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
    if branches.factors:
        weights = [factor.weight for factor in branches.factors]
        _require(
            (len(weights[-1]), weights[0].shape[1]) == (outputs, channels)
            and _kernel(branches.factors) == kernel,
            f"the factors of shapes {', '.join(str(weight.shape) for weight in weights)} "
            f"do not fit {wanted}",
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

    def add(self, op: str, role: str, inputs: Sequence[gs.Tensor], **attrs: Any) -> gs.Tensor:
        """Append a node and return what it writes."""
        name = fresh_name(self._names, f"{self._stem}/{role}")
        output = gs.Variable(fresh_name(self._names, f"{name}_output"))
        self.nodes.append(gs.Node(op, name, attrs=attrs, inputs=list(inputs), outputs=[output]))
        return output

    def kept_channels(self, axis: int) -> gs.Tensor:
        """Return the input, with only the channels of the support where these are not all."""
        support, sparse = self.branches.support, self.branches.sparse
        if support is None or sparse is None or len(support) == self._channels:
            return self.input
        if self.branches.select == "conv":
            one_hot = np.zeros((len(support), self._channels, *[1] * (sparse.ndim - 2)), np.float32)
            one_hot[np.arange(len(support)), support] = 1
            return self.conv("select", self.input, Factor(one_hot))
        indices = self.constant("support", support)
        return self.add("Gather", "gather", [self.input, indices], axis=axis)

    def conv(
        self, role: str, data: gs.Tensor, factor: Factor, bias: Sequence[gs.Tensor] = ()
    ) -> gs.Tensor:
        """Append a Conv that is the layer's along the factor's axes, and a 1×1 one along others."""
        kernel = factor.weight.shape[2:]
        attrs: dict[str, Any] = {"kernel_shape": list(kernel)}
        if "auto_pad" in self.node.attrs:
            attrs["auto_pad"] = self.node.attrs["auto_pad"]
        for name, neutral in (("strides", 1), ("pads", 0), ("dilations", 1)):
            if name in self.node.attrs:
                # Of the pads, those at the beginning of all axes come first, then those at the end.
                attrs[name] = [
                    own if index % len(kernel) in factor.axes else neutral
                    for index, own in enumerate(self.node.attrs[name])
                ]
        if factor.filters:
            attrs["group"] = len(factor.weight)
        if factor.filters > 1:
            data = self.add("Concat", f"{role}/repeat", [data] * factor.filters, axis=1)
        inputs = [data, self.weight(f"{role}/weight", factor.weight), *bias]
        return self.add("Conv", role, inputs, **attrs)

    def gemm(
        self, role: str, data: gs.Tensor, weight: Floats, summand: Sequence[gs.Tensor] = ()
    ) -> gs.Tensor:
        """Append a Gemm; where its opset wants a third operand and there is none, a zero."""
        if not summand and self.opset < _GEMM_WITHOUT_BIAS:
            summand = [self.constant("zero", np.zeros(1, np.float32))]
        inputs = [data, self.weight(f"{role}/weight", weight), *summand]
        return self.add("Gemm", role, inputs, transB=1)

    def matmul(self, role: str, data: gs.Tensor, weight: Floats) -> gs.Tensor:
        """Append a MatMul by the transpose of `weight`."""
        return self.add("MatMul", role, [data, self.weight(f"{role}/weight", weight.T)])

    def chain(self) -> list[tuple[str, Factor]]:
        """Return the factors with their roles, which name their nodes."""
        factors = self.branches.factors
        numbered = tuple(f"factor{number}" for number in range(1, len(factors) + 1))
        return list(zip(_ROLES.get(len(factors), numbered), factors, strict=True))


def _bias_on_sparse(branches: Branches) -> bool:
    """Whether S's Conv adds the bias: alone, or outside of the blocked layout beside L inside."""
    if not branches.factors:
        return True
    return _leaves_layout(branches.kept) and not _leaves_layout(branches.ranks[-1])


def _leaves_layout(channels: int) -> bool:
    return channels > _SMALLEST_BLOCK and channels % 4 != 0


def _split_conv(parts: _Parts) -> None:
    branches = parts.branches
    bias = parts.bias()
    sparse = None
    if branches.sparse is not None:
        whole = Factor(branches.sparse, tuple(range(branches.sparse.ndim - 2)))
        on_sparse, bias = (bias, []) if _bias_on_sparse(branches) else ([], bias)
        sparse = parts.conv("sparse", parts.kept_channels(axis=1), whole, on_sparse)
    if not branches.factors:
        return
    *inner, (role, last) = parts.chain()
    data = parts.input
    for inner_role, factor in inner:
        data = parts.conv(inner_role, data, factor)
    low_rank = parts.conv(role, data, last, bias)
    if sparse is not None:
        parts.add("Add", "sum", [low_rank, sparse])


def _split_gemm(parts: _Parts) -> None:
    branches = parts.branches
    summand: list[gs.Tensor] = list(parts.bias())
    if branches.sparse is not None:
        summand = [parts.gemm("sparse", parts.kept_channels(axis=1), branches.sparse, summand)]
    if branches.factors:
        *inner, (role, last) = parts.chain()
        data = parts.input
        for inner_role, factor in inner:
            data = parts.gemm(inner_role, data, factor.weight)
        parts.gemm(role, data, last.weight, summand)


def _split_matmul(parts: _Parts) -> None:
    branches = parts.branches
    summands = []
    if branches.sparse is not None:
        summands.append(parts.matmul("sparse", parts.kept_channels(axis=-1), branches.sparse))
    if branches.factors:
        data = parts.input
        for role, factor in parts.chain():
            data = parts.matmul(role, data, factor.weight)
        summands.append(data)
    total = summands.pop()
    # The bias right behind a MatMul: onnxruntime makes one Gemm of these two for matrices.
    for bias in parts.bias():
        total = parts.add("Add", "biased", [total, bias])
    for other in summands:
        total = parts.add("Add", "sum", [total, other])
