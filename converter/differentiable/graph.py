"""The network itself: its nodes in order, and what runs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import onnx

from converter.differentiable.layers import LAYERS
from converter.differentiable.step import Step, UnsupportedOperatorError, as_tensor
from converter.differentiable.tensors import SUPPORTED, TENSORS
from converter.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TorchGraph", "needed_nodes"]

_FIRST_OPSET = 7  # before it, Add and its like broadcast by attributes
_OPERATORS = {**LAYERS, **TENSORS}


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
        nodes = needed_nodes(graph.node, wanted)
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
            tensor.name: as_tensor(tensor, device)
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

    def _folded(self, steps: Iterable[Step]) -> list[Step]:
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


def _channels_last(
    nodes: Iterable[onnx.NodeProto], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Lay the weights of 2-D convolutions out as torch's kernels for CPUs read and write images.

    Their results, and so what follows, then lie alike: a step of training ResNet-20 or VGG-16 takes 0.63
    to 0.88 of the time on two cores (AVX2, AVX-512). Values and shapes are the same.
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


def needed_nodes(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Leave out what none of the outputs follows from; the order stays."""
    wanted = set(outputs)
    needed = []
    for node in reversed(nodes):  # topological order: readers come after writers
        if not wanted.isdisjoint(name for name in node.output if name):
            needed.append(node)
            wanted.update(name for name in node.input if name)
    return needed[::-1]


def _step(node: onnx.NodeProto, opset: int, device: str) -> Step:
    label = node.name or next((name for name in node.output if name), node.op_type)
    operator = _OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        raise UnsupportedOperatorError(
            f"the operator {kind} of node '{label}' has no differentiable form here; "
            "export the model with standard operators of convolutional networks"
        )
    step = Step(
        op=node.op_type,
        label=label,
        opset=opset,
        device=device,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes={each.name: onnx.helper.get_attribute_value(each) for each in node.attribute},
        operator=operator,
    )
    for name, supported in SUPPORTED.get(node.op_type, {}).items():
        given = step.attributes.get(name)
        given = given.decode() if isinstance(given, bytes) else given
        if given is not None and given not in supported:
            raise step.refuse(f"has {name} = {given}")
    return step


def _require_single_outputs(steps: Sequence[Step], outputs: Collection[str]) -> None:
    """Refuse what reads the mask of a Dropout, the indices of a MaxPool, and their like."""
    read = set(outputs).union(*(step.inputs for step in steps))
    for step in steps:
        extra = [] if step.op == "Split" else [name for name in step.outputs[1:] if name in read]
        if extra:
            raise step.refuse(f"writes the further output '{extra[0]}'")


def _with_releases(steps: Sequence[Step], keep: Collection[str]) -> list[Step]:
    """Note with each step which tensors nothing reads after it."""
    later = set(keep)
    result = []
    for step in reversed(steps):
        names = dict.fromkeys(name for name in (*step.inputs, *step.outputs) if name)
        result.append(replace(step, released=tuple(name for name in names if name not in later)))
        later.update(names)
    return result[::-1]


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _trackable(value: Tensor) -> Tensor:
    """Return the same values as a tensor of its own, whose gradient can be asked for."""
    if not value.is_floating_point():
        return value
    # A view sets it apart from its other names: Identity hands on the very same tensor.
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
