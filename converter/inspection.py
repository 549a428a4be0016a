"""What a model is made of: each linear layer, its cost, and whether it can be converted.

The layers are those that a conversion would see: constants are normalised and BatchNormalization
is folded first, on a copy. Nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from converter.calibration.sets import ModelInput
from converter.config import Runtime
from converter.errors import ConfigError, ModelError
from converter.model_file import load_model
from converter.planner.cost import LayerCost, count_cost
from converter.runtime import model_inputs, open_session, run
from passes.base import PassError, run_passes
from passes.exchange import export_model, import_graph
from passes.expose import expose
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.precision import precision_of

__all__ = ["Inspection", "LayerInspection", "inspect"]

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LayerInspection:
    """One linear layer.

    Attributes
    ----------
    name, op : str
        Name of the node, or of its output where it has none, and operator.
    weight_shape : tuple of int or None
        (N, C, *kernel), or (N, C) for Gemm and MatMul; None where it is not known.
    output_shape : tuple of int or None
        For a batch of 1, or the model's fixed one; None inside of an If, Loop, Scan or function.
    macs : int or None
        Multiply-accumulates of one sample; None where the shapes are not known.
    params : int or None
        Weights and biases; None where they are not known.
    activation : str
        What follows the layer and is taken into account when it is converted.
    reason : str or None
        Why the layer cannot be converted; None where it can.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    macs: int | None
    params: int | None
    activation: str
    reason: str | None

    @property
    def convertible(self) -> bool:
        """Whether a conversion can replace the layer."""
        return self.reason is None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds.

    Attributes
    ----------
    path : Path
        The model.
    opset : int
        Of the standard operators.
    inputs : tuple of ModelInput
        What the model takes.
    layers : tuple of LayerInspection
        Every Conv, ConvTranspose, Gemm and MatMul, in the order of the graph.
    macs, params : int
        Of the whole model as it is stored, for one sample.
    folded : int
        BatchNormalizations and the like that fold into the layers before them.
    notes : tuple of str
        What a reader must know, one sentence each.
    """

    path: Path
    opset: int
    inputs: tuple[ModelInput, ...]
    layers: tuple[LayerInspection, ...]
    macs: int
    params: int
    folded: int
    notes: tuple[str, ...] = ()

    @property
    def convertible(self) -> tuple[LayerInspection, ...]:
        """The layers that can be converted."""
        return tuple(layer for layer in self.layers if layer.convertible)

    @property
    def convertible_macs(self) -> int:
        """Multiply-accumulates of the layers that can be converted."""
        return sum(layer.macs or 0 for layer in self.convertible)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings, numbers and None, fit for JSON."""
        return {
            "format": "twofold-inspection-1",
            "path": str(self.path),
            "opset": self.opset,
            "inputs": [
                {"name": each.name, "shape": list(each.shape), "dtype": str(each.dtype)}
                for each in self.inputs
            ],
            "macs": self.macs,
            "params": self.params,
            "convertible_macs": self.convertible_macs,
            "folded": self.folded,
            "layers": [
                dataclasses.asdict(layer) | {"convertible": layer.convertible}
                for layer in self.layers
            ],
            "notes": list(self.notes),
        }


def inspect(path: Path, size: tuple[int, int] | None = None) -> Inspection:
    """List the linear layers of a model and say which of them can be converted.

    Parameters
    ----------
    path : Path
        An ONNX model.
    size : tuple of (int, int) or None, default None
        Height and width of the images, for a model that leaves them free.

    Raises
    ------
    ConfigError
        Where the model leaves a size free and `size` does not say what it is, or where `size` does
        not fit.
    ModelError
        Where the model cannot be read or onnxruntime refuses it.
    """
    model = load_model(path)
    inputs = model_inputs(model, label=str(path))
    feeds = {each.name: _zeros(each, size, path) for each in inputs}
    stored = count_cost(model, feeds, label=str(path))
    try:
        graph = import_graph(model)
        results = run_passes(graph, (*normalising(), FoldBatchNorm()))
        layers = find_layers(graph)
        folded = export_model(graph, like=model)
        shapes = _output_shapes(folded, layers, feeds, str(path))
    except PassError as error:
        raise ModelError(f"{path}: {error}") from error
    costs = _Costs(count_cost(folded, feeds, label=str(path)).layers)
    found = tuple(
        LayerInspection(
            name=layer.name,
            op=layer.op,
            weight_shape=None if layer.weight is None else layer.weight.shape,
            output_shape=shapes.get(layer.output) if _is_outside(layer, folded) else None,
            activation=str(layer.activation),
            reason=layer.reason,
            **costs.of(layer),
        )
        for layer in layers
    )
    return Inspection(
        path=path,
        opset=graph.opset,
        inputs=inputs,
        layers=found,
        macs=stored.macs,
        params=stored.params,
        folded=len(results[-1].changes),
        notes=(
            *_kind_notes(precision_of(model)),
            *_notes(found, [f"{skip.node}: {skip.why}" for skip in results[-1].skips]),
        ),
    )


