"""An ONNX network as a differentiable function in torch, node by node.

One small function for each operator, in a table by operator type. What an operator or an attribute
means follows the ONNX specification at the model's opset, and onnxruntime where the two differ.
An operator that is not in the table is refused by name, when the graph is built.

torch is imported where it is used: it takes seconds to load, and nothing but the fits needs it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from converter.errors import CalibrationError, ConverterError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TorchGraph", "UnsupportedOperatorError"]

_FIRST_OPSET = 7  # before it, Add and its like broadcast by attributes


class UnsupportedOperatorError(ConverterError):
    """An operator, or a form of one, whose gradient is not available here; exit code 3."""

    exit_code: ClassVar[int] = 3


class TorchGraph:
    """An ONNX network that runs in torch, in float32, and can be differentiated.

    Every floating-point type of the model becomes float32; integers and booleans stay. Whatever
    follows from constants alone is computed once, when the graph is built. Weights share the
    memory of what `onnx.numpy_helper` gives where the device and the type allow it, but for those of
    2-D convolutions on the CPU, which are laid out anew; none of them tracks a gradient but those in
    `trained`, which are copies.

    Parameters
    ----------
    model : onnx.ModelProto
        A valid model of opset 7 or later with its weights in memory; it is not changed.
    device : str, default "cpu"
        torch device: "cpu", "cuda" or "cuda:N". On CUDA, torch's own switches say whether
        convolutions may use TF32.
    outputs : sequence of str or None, default None
        Tensors to compute, inner ones allowed; None takes the outputs of the model. Nodes that
        none of them needs are left out and may be of any operator.
    trained : collection of str, default ()
        Floating-point weights whose gradients are wanted.
    scaled : mapping of str to int, default {}
        Floating-point weights that stay, but for a factor on each of their slices along an axis, whose
        gradients are wanted.

    Attributes
    ----------
    parameters : dict of str to Tensor
        The weights in `trained` and the factors of those in `scaled`, by the weights' names, float32, as
        leaves that track gradients. They may be changed in place. Factors are 1 at first and have the rank
        of their weight.

    Raises
    ------
    UnsupportedOperatorError
        Where an operator, one of its attributes, or the opset is not supported.
    ModelError
        Where a weight is in a file that was not loaded.
    ValueError
        Where an output is neither an input, nor a weight, nor written by a node, or where a trained
        weight is none that the outputs need.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        device: str = "cpu",
        outputs: Sequence[str] | None = None,
        trained: Collection[str] = (),
        scaled: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        graph = model.graph
        opset = _opset_of(model)
        wanted = [value.name for value in graph.output] if outputs is None else list(outputs)
        nodes = _needed_nodes(graph.node, wanted)
        used = set(wanted).union(*(node.input for node in nodes))
        for sparse in graph.sparse_initializer:
            if sparse.values.name in used:
                raise UnsupportedOperatorError(
                    f"the sparse weight '{sparse.values.name}' has no dense form; "
                    "export the model with dense weights"
                )
        self.outputs = tuple(dict.fromkeys(wanted))
        self.device = device
        self._constants = {
            tensor.name: _as_tensor(tensor, device)
            for tensor in graph.initializer
            if tensor.name in used
        }
        if device == "cpu":
            self._constants.update(_channels_last(nodes, self._constants))
        self.parameters: dict[str, Tensor] = {}
        self._scaled = tuple(scaled)
        for name in (*trained, *scaled):
            if name not in self._constants or not self._constants[name].is_floating_point():
                raise ValueError(f"{name!r} is no weight that can be trained; name others")
            weight = self._constants[name].detach()
            values = _factors(weight, scaled[name]) if name in scaled else weight.clone()
            self.parameters[name] = values.requires_grad_()
        self._constants.update({name: self.parameters[name] for name in trained})
        self.inputs = tuple(
            value.name
            for value in graph.input
            if value.name in used and value.name not in self._constants
        )
        steps = self._folded([_step(node, opset, device) for node in nodes])
        self._written = {name for step in steps for name in step.outputs if name}
        known = self._written.union(self.inputs, self._constants)
        for name in self.outputs:
            if name not in known:
                raise ValueError(f"the model has no tensor {name!r}; name one that it computes")
        _require_single_outputs(steps, self.outputs)
        self._steps = _with_releases(steps, keep={*self.outputs, *self._constants})

    def _folded(self, steps: Iterable[_Step]) -> list[_Step]:
        """Compute what follows from constants alone, and return the other steps."""
        rest = []
        for step in steps:
            constant = all(name in self._constants for name in step.inputs if name)
            if constant and self.parameters.keys().isdisjoint(step.inputs):
                self._constants.update(step.apply(self._constants))
            else:
                rest.append(step)
        return rest

    def forward(
        self, feeds: Mapping[str, Tensor], taps: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the network once.

        A tensor is let go after its last reader; what gradients need, autograd keeps.

        Parameters
        ----------
        feeds : mapping of str to Tensor
            One tensor for each of `inputs`; more are ignored.
        taps : collection of str, default ()
            Tensors that nodes write, to be returned as well. Gradients with respect to them can
            be asked for (`torch.autograd.grad`), even where no input tracks any; integers excepted.

        Returns
        -------
        outputs : dict of str to Tensor
            One for each of `self.outputs`.
        tapped : dict of str to Tensor
            One for each of `taps`.

        Raises
        ------
        CalibrationError
            Where an input is not fed.
        ModelError
            Where torch cannot run a node, as with sizes that do not fit.
        UnsupportedOperatorError
            Where a node asks, by a computed operand, for something that is not supported.
        ValueError
            Where no node writes a tap.
        """
        for name in taps:
            if name not in self._written and name not in self._constants:
                raise ValueError(f"no node writes the tensor {name!r}; tap one that is computed")
        values = {**self._constants, **self._products(), **self._fed(feeds)}
        tapped = {name: _trackable(values[name]) for name in taps if name in values}
        values.update(tapped)
        for step in self._steps:
            for name, value in step.apply(values).items():
                if name in taps:
                    value = tapped[name] = _trackable(value)
                values[name] = value
            for name in step.released:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}, {name: tapped[name] for name in taps}

    def activation_bytes(self, feeds: Mapping[str, Tensor]) -> int:
        """Return the bytes of all that the nodes write in one run on `feeds`.

        That bounds what a run keeps for its gradients, but for what operators keep inside.

        Raises
        ------
        CalibrationError, ModelError, UnsupportedOperatorError
            As `forward`.
        """
        import torch

        total = 0
        values = {**self._constants, **self._products(), **self._fed(feeds)}
        with torch.no_grad():
            for step in self._steps:
                written = step.apply(values)
                total += sum(value.numel() * value.element_size() for value in written.values())
                values.update(written)
                for name in step.released:
                    values.pop(name, None)
        return total

    def _products(self) -> dict[str, Tensor]:
        return {name: self._constants[name] * self.parameters[name] for name in self._scaled}

    def _fed(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise CalibrationError(
                f"the model's input '{missing[0]}' is not fed; give an array for each input"
            )
        return {name: _single(feeds[name].to(self.device)) for name in self.inputs}


# ---- the graph


@dataclass(frozen=True, eq=False)
class _Step:
    """One node, ready to run."""

    op: str
    label: str
    opset: int
    device: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    operator: Operator
    released: tuple[str, ...] = ()

    def apply(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on the named tensors; return what is written, by name."""
        operands = [values[name] if name else None for name in self.inputs]
        try:
            result = self.operator(self, *operands)
        except (RuntimeError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{self.op} node '{self.label}' does not run in torch: {reason}; check the sizes "
                "of the model's inputs"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        # Operators return what is asked for first; the rest is known not to be read.
        return {name: value for name, value in zip(self.outputs, results, strict=False) if name}

    def refuse(self, what: str) -> UnsupportedOperatorError:
        """Return the error for a form of the operator that is not supported."""
        return UnsupportedOperatorError(
            f"{self.op} node '{self.label}' {what}, which has no differentiable form here; "
            "export the model without it"
        )

    def whole(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return int(self.attributes.get(name, default))

    def wholes(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """Return an attribute that lists integers."""
        return [int(value) for value in self.attributes.get(name, default)]

    def number(self, name: str, default: float) -> float:
        """Return a floating-point attribute."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """Return a text attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def axes(self, operand: Tensor | None, name: str = "axes") -> list[int] | None:
        """Return a list that newer opsets give as an operand and older ones as an attribute."""
        if operand is not None:
            return _wholes(operand)
        return self.wholes(name) if name in self.attributes else None


Operator = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _channels_last(
    nodes: Iterable[onnx.NodeProto], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Lay the weights of 2-D convolutions out as torch's kernels for CPUs read and write images.

    Their results, and so what follows, then lie alike: a step of training takes a half to two thirds
    of the time. Values and shapes are the same.
    """
    import torch

    weights = [node.input[1] for node in nodes if node.op_type == "Conv" and len(node.input) > 1]
    return {
        name: constants[name].contiguous(memory_format=torch.channels_last)
        for name in weights
        if name in constants and constants[name].ndim == 4
    }


def _factors(weight: Tensor, axis: int) -> Tensor:
    import torch

    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return torch.ones(shape, device=weight.device)


def _opset_of(model: onnx.ModelProto) -> int:
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    opset = versions[0] if versions else 1
    if opset < _FIRST_OPSET:
        raise UnsupportedOperatorError(
            f"the model has opset {opset}, below {_FIRST_OPSET}; export it with opset 13 or later"
        )
    return opset


def _needed_nodes(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    wanted = set(outputs)
    needed = []
    for node in reversed(nodes):  # topological order: readers come after writers
        if not wanted.isdisjoint(name for name in node.output if name):
            needed.append(node)
            wanted.update(name for name in node.input if name)
    return needed[::-1]


def _step(node: onnx.NodeProto, opset: int, device: str) -> _Step:
    label = node.name or next((name for name in node.output if name), node.op_type)
    operator = _OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        raise UnsupportedOperatorError(
            f"the operator {kind} of node '{label}' has no differentiable form here; "
            "export the model with standard operators of convolutional networks"
        )
    step = _Step(
        op=node.op_type,
        label=label,
        opset=opset,
        device=device,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes={each.name: onnx.helper.get_attribute_value(each) for each in node.attribute},
        operator=operator,
    )
    for name, supported in _SUPPORTED.get(node.op_type, {}).items():
        given = step.attributes.get(name)
        given = given.decode() if isinstance(given, bytes) else given
        if given is not None and given not in supported:
            raise step.refuse(f"has {name} = {given}")
    return step


def _require_single_outputs(steps: Sequence[_Step], outputs: Collection[str]) -> None:
    """Refuse what reads the mask of a Dropout, the indices of a MaxPool, and their like."""
    read = set(outputs).union(*(step.inputs for step in steps))
    for step in steps:
        extra = [] if step.op == "Split" else [name for name in step.outputs[1:] if name in read]
        if extra:
            raise step.refuse(f"writes the further output '{extra[0]}'")


def _with_releases(steps: Sequence[_Step], keep: Collection[str]) -> list[_Step]:
    """Note with each step which tensors nothing reads after it."""
    later = set(keep)
    result = []
    for step in reversed(steps):
        names = dict.fromkeys(name for name in (*step.inputs, *step.outputs) if name)
        result.append(replace(step, released=tuple(name for name in names if name not in later)))
        later.update(names)
    return result[::-1]


def _as_tensor(stored: onnx.TensorProto, device: str) -> Tensor:
    if uses_external_data(stored):
        raise ModelError(
            f"the weight '{stored.name}' is in a file that was not loaded; load the model with it"
        )
    return _from_array(numpy_helper.to_array(stored), stored.name, device)


def _from_array(array: NDArray[Any], name: str, device: str) -> Tensor:
    import torch

    if array.dtype.kind in "OSU":
        raise UnsupportedOperatorError(
            f"the constant '{name}' holds text, which has no differentiable form; export without it"
        )
    if array.dtype.kind not in "biu":  # float16, float64, and bfloat16, which is no numpy kind
        array = array.astype(np.float32, copy=False)
    with warnings.catch_warnings():
        # The memory belongs to bytes and cannot be written to; nothing here writes to a constant.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _trackable(value: Tensor) -> Tensor:
    """Return the same values as a tensor of its own, whose gradient can be asked for."""
    if not value.is_floating_point():
        return value
    # A view sets it apart from its other names: Identity hands on the very same tensor.
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def _wholes(operand: Tensor) -> list[int]:
    return [int(value) for value in operand.flatten().tolist()]


def _index(positions: Sequence[int] | NDArray[np.integer], like: Tensor) -> Tensor:
    import torch

    return torch.as_tensor(np.asarray(positions, dtype=np.int64), device=like.device)


# ---- convolution and matrix products


def _spatial(step: _Step, x: Tensor) -> int:
    """Return the number of spatial axes, which torch knows from 1 to 3 of."""
    count = x.ndim - 2
    if not 1 <= count <= 3:
        raise step.refuse(f"has {count} spatial axes")
    return count


def _per_axis(step: _Step, name: str, count: int) -> list[int]:
    return step.wholes(name) or [1] * count


def _pads(
    step: _Step, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is padded before and after each spatial axis; a span is a dilated kernel's."""
    way = step.text("auto_pad", "NOTSET")
    if way == "NOTSET":
        flat = step.wholes("pads") or [0] * (2 * len(sizes))
        return list(zip(flat[: len(sizes)], flat[len(sizes) :], strict=True))
    if way == "VALID":
        return [(0, 0)] * len(sizes)
    pads = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if way == "SAME_UPPER" else (more, less))
    return pads


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad, or crop where negative, the last axes of x."""
    from torch.nn import functional

    if not any(map(any, pads)):
        return x
    return functional.pad(x, [size for pair in reversed(pads) for size in pair], value=value)


def _spans(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def _conv(step: _Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    strides, dilations = _per_axis(step, "strides", count), _per_axis(step, "dilations", count)
    pads = _pads(step, x.shape[2:], _spans(weight.shape[2:], dilations), strides)
    native = all(before == after >= 0 for before, after in pads)
    convolve = getattr(functional, f"conv{count}d")
    result: Tensor = convolve(
        x if native else _padded(x, pads),
        weight,
        bias,
        stride=strides,
        padding=[before for before, _ in pads] if native else 0,
        dilation=dilations,
        groups=step.whole("group", 1),
    )
    return result


def _conv_transpose(step: _Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    strides, dilations = _per_axis(step, "strides", count), _per_axis(step, "dilations", count)
    more = step.wholes("output_padding") or [0] * count
    convolve = getattr(functional, f"conv_transpose{count}d")
    full: Tensor = convolve(
        x, weight, None, stride=strides, groups=step.whole("group", 1), dilation=dilations
    )
    sizes = [size + extra for size, extra in zip(full.shape[2:], more, strict=True)]
    # Cropping the full result takes any pads; torch's own argument takes symmetric ones alone.
    pads = _transpose_pads(step, x.shape[2:], sizes, strides)
    ends = [(-before, extra - after) for (before, after), extra in zip(pads, more, strict=True)]
    result = _padded(full, ends)
    return result if bias is None else result + bias.reshape(-1, *[1] * count)


def _transpose_pads(
    step: _Step, inputs: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is cropped of a full transposed convolution of `sizes`."""
    way = step.text("auto_pad", "NOTSET")
    wanted = step.wholes("output_shape")[-len(inputs) :]
    if not wanted and way in ("NOTSET", "VALID"):
        return _pads(step, inputs, sizes, strides)
    wanted = wanted or [size * stride for size, stride in zip(inputs, strides, strict=True)]
    pads = []
    for size, target in zip(sizes, wanted, strict=True):
        total = size - target
        if total < 0:
            raise step.refuse(f"asks for an output of {target}, above the full {size}")
        less, more = total // 2, total - total // 2
        pads.append((less, more) if way == "SAME_UPPER" else (more, less))
    return pads


def _gemm(step: _Step, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if step.whole("transA", 0) else a
    b = b.T if step.whole("transB", 0) else b
    product = a @ b
    alpha, beta = step.number("alpha", 1.0), step.number("beta", 1.0)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


# ---- normalisation


def _batch_normalization(
    step: _Step, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    from torch.nn import functional

    epsilon = step.number("epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def _instance_normalization(step: _Step, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    axes = list(range(2, x.ndim))
    shape = (-1, *[1] * len(axes))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True) + step.number("epsilon", 1e-5)
    return centred * variance.rsqrt() * scale.reshape(shape) + bias.reshape(shape)


def _layer_normalization(
    step: _Step, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    first = step.whole("axis", -1) % x.ndim
    axes = list(range(first, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True) + step.number("epsilon", 1e-5)
    result = centred * variance.rsqrt() * scale
    return result if bias is None else result + bias


def _lrn(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    size = step.whole("size", 1)
    before = (size - 1) // 2
    squares = x.square().reshape(len(x), 1, x.shape[1], -1)
    squares = _padded(squares, [(before, size - 1 - before), (0, 0)])
    mean = functional.avg_pool2d(squares, (size, 1), stride=1).reshape(x.shape)
    scale = step.number("bias", 1.0) + step.number("alpha", 1e-4) * mean
    return x * scale.pow(-step.number("beta", 0.75))


# ---- activations


def _method(name: str) -> Operator:
    """Make an operator of a method of Tensor."""

    def apply(step: _Step, x: Tensor) -> Tensor:
        del step
        result: Tensor = getattr(x, name)()
        return result

    return apply


def _clip(step: _Step, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if step.opset < 11:
        return x.clamp(step.number("min", -math.inf), step.number("max", math.inf))
    return x if low is None and high is None else x.clamp(low, high)


def _leaky_relu(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.leaky_relu(x, step.number("alpha", 0.01))


def _prelu(step: _Step, x: Tensor, slope: Tensor) -> Tensor:
    del step
    return (x * slope).where(x < 0, x)


def _elu(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.elu(x, step.number("alpha", 1.0))


def _softplus(step: _Step, x: Tensor) -> Tensor:
    del step
    return x.logaddexp(x.new_zeros(()))


def _mish(step: _Step, x: Tensor) -> Tensor:
    return x * _softplus(step, x).tanh()


def _hard_sigmoid(step: _Step, x: Tensor) -> Tensor:
    return (step.number("alpha", 0.2) * x + step.number("beta", 0.5)).clamp(0.0, 1.0)


def _hard_swish(step: _Step, x: Tensor) -> Tensor:
    del step
    return x * (x / 6.0 + 0.5).clamp(0.0, 1.0)


def _gelu(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.gelu(x, approximate=step.text("approximate", "none"))


def _softmax(step: _Step, x: Tensor) -> Tensor:
    if step.opset >= 13:
        return x.softmax(step.whole("axis", -1))
    return _matrix(x, step.whole("axis", 1)).softmax(1).reshape(x.shape)


def _log_softmax(step: _Step, x: Tensor) -> Tensor:
    if step.opset >= 13:
        return x.log_softmax(step.whole("axis", -1))
    return _matrix(x, step.whole("axis", 1)).log_softmax(1).reshape(x.shape)


def _matrix(x: Tensor, axis: int) -> Tensor:
    """Flatten the axes before `axis`, and those from it on."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


# ---- pooling


def _pool_pads(
    step: _Step, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the pads, and how much further a last, partial window reaches under ceil_mode."""
    spans = _spans(kernel, _per_axis(step, "dilations", len(sizes)))
    pads = _pads(step, sizes, spans, strides)
    if not step.whole("ceil_mode", 0) or step.text("auto_pad", "NOTSET") != "NOTSET":
        return pads, [0] * len(sizes)
    further = []
    for size, (before, after), span, stride in zip(sizes, pads, spans, strides, strict=True):
        length = before + size + after
        windows = -(-(length - span) // stride) + 1
        if (windows - 1) * stride >= before + size:  # it would see nothing but padding
            windows -= 1
        further.append(max((windows - 1) * stride + span - length, 0))
    return pads, further


def _extended(pads: Sequence[tuple[int, int]], further: Sequence[int]) -> list[tuple[int, int]]:
    return [(before, after + more) for (before, after), more in zip(pads, further, strict=True)]


def _max_pool(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    kernel, strides = step.wholes("kernel_shape"), _per_axis(step, "strides", count)
    pads = _extended(*_pool_pads(step, x.shape[2:], kernel, strides))
    native = all(
        before == after and 2 * before <= size
        for (before, after), size in zip(pads, kernel, strict=True)
    )
    pool = getattr(functional, f"max_pool{count}d")
    result: Tensor = pool(
        x if native else _padded(x, pads, -math.inf),
        kernel,
        strides,
        padding=[before for before, _ in pads] if native else 0,
        dilation=_per_axis(step, "dilations", count),
    )
    return result


def _average_pool(step: _Step, x: Tensor) -> Tensor:
    from torch.nn import functional

    count = _spatial(step, x)
    kernel, strides = step.wholes("kernel_shape"), _per_axis(step, "strides", count)
    if set(_per_axis(step, "dilations", count)) != {1}:
        raise step.refuse("has dilations")
    pads, further = _pool_pads(step, x.shape[2:], kernel, strides)
    pool = getattr(functional, f"avg_pool{count}d")
    mean: Tensor = pool(_padded(x, _extended(pads, further)), kernel, strides)
    include = bool(step.whole("count_include_pad", 0))
    if not any(further) and (include or not any(map(any, pads))):
        return mean
    counted = _padded(x.new_ones(1, 1, *x.shape[2:]), pads, 1.0 if include else 0.0)
    share: Tensor = pool(_padded(counted, [(0, more) for more in further]), kernel, strides)
    return mean / share


def _global_average_pool(step: _Step, x: Tensor) -> Tensor:
    del step
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def _global_max_pool(step: _Step, x: Tensor) -> Tensor:
    del step
    return x.amax(list(range(2, x.ndim)), keepdim=True)


# ---- arithmetic


def _add(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a + b


def _sub(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a - b


def _mul(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a * b


def _matmul(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a @ b


def _div(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a / b if a.is_floating_point() else a.div(b, rounding_mode="trunc")


def _pow(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a.pow(b).to(a.dtype)


def _max(step: _Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a.maximum(b), operands)


def _min(step: _Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a.minimum(b), operands)


def _sum(step: _Step, *operands: Tensor) -> Tensor:
    del step
    return functools.reduce(lambda a, b: a + b, operands)


def _mean(step: _Step, *operands: Tensor) -> Tensor:
    return _sum(step, *operands) / len(operands)


def _equal(step: _Step, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a == b


def _where(step: _Step, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    del step
    return a.where(condition, b)


def _cast(step: _Step, x: Tensor) -> Tensor:
    import torch

    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(step.whole("to", 0)))
    if kind.kind in "OSU":
        raise step.refuse("makes text of numbers")
    if kind.kind not in "biu":
        return x.float()
    dtype: torch.dtype = torch.from_numpy(np.empty(0, kind)).dtype
    return x.to(dtype)


def _reduction(name: str) -> Operator:
    """Make an operator of a method of Tensor that reduces axes."""

    def apply(step: _Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = step.axes(axes)
        if x.ndim == 0 or (not chosen and step.whole("noop_with_empty_axes", 0)):
            return x
        kept = bool(step.whole("keepdims", 1))
        result: Tensor = getattr(x, name)(chosen or list(range(x.ndim)), keepdim=kept)
        return result

    return apply


# ---- shapes


def _identity(step: _Step, x: Tensor) -> Tensor:
    del step
    return x


def _dropout(
    step: _Step, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Tensor:
    del ratio
    if training is not None and bool(training):
        raise step.refuse("is in training mode")
    return x


def _shape(step: _Step, x: Tensor) -> Tensor:
    sizes = list(x.shape)[step.attributes.get("start", 0) : step.attributes.get("end")]
    return _index(sizes, x)


def _constant(step: _Step) -> Tensor:
    for name, kind in (("float", np.float32), ("int", np.int64)):
        for form in (f"value_{name}", f"value_{name}s"):
            if form in step.attributes:
                array = np.array(step.attributes[form], kind)
                return _from_array(array, step.label, step.device)
    if "value" not in step.attributes:
        raise step.refuse("holds no dense numbers")
    return _as_tensor(step.attributes["value"], step.device)


def _constant_of_shape(step: _Step, shape: Tensor) -> Tensor:
    stored = step.attributes.get("value")
    value = np.zeros(1, np.float32) if stored is None else numpy_helper.to_array(stored)
    filled = _from_array(value, step.label, step.device)
    return filled.reshape(()).expand(_wholes(shape)).contiguous()


def _concat(step: _Step, *operands: Tensor) -> Tensor:
    import torch

    return torch.cat(operands, step.whole("axis", 1))


def _flatten(step: _Step, x: Tensor) -> Tensor:
    return _matrix(x, step.whole("axis", 1))


def _reshape(step: _Step, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _wholes(shape)
    if not step.whole("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(step: _Step, x: Tensor) -> Tensor:
    return x.permute(step.wholes("perm") or list(range(x.ndim))[::-1])


def _squeeze(step: _Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = step.axes(axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(step: _Step, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = step.axes(axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(
    step: _Step,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
) -> Tensor:
    first, last = step.axes(starts, "starts") or [], step.axes(ends, "ends") or []
    chosen = step.axes(axes) or list(range(len(first)))
    by = _wholes(strides) if strides is not None else [1] * len(first)
    for start, end, axis, stride in zip(first, last, chosen, by, strict=True):
        # What Python's slices do with ends beyond the axis is what ONNX says.
        positions = range(*slice(start, end, stride).indices(x.shape[axis]))
        if stride == 1:
            x = x.narrow(axis, positions.start, len(positions))
        else:
            x = x.index_select(axis, _index(positions, x))
    return x


def _gather(step: _Step, x: Tensor, indices: Tensor) -> Tensor:
    axis = step.whole("axis", 0) % x.ndim
    flat = indices.flatten().long()
    flat = (flat + x.shape[axis]).where(flat < 0, flat)
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, flat).reshape(shape)


def _split(step: _Step, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = step.whole("axis", 0)
    parts = step.axes(sizes, "split")
    if parts is None:
        size = -(-x.shape[axis] // len(step.outputs))
        parts = [size] * (x.shape[axis] // size)
        parts += [x.shape[axis] - sum(parts)] * (len(step.outputs) - len(parts))
    starts = np.cumsum([0, *parts[:-1]]).tolist()
    return tuple(x.narrow(axis, start, size) for start, size in zip(starts, parts, strict=True))


def _expand(step: _Step, x: Tensor, shape: Tensor) -> Tensor:
    del step
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(_wholes(shape))))


def _pad(
    step: _Step,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    flat = step.axes(pads, "pads") or []
    half = len(flat) // 2
    chosen = list(range(x.ndim)) if axes is None else [a % x.ndim for a in _wholes(axes)]
    ends = dict(zip(chosen, zip(flat[:half], flat[half:], strict=True), strict=True))
    mode = step.text("mode", "constant")
    if mode == "constant":
        fill = step.number("value", 0.0) if value is None else float(value)
        return _padded(x, [ends.get(axis, (0, 0)) for axis in range(x.ndim)], fill)
    for axis, (before, after) in ends.items():
        if (before, after) != (0, 0):
            x = x.index_select(axis, _index(_mirrored(step, x.shape[axis], before, after, mode), x))
    return x


def _mirrored(step: _Step, size: int, before: int, after: int, mode: str) -> NDArray[np.integer]:
    """Return the positions along an axis that a padded axis takes its values from."""
    positions = np.arange(-before, size + after)
    if mode == "edge":
        return positions.clip(0, size - 1)
    if max(before, after) >= size:
        raise step.refuse(f"reflects more than the {size} values that it has")
    mirrored: NDArray[np.integer] = size - 1 - np.abs(size - 1 - np.abs(positions))
    return mirrored


def _depth_to_space(step: _Step, x: Tensor) -> Tensor:
    block = step.whole("blocksize", 1)
    count, channels, height, width = x.shape
    inner = channels // block**2
    if step.text("mode", "DCR") == "DCR":
        x = x.reshape(count, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(count, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(count, inner, height * block, width * block)


def _space_to_depth(step: _Step, x: Tensor) -> Tensor:
    block = step.whole("blocksize", 1)
    count, channels, height, width = x.shape
    x = x.reshape(count, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(count, channels * block**2, height // block, width // block)


# ---- resizing


def _upsample(step: _Step, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Run Upsample, and Resize of opset 10, which have one rule: out / scale, rounded down."""
    factors = step.attributes.get("scales") if scales is None else scales.tolist()
    if factors is None or min(factors) < 1:
        raise step.refuse("makes its input smaller")
    sizes = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    mode = step.text("mode", "nearest")
    for axis, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        x = _resized(step, x, axis, size, factor, (mode, "asymmetric", "floor"))
    return x


def _resize(
    step: _Step,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    if step.opset < 11:
        return _upsample(step, x, roi)
    axes = [axis % x.ndim for axis in step.wholes("axes", range(x.ndim))]
    rule = (
        step.text("mode", "nearest"),
        step.text("coordinate_transformation_mode", "half_pixel"),
        step.text("nearest_mode", "round_prefer_floor"),
    )
    if sizes is not None and sizes.numel():
        wanted = _wholes(sizes)
        factors = [size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True)]
    elif scales is not None and scales.numel():
        factors = [float(factor) for factor in scales.tolist()]
        wanted = [math.floor(x.shape[a] * f) for a, f in zip(axes, factors, strict=True)]
    else:
        raise step.refuse("has neither scales nor sizes")
    for axis, size, factor in zip(axes, wanted, factors, strict=True):
        x = _resized(step, x, axis, size, factor, rule)
    return x


def _resized(
    step: _Step, x: Tensor, axis: int, size: int, factor: float, rule: tuple[str, str, str]
) -> Tensor:
    """Resize one axis; the rule is mode, coordinate transformation and way of rounding."""
    mode, transformation, rounding = rule
    last = x.shape[axis] - 1
    if size == last + 1 and factor == 1.0:
        return x
    places = _coordinates(last + 1, size, factor, transformation)
    if mode == "nearest":
        nearest = _ROUNDINGS[rounding](places).clip(0, last)
        return x.index_select(axis, _index(nearest.astype(np.int64), x))
    places = places.clip(0, last)
    low = np.floor(places).astype(np.int64)
    shape = [-1 if each == axis else 1 for each in range(x.ndim)]
    share = _from_array((places - low).astype(np.float32), step.label, step.device).reshape(shape)
    first = x.index_select(axis, _index(low, x))
    return first + share * (x.index_select(axis, _index(np.minimum(low + 1, last), x)) - first)


def _coordinates(
    before: int, after: int, factor: float, transformation: str
) -> NDArray[np.float32]:
    """Return where each of `after` places lies among the `before` ones, in float32 as others do."""
    at = np.arange(after, dtype=np.float32)
    half, scale = np.float32(0.5), np.float32(factor)
    places: NDArray[np.float32]
    if transformation == "asymmetric":
        places = at / scale
    elif transformation == "align_corners":
        places = at * np.float32(before - 1) / np.float32(max(after - 1, 1))
    elif transformation == "pytorch_half_pixel" and after == 1:
        places = at
    else:
        places = (at + half) / scale - half
    return places


_ROUNDINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "round_prefer_floor": lambda places: np.ceil(places - np.float32(0.5)),
    "round_prefer_ceil": lambda places: np.floor(places + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


# ---- the table

_OPERATORS: dict[str, Operator] = {
    "Abs": _method("abs"),
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _equal,
    "Erf": _method("erf"),
    "Exp": _method("exp"),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _max,
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Min": _min,
    "Mish": _mish,
    "Mul": _mul,
    "Neg": _method("neg"),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _pow,
    "Reciprocal": _method("reciprocal"),
    "ReduceMax": _reduction("amax"),
    "ReduceMean": _reduction("mean"),
    "ReduceMin": _reduction("amin"),
    "ReduceSum": _reduction("sum"),
    "Relu": _method("relu"),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _method("sigmoid"),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _softplus,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _method("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Tanh": _method("tanh"),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _upsample,
    "Where": _where,
}

# Attributes that change what an operator means, and the values that are known here; the rest is
# refused when the graph is built.
_SUPPORTED: dict[str, dict[str, tuple[object, ...]]] = {
    "BatchNormalization": {"training_mode": (0,), "spatial": (1,)},
    "DepthToSpace": {"mode": ("DCR", "CRD")},
    "Pad": {"mode": ("constant", "reflect", "edge")},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            "align_corners",
            "asymmetric",
            "half_pixel",
            "pytorch_half_pixel",
        ),
        "keep_aspect_ratio_policy": ("stretch",),
        "mode": ("linear", "nearest"),
        "nearest_mode": tuple(_ROUNDINGS),
    },
    "Upsample": {"mode": ("linear", "nearest")},
}
