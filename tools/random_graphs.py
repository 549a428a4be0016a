"""A hypothesis strategy for random CNN graphs: what exporters write, in combinations that none writes.

Branches, tensors that several nodes read, odd strides, pads, dilations and groups, shared weights, weights
that come from Constant and Identity nodes or are inputs too, outputs in the middle, nodes and weights that
nothing reads, opsets 11 to 23.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MOST_NODES", "OPSETS", "random_graphs"]

OPSETS = range(11, 24)
MOST_NODES = 10
MOST_CHANNELS, MOST_SIDE = 12, 13

Array = NDArray[np.float32]
_T = TypeVar("_T")


@st.composite
def random_graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Draw a valid model with float32 tensors; its weights come from a seed that is drawn too."""
    graph = _Drawn(draw, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    return graph.model()


@dataclass
class _Drawn:
    """A graph that grows node by node; `images` and `vectors` hold tensors by name with their shapes."""

    draw: st.DrawFn
    random: np.random.Generator
    opset: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    listed: list[onnx.ValueInfoProto] = field(default_factory=list)
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    vectors: dict[str, int] = field(default_factory=dict)
    filters: dict[tuple[int, ...], str] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        """Draw all of it."""
        self.opset = self._one_of(*OPSETS)
        batch: int | str = "batch" if self._chance(2) else 2
        inputs = []
        for number in range(self._one_of(1, 1, 1, 2)):
            shape = (self._number(1, 6), self._number(5, MOST_SIDE), self._number(5, MOST_SIDE))
            name = f"image{number}"
            self.images[name] = shape
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape]))
        self._conv()
        for _ in range(self._number(1, MOST_NODES)):
            self._one_of(
                self._conv, self._conv, self._conv, self._activate, self._activate, self._add,
                self._add, self._normalise, self._pool, self._concat, self._scale, self._transposed,
                self._resize, self._pad,
            )()  # fmt: skip
        if self._chance(2):
            self._flatten()
            for _ in range(self._number(1, 3)):
                self._one_of(self._linear, self._linear, self._activate_vector, self._add_vectors)()
        return self._finished(inputs, batch)

    def _finished(self, inputs: list[onnx.ValueInfoProto], batch: int | str) -> onnx.ModelProto:
        given = {value.name for value in inputs}
        made = [name for name in (*self.images, *self.vectors) if name not in given]
        count = self._number(1, min(3, len(made)))
        chosen = {made[-1], *(made[self._number(0, len(made) - 1)] for _ in range(count - 1))}
        outputs = [
            helper.make_tensor_value_info(
                name,
                TensorProto.FLOAT,
                [batch, *(self.images[name] if name in self.images else (self.vectors[name],))],
            )
            for name in made
            if name in chosen
        ]
        if self._chance(6):
            self._constant("unused", self.random.normal(size=3).astype(np.float32))
        graph = helper.make_graph(
            self.nodes, "random", [*inputs, *self.listed], outputs, self.weights
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 11 if self.opset > 21 else 8
        return model

    # Nodes on images ---------------------------------------------------------------------------

    def _conv(self) -> None:
        source, (channels, *sides) = self._image()
        kernel, strides, dilations, pads, out = [], [], [], [], []
        auto = self._one_of("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
        for side in sides:
            tap, dilation = self._one_of(1, 1, 2, 3, 3, 4, 5), self._one_of(1, 1, 1, 2)
            if auto.startswith("SAME"):
                dilation = 1
            before, after = self._one_of(0, 1, 1, 2), self._one_of(0, 1, 1, 2)
            if auto != "NOTSET":
                before = after = 0
            if dilation * (tap - 1) + 1 > side + before + after:
                tap, dilation = 1, 1
            stride = self._one_of(1, 1, 1, 2, 3)
            kernel.append(tap)
            strides.append(stride)
            dilations.append(dilation)
            pads.append((before, after))
            if auto.startswith("SAME"):
                out.append(-(-side // stride))
            else:
                out.append((side + before + after - dilation * (tap - 1) - 1) // stride + 1)
        group = self._one_of(1, 1, 1, 1, *(g for g in (2, 3, channels) if channels % g == 0))
        outputs = group * self._number(1, max(1, MOST_CHANNELS // group))
        shape = (outputs, channels // group, *kernel)
        attributes: dict[str, Any] = {"group": group, "kernel_shape": kernel}
        if self._chance(8):
            del attributes["kernel_shape"]
        if auto == "NOTSET":
            attributes["pads"] = [before for before, _ in pads] + [after for _, after in pads]
        else:
            attributes["auto_pad"] = auto
        attributes |= {"strides": strides, "dilations": dilations}
        operands = [source, self._filter(shape)]
        if self._chance(2):
            operands.append(self._constant("bias", self._normal(outputs)))
        self._image_node("Conv", operands, (outputs, *out), **attributes)

    def _transposed(self) -> None:
        source, (channels, height, width) = self._image()
        if max(height, width) > MOST_SIDE:
            return
        outputs = self._number(1, 6)
        weight = self._constant("weight", self._normal(channels, outputs, 2, 2))
        self._image_node(
            "ConvTranspose", [source, weight], (outputs, 2 * height, 2 * width), strides=[2, 2]
        )

    def _activate(self) -> None:
        source, shape = self._image()
        self.images[self._activation(source)] = shape

    def _normalise(self) -> None:
        source, shape = self._image()
        spread = [1 + 0.3 * self._normal(shape[0]), self._normal(shape[0]), self._normal(shape[0])]
        variance = self.random.uniform(0.5, 2, shape[0]).astype(np.float32)
        operands = [self._constant("norm", each) for each in (*spread, variance)]
        self._image_node("BatchNormalization", [source, *operands], shape, epsilon=1e-3)

    def _add(self) -> None:
        source, shape = self._image()
        same = [name for name, each in self.images.items() if each == shape]
        other = self._one_of(*same)
        if self._chance(4):
            other = self._constant("shift", self._normal(shape[0], 1, 1))
        operands = [source, other] if self._chance(2) else [other, source]
        self._image_node("Add", operands, shape)

    def _scale(self) -> None:
        source, shape = self._image()
        factor = self._constant("factor", 1 + 0.3 * self._normal(shape[0], 1, 1))
        self._image_node(self._one_of("Mul", "Sub"), [source, factor], shape)

    def _concat(self) -> None:
        source, (channels, *sides) = self._image()
        same = [name for name, each in self.images.items() if list(each[1:]) == sides]
        other = self._one_of(*same)
        total = channels + self.images[other][0]
        if total <= 2 * MOST_CHANNELS:
            self._image_node("Concat", [source, other], (total, *sides), axis=1)

    def _pool(self) -> None:
        source, (channels, *sides) = self._image()
        if min(sides) < 2:
            return
        op = self._one_of("MaxPool", "AveragePool")
        out = [(side - 2) // 2 + 1 for side in sides]
        self._image_node(op, [source], (channels, *out), kernel_shape=[2, 2], strides=[2, 2])

    def _resize(self) -> None:
        source, (channels, *sides) = self._image()
        if max(sides) > MOST_SIDE:
            return
        # before opset 13 the region of interest cannot be left out by an empty name everywhere
        region = self._constant("region", np.zeros(0, np.float32))
        scales = self._constant("scales", np.array([1, 1, 2, 2], np.float32))
        self._image_node(
            "Resize", [source, region, scales], (channels, *(2 * side for side in sides)),
            mode="nearest",
        )  # fmt: skip

    def _pad(self) -> None:
        source, (channels, height, width) = self._image()
        pads = self._constant("pads", np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64))
        self._image_node("Pad", [source, pads], (channels, height + 1, width + 1), mode="constant")

    # Nodes on vectors --------------------------------------------------------------------------

    def _flatten(self) -> None:
        source, (channels, height, width) = self._image()
        if channels * height * width > 200 or self._chance(2):
            source = self._node("GlobalAveragePool", [source])
            height = width = 1
        self.vectors[self._node("Flatten", [source])] = channels * height * width

    def _linear(self) -> None:
        source, width = self._vector()
        outputs = self._number(1, 12)
        if self._chance(3):
            weight = self._constant("weight", self._normal(width, outputs))
            self.vectors[self._node("MatMul", [source, weight])] = outputs
            return
        transposed = self._one_of(0, 1)
        shape = (outputs, width) if transposed else (width, outputs)
        operands = [source, self._constant("weight", self._normal(*shape))]
        if self._chance(2):
            operands.append(self._constant("bias", self._normal(outputs)))
        factors = {"alpha": 0.5, "beta": 2.0} if self._chance(4) else {}
        self.vectors[self._node("Gemm", operands, transB=transposed, **factors)] = outputs

    def _activate_vector(self) -> None:
        source, width = self._vector()
        self.vectors[self._activation(source)] = width

    def _add_vectors(self) -> None:
        source, width = self._vector()
        other = self._one_of(*(name for name, each in self.vectors.items() if each == width))
        if self._chance(3):
            other = self._constant("shift", self._normal(width))
        self.vectors[self._node("Add", [source, other])] = width

    # Parts -------------------------------------------------------------------------------------

    def _activation(self, source: str) -> str:
        kind = self._one_of("Relu", "Relu", "LeakyRelu", "Clip", "Silu", "HardSwish", "Tanh")
        if kind == "Clip":
            low, high = (self._constant("bound", np.float32(v)) for v in (0.0, 6.0))
            return self._node("Clip", [source, low, high])
        if kind == "Silu":
            return self._node("Mul", [source, self._node("Sigmoid", [source])])
        if kind == "HardSwish" and self.opset < 14:
            kind = "Relu"
        return self._node(kind, [source], **({"alpha": 0.2} if kind == "LeakyRelu" else {}))

    def _filter(self, shape: tuple[int, ...]) -> str:
        """Give a Conv's weight, sometimes that of an earlier Conv."""
        if shape in self.filters and self._chance(3):
            return self.filters[shape]
        fan = float(np.sqrt(2 / np.prod(shape[1:])))
        self.filters[shape] = self._constant("weight", fan * self._normal(*shape))
        return self.filters[shape]

    def _constant(self, stem: str, value: Array | np.float32 | NDArray[np.int64]) -> str:
        """Store a constant in one of the ways that exporters have."""
        name = f"{stem}{len(self.weights) + len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value), name)
        way = self._number(0, 11)
        if way == 0:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            return name
        self.weights.append(tensor)
        if way == 1:
            self.listed.append(
                helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            )
        if way == 2:
            return self._node("Identity", [name])
        return name

    def _image_node(
        self, op: str, operands: list[str], shape: tuple[int, ...], **attributes: Any
    ) -> None:
        channels, height, width = shape
        self.images[self._node(op, operands, **attributes)] = (channels, height, width)

    def _node(self, op: str, operands: list[str], **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        name = "" if self._chance(6) else f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, operands, [output], name=name, **attributes))
        return output

    def _image(self) -> tuple[str, tuple[int, int, int]]:
        """Choose a tensor, the last ones more often than the others."""
        names = list(self.images)
        name = self._one_of(names[-1], names[-1], *names)
        return name, self.images[name]

    def _vector(self) -> tuple[str, int]:
        names = list(self.vectors)
        name = self._one_of(names[-1], *names)
        return name, self.vectors[name]

    def _normal(self, *shape: int) -> Array:
        return self.random.normal(size=shape).astype(np.float32)

    def _one_of(self, *values: _T) -> _T:
        return self.draw(st.sampled_from(values))

    def _number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def _chance(self, one_in: int) -> bool:
        return self.draw(st.integers(1, one_in)) == one_in