class _Costs:
    """Costs of the layers by what identifies them; equal ones, in bodies, in their order."""

    def __init__(self, layers: Sequence[LayerCost]) -> None:
        self._waiting: dict[tuple[str, str], list[LayerCost]] = defaultdict(list)
        for layer in layers:
            self._waiting[layer.op, layer.output].append(layer)

    def of(self, layer: Layer) -> dict[str, int | None]:
        """Return `macs` and `params` of a layer, None where they were not counted."""
        waiting = self._waiting[layer.op, layer.output]
        if not waiting:
            return {"macs": None, "params": None}
        cost = waiting.pop(0)
        return {"macs": cost.macs, "params": cost.params}


def _zeros(model_input: ModelInput, size: tuple[int, int] | None, path: Path) -> npt.NDArray[Any]:
    """Return one sample of zeros, or a whole batch of them where the batch is fixed."""
    shape = list(model_input.shape)
    if shape and not isinstance(shape[0], int):
        shape[0] = 1
    free = [axis for axis, length in enumerate(shape) if not isinstance(length, int)]
    whose = f"the input {model_input.name!r} of {path}"
    if free and size is None:
        raise ConfigError(f"{whose} has no fixed size; give it, as in --size 224")
    if size is not None and len(shape) == 4:
        _fill(shape, free, size, whose)
    elif free:
        raise ConfigError(f"{whose} has the free axis {free[0]}; export the model with it fixed")
    return np.zeros([int(length or 0) for length in shape], model_input.dtype)


def _fill(
    shape: list[int | str | None], free: Sequence[int], size: tuple[int, int], whose: str
) -> None:
    """Put height and width into an input (n, c, h, w), or (n, h, w, c) where c says so."""
    images = (1, 3, 4)
    axes = (1, 2) if shape[3] in images and shape[1] not in images else (2, 3)
    for axis in free:
        if axis not in axes:
            raise ConfigError(f"{whose} has the free axis {axis}; export the model with it fixed")
    for axis, side in zip(axes, size, strict=True):
        if axis not in free and shape[axis] != side:
            raise ConfigError(
                f"the size {size[0]}x{size[1]} does not fit {whose}, whose axis {axis} has "
                f"{shape[axis]}; leave --size out or give that"
            )
        shape[axis] = side


def _is_outside(layer: Layer, model: onnx.ModelProto) -> bool:
    """Whether the layer is a node of the main graph, not of a body or a function."""
    return any(layer.output in node.output for node in model.graph.node)


def _output_shapes(
    model: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds, label: str
) -> dict[str, tuple[int, ...]]:
    """Run the model once and read the shapes of what its layers put out, for a batch of 1."""
    written = {name for node in model.graph.node for name in node.output}
    names = list(dict.fromkeys(layer.output for layer in layers if layer.output in written))
    if not names:
        return {}
    session = open_session(expose(model, names), Runtime(), optimise=False, label=label)
    arrays = run(session, names, feeds, label=label)
    return {name: tuple(array.shape) for name, array in zip(names, arrays, strict=True)}


def _kind_notes(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return ()
    return (
        f"the model is {kind} already, and what is so is not converted again; convert the float32 model, "
        f"with {'--fp16' if kind == 'float16' else '--int8'} for such a result",
    )


def _notes(layers: Sequence[LayerInspection], unfolded: Sequence[str]) -> tuple[str, ...]:
    notes = [f"left unfolded: {text}" for text in unfolded]
    if not layers:
        notes.append("the model has no Conv, Gemm or MatMul, so there is nothing to convert")
    elif not any(layer.convertible for layer in layers):
        notes.append("no layer of this model can be converted")
    if any(layer.macs is None for layer in layers):
        notes.append("layers inside of If, Loop, Scan or functions are not in the totals")
    return tuple(notes)
