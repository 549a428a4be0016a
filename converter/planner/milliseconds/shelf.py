"""What was measured, by geometry: layers of the same one share their measurements.

They do so within a network, and through `Measurements` with every network that is planned on this machine
later on.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from converter.calibration.sets import fixed_batch
from converter.config import Target
from converter.planner.cost import tensor_shapes
from converter.planner.measurements import measurement_key
from converter.planner.milliseconds.forms import Feeds
from converter.runtime import machine, model_inputs
from converter.schemes.form import Form
from passes.base import run_passes
from passes.exchange import import_graph
from passes.layers import Layer
from passes.normalise import InferShapes

__all__ = ["Shelf", "context"]


class Shelf:
    """Milliseconds of forms by geometry: those of earlier plans, and those of this one."""

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        feeds: Feeds,
        known: Mapping[str, float],
    ) -> None:
        graph = import_graph(model)
        run_passes(graph, [InferShapes()])
        tensors = graph.tensors()
        writers = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
        folded = _folded(model, layers, feeds)
        self._geometry = {
            layer.name: _geometry(layer, tensors, writers, feeds, folded[layer.name])
            for layer in layers
        }
        self._known = known
        self._seen: dict[str, list[float]] = defaultdict(list)

    def alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Group the layers that share their measurements."""
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(self._geometry[layer.name], []).append(layer)
        return list(groups.values())

    def known(self, layer: Layer, form: Form) -> float | None:
        """Milliseconds that an earlier plan measured."""
        return self._known.get(self._key(layer, form))

    def note(self, layer: Layer, form: Form, milliseconds: float) -> None:
        """Take in a measurement of this plan."""
        self._seen[self._key(layer, form)].append(milliseconds)

    def seen(self, layer: Layer, form: Form) -> float | None:
        """Milliseconds that this plan measured: the median over layers that are alike."""
        values = self._seen.get(self._key(layer, form))
        return None if values is None else statistics.median(values)

    def new(self, drift: float) -> dict[str, float]:
        """Give what this plan was the first to measure, by key, in milliseconds of the plans before.

        What is known stays as it is: a layer that is kept tells how much slower the machine is now, and
        says so of all that was measured beside it.

        Parameters
        ----------
        drift : float
            As `Measured.drift`.
        """
        return {
            key: statistics.median(values) / drift
            for key, values in self._seen.items()
            if key not in self._known
        }

    def _key(self, layer: Layer, form: Form) -> str:
        return measurement_key(self._geometry[layer.name], str(form))


def context(target: Target, *, alone: bool) -> str:
    """Describe what all measurements of one file share."""
    computer = machine()
    versions = computer["versions"]
    parts = {
        "processor": computer["processor"],
        "instructions": computer["instructions"],
        "cores": computer["cores"],
        "provider": target.runtime.provider,
        "accelerator": _accelerator() if target.runtime.provider == "cuda" else "",
        "onnxruntime": versions.get("onnxruntime-gpu") or versions.get("onnxruntime"),
        "threads": target.runtime.thread_count,
        "batch": target.batch,
        "alone": alone,
    }
    return json.dumps(parts, sort_keys=True)


def _accelerator() -> str:
    """Name the GPUs as the Linux driver does; elsewhere they are not told apart."""
    tables = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in tables for line in path.read_text(encoding="utf-8").splitlines()]
    return ", ".join(line.partition(":")[2].strip() for line in lines if line.startswith("Model"))


def _folded(
    model: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds
) -> dict[str, tuple[int, ...]]:
    """Give the leading size of each response, where it is not the batch: images are folded into it."""
    free = fixed_batch(model_inputs(model)) is None
    sample = {name: feed[:1] if free else feed for name, feed in feeds.items()}
    shapes = tensor_shapes(model, sample, [layer.response for layer in layers])
    fed = len(next(iter(sample.values())))
    sizes = {layer.name: shapes[layer.response][0] for layer in layers}
    return {name: () if size == fed else (size,) for name, size in sizes.items()}


def _geometry(
    layer: Layer,
    tensors: Mapping[str, gs.Tensor],
    writers: Mapping[str, gs.Node],
    feeds: Feeds,
    folded: tuple[int, ...],
) -> str:
    """Describe everything about a layer that its time depends on."""
    shapes = [tensors[name].shape for name in (layer.input, layer.response)]
    sizes = [None if shape is None else list(shape[1:]) for shape in shapes]
    known = all(size is not None and all(isinstance(n, int) for n in size) for size in sizes)
    producer = writers.get(layer.input)
    parts = [
        layer.op,
        None if layer.weight is None else layer.weight.shape,
        layer.bias is not None,
        [layer.strides, layer.pads, layer.dilations, layer.auto_pad],
        [str(size) for size in sizes],
        # where the model leaves its sizes open, what is fed decides them
        [] if known else sorted((name, feed.shape) for name, feed in feeds.items()),
        layer.activation.kind,
        layer.shortcut is not None,
        "" if producer is None else producer.op,
        sorted(node.op for node in tensors[layer.activated].outputs),
        *folded,  # nothing where there is nothing to tell, so that what was kept before is found again
    ]
    return json.dumps(parts)
