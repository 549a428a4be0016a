"""The original and the converted network side by side in torch: what both answer, and what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.config import Runtime
from converter.differentiable import TorchGraph, UnsupportedOperatorError, needed_nodes
from converter.errors import ModelError
from converter.refine.images import mirror_images
from converter.refine.loss import mean_scores
from converter.runtime import model_inputs, open_session, run
from converter.scores import in_rows
from converter.sensitivity import output_sources
from passes.expose import expose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Networks", "output_channels", "trainable_weights"]

_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "HardSwish", "PRelu", "Elu", "Selu", "Gelu", "Silu", "Sigmoid"}
)
_SHARED = 4
"""Inner responses that are compared, spread over the depth."""
_ROUND_OFF = 1e-3
"""Share of an output's range by which torch and onnxruntime may differ: sums in another order."""


def trainable_weights(model: onnx.ModelProto) -> list[str]:
    """Name the float32 weights and biases of Conv, Gemm and MatMul nodes, in the order of the graph."""
    floats = {
        tensor.name: None
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    named = (
        name for node in model.graph.node if node.op_type in _LINEAR for name in node.input[1:]
    )
    return list(dict.fromkeys(name for name in named if name in floats))


def output_channels(model: onnx.ModelProto) -> dict[str, int]:
    """Name the axis of the output channels of each float32 weight of Conv, Gemm and MatMul nodes.

    What is no weight of a channel, as a bias or a vector, and what two nodes read differently, is left out.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    trainable, found = set(trainable_weights(model)), dict[str, set[int]]()
    for node in model.graph.node:
        if node.op_type not in _LINEAR or node.input[1] not in trainable:
            continue
        rank = ranks[node.input[1]]
        if rank < 2:
            continue
        across = node.op_type == "Conv" or any(
            each.name == "transB" and each.i for each in node.attribute
        )
        found.setdefault(node.input[1], set()).add(0 if across else rank - 1)
    return {name: axes.pop() for name, axes in found.items() if len(axes) == 1}


def _kernels(model: onnx.ModelProto) -> set[str]:
    """Name the weights that are more than a vector; what is added is none, of whatever shape."""
    wide = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    return wide & {node.input[1] for node in model.graph.node if node.op_type in _LINEAR}


class Networks:
    """Two networks with the same inputs and outputs, and some inner responses that both have.

    Parameters
    ----------
    original, converted : onnx.ModelProto
    device : str
        torch device.
    scales : bool, default False
        Whether weights are trained up to a factor for each output channel alone; biases are as ever.
    mirrored : bool, default False
        Whether the original's scores of classes are the mean of those for an image and its mirror image.

    Attributes
    ----------
    mirrored : bool
    outputs : tuple of str
        Outputs of the original that are compared; what feeds a softmax stands for it.
    inner : tuple of str
        Inner responses that both have; `check` leaves out those whose shapes differ.
    left_out : tuple of str
        Outputs that `check` found to have not one row for each image.
    parameters : dict of str to Tensor
        What is trained: weights and biases, or in place of weights their factors.

    Raises
    ------
    UnsupportedOperatorError
        Where an operator of either cannot be differentiated, or no output is of floating-point type.
    ModelError
        Where the two have other outputs, or the converted one has nothing to train.
    """

    def __init__(
        self,
        original: onnx.ModelProto,
        converted: onnx.ModelProto,
        device: str = "cpu",
        *,
        scales: bool = False,
        mirrored: bool = False,
    ) -> None:
        self._models, self._device, self.mirrored = (original, converted), device, mirrored
        self._sources = tuple(_by_output(model) for model in self._models)
        first, second = self._sources
        if not first:
            raise UnsupportedOperatorError(
                "no output of the model is of floating-point type, so there is nothing to learn from; "
                "export the model with its scores as an output"
            )
        if first.keys() != second.keys():
            odd = sorted(first.keys() ^ second.keys())[0]
            raise ModelError(
                f"only one of the two models has the output '{odd}'; give a model and what it was "
                "converted to"
            )
        self.outputs = tuple(first)
        self.left_out: tuple[str, ...] = ()
        self.inner = _shared_responses(*self._models)
        wanted = [*second.values(), *self.inner]
        # what leads to classes or masks alone has no gradient
        read = {
            name
            for node in needed_nodes(converted.graph.node, wanted)
            for name in node.input
            if name
        }
        weights = [name for name in trainable_weights(converted) if name in read]
        if not weights:
            raise ModelError("the converted model has no float32 weight that could be trained")
        channels = output_channels(converted) if scales else {}
        self._scaled = {name: axis for name, axis in channels.items() if name in read}
        if scales:
            kernels = _kernels(converted)
            weights = [name for name in weights if name not in kernels]
        self._graphs = (
            TorchGraph(original, device, [*first.values(), *self.inner]),
            TorchGraph(
                converted,
                device,
                wanted,
                trained=weights,
                scaled=self._scaled,
            ),
        )
        self.parameters = self._graphs[1].parameters

    def of_scales(self) -> Networks:
        """Give the same two networks with factors of channels to train, as they are at first."""
        networks = Networks(*self._models, self._device, scales=True, mirrored=self.mirrored)
        networks.inner, networks.outputs = self.inner, self.outputs
        return networks

    def original(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the original: outputs by their name, then inner responses."""
        answers = self._plain(0, feeds)
        if not self.mirrored:
            return answers
        return mean_scores(answers, self._plain(0, mirror_images(feeds)), self.outputs)

    def converted(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the converted network, with its gradients where they are enabled."""
        return self._run(1, feeds)

    def _run(self, which: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, _ = self._graphs[which].forward(feeds)
        answers = {name: in_rows(found[source]) for name, source in self._sources[which].items()}
        return {**answers, **{name: found[name] for name in self.inner}}

    def under_onnxruntime(
        self, which: int, model: onnx.ModelProto, runtime: Runtime
    ) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
        """Open a model that computes, in onnxruntime, what is compared: outputs by their name.

        Parameters
        ----------
        which : int
            0 for the original, 1 for the converted model.
        model : onnx.ModelProto
            That one, or the same with other weights.
        runtime : Runtime
        """
        sources = self._sources[which]
        wanted = list(dict.fromkeys(sources.values()))
        label = ("the original model", "the converted model")[which]
        session = open_session(expose(model, wanted), runtime, spinning=False, label=label)
        kinds = {each.name: each.dtype for each in model_inputs(session, label=label)}

        def answers(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            fed = {name: feed.astype(kinds[name], copy=False) for name, feed in feeds.items()}
            found = dict(zip(wanted, run(session, wanted, fed, label=label), strict=True))
            return {name: in_rows(found[source]) for name, source in sources.items()}

        return answers

    def check(self, feeds: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Compare both in torch with onnxruntime, and leave out what cannot be compared image by image.

        Those are inner responses of unequal shapes, and outputs that have not one row for each image.

        Raises
        ------
        ModelError
            Where the two differ by more than round-off, or no output can be compared.
        """
        import torch

        arrays = {name: feed.cpu().numpy() for name, feed in feeds.items()}
        # on a GPU both convolve in TF32 unless told otherwise, which is more than round-off
        on_cpu = dataclasses.replace(runtime, provider="cpu")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            answers = [self._plain(which, feeds) for which in (0, 1)]
        for which, label in enumerate(("original", "converted")):
            known = self.under_onnxruntime(which, self._models[which], on_cpu)(arrays)
            for name, wanted in known.items():
                _require_equal(answers[which][name].cpu().numpy(), wanted, name, label)
        first, second = answers
        images = max(len(feed) for feed in feeds.values())
        self.left_out = tuple(name for name in self.outputs if first[name].shape[:1] != (images,))
        self.outputs = tuple(name for name in self.outputs if name not in self.left_out)
        if not self.outputs:
            raise ModelError(
                f"output '{self.left_out[0]}' has not one row for each image, so there is nothing to learn "
                "from; export the model with the images along the first axis"
            )
        self.inner = tuple(
            name
            for name in self.inner
            if first[name].is_floating_point() and first[name].shape == second[name].shape
        )

    def _plain(self, which: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        with torch.no_grad():
            return self._run(which, feeds)

    def weights_of(self, model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
        """Read what is trained out of a model that has the same weights."""
        return {
            tensor.name: np.array(numpy_helper.to_array(tensor))
            for tensor in model.graph.initializer
            if tensor.name in self.parameters
        }

    def written(self, parameters: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
        """Return the converted model with what was trained; nothing else of it is changed.

        Parameters
        ----------
        parameters : mapping of str to ndarray, float32
            As `parameters`, by the initializer's name.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._models[1])
        for tensor in model.graph.initializer:
            if tensor.name in parameters:
                trained = parameters[tensor.name]
                if tensor.name in self._scaled:
                    trained = numpy_helper.to_array(tensor) * trained
                array = np.ascontiguousarray(trained, np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model


def _by_output(model: onnx.ModelProto) -> dict[str, str]:
    """Name what is compared for each output."""
    sources, _ = output_sources(model)
    return {output: source for source, output in sources.items()}


def _shared_responses(*models: onnx.ModelProto) -> tuple[str, ...]:
    """Name activations that both graphs write, some of them, spread over the depth."""
    written = [
        [
            name
            for node in model.graph.node
            if node.op_type in _ACTIVATIONS
            for name in node.output
            if name
        ]
        for model in models
    ]
    outputs = {value.name for model in models for value in model.graph.output}
    common = [name for name in written[0] if name in set(written[1]) - outputs]
    if len(common) <= _SHARED:
        return tuple(common)
    places = np.linspace(0, len(common) - 1, _SHARED + 1).round().astype(int)[1:]
    return tuple(common[place] for place in places)


def _require_equal(found: NDArray[Any], wanted: NDArray[Any], name: str, label: str) -> None:
    reach = float(np.ptp(wanted)) or float(np.abs(wanted).max()) or 1.0
    off = float(np.abs(found - wanted).max()) / reach if found.shape == wanted.shape else np.inf
    if not off <= _ROUND_OFF:
        raise ModelError(
            f"output '{name}' of the {label} model differs between torch and onnxruntime by "
            f"{off:.1e} of its range, so what is learned here would not hold there; convert without "
            "recovery, and please report it"
        )
