"""Layers measured alone, on CUDA, each as a small model of its own, all its forms in turns.

There a profile shows when kernels were started, not how long they ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from converter.latency import measure_latency
from converter.planner.milliseconds.forms import Measured, Subject, with_forms
from converter.planner.milliseconds.shelf import Shelf
from converter.progress import Progress
from converter.runtime import open_session, run
from converter.schemes.form import KEEP, Form
from passes.expose import extract
from passes.layers import Layer

__all__ = ["measured_alone"]

_LEAST_RUNS = 5
_ALONE_SECONDS = 0.1
_IDLE = "idle"
_TOGETHER_BYTES = 2**33
"""What forms that are timed in turns hold on the GPU: each its inputs and outputs, and as much again."""


def measured_alone(subject: Subject, shelf: Shelf, progress: Progress) -> Measured:
    """Time the original, then each layer in the forms that are still to be measured; see `measure_layers`."""
    layers = subject.layers
    groups = shelf.alike(layers)
    shapes = _entry_shapes(subject, [group[0] for group in groups])
    with progress.stage("measure layers", len(groups) + 1) as advance:
        whole = measure_latency(
            {"original": subject.model}, subject.feeds, subject.runtime, rounds=_LEAST_RUNS
        )
        advance(1, "the original")
        for group in groups:
            wanted = (form for layer in group for form in subject.wanted[layer.name])
            missing = [
                form
                for form in dict.fromkeys([KEEP, *wanted])
                if shelf.known(group[0], form) is None
            ]
            if missing:
                for form, taken in _forms_alone(subject, group[0], missing, shapes).items():
                    shelf.note(group[0], form, taken)
            advance(1, group[0].name)
    wall = whole["original"].median_ms
    kept = [shelf.seen(layer, KEEP) or shelf.known(layer, KEEP) or 0.0 for layer in layers]
    # Alone, each layer waits for its own start and end; in a row they overlap.
    factor = min(1.0, wall / sum(kept)) if sum(kept) > 0 else 1.0
    return Measured(factor, 1.0, max(wall - factor * sum(kept), 0.0))


def _forms_alone(
    subject: Subject, layer: Layer, forms: Sequence[Form], shapes: Mapping[str, tuple[int, ...]]
) -> dict[Form, float]:
    """Milliseconds of one layer in each form, timed in turns as models of their own."""
    entries = _entries(layer)
    part = extract(subject.model, entries, [layer.activated])
    small = dataclasses.replace(subject, model=part, layers=(layer,))
    generator = np.random.default_rng(0)
    feeds = {name: generator.random(shapes[name], np.float32) for name in entries}
    together = max(1, _TOGETHER_BYTES // _held(layer, feeds))
    found: dict[Form, float] = {}
    for start in range(0, len(forms), together):
        some = forms[start : start + together]
        models: dict[str, onnx.ModelProto | Path | bytes] = {_IDLE: _idle(part)}
        for form in some:
            models[str(form)] = with_forms(small, {} if form == KEEP else {layer.name: form})
        # Many sessions are open, and their spinning threads would take the cores from each other.
        times = measure_latency(
            *(models, feeds, subject.runtime),
            seconds=_ALONE_SECONDS,
            rounds=_LEAST_RUNS,
            spinning=False,
        )
        idle = times[_IDLE].median_ms
        found |= {form: max(times[str(form)].median_ms - idle, 0.0) for form in some}
    return found


def _held(layer: Layer, feeds: Mapping[str, NDArray[np.float32]]) -> int:
    """Bytes that one form holds: what it is fed and answers, and as much again in between."""
    assert layer.weight is not None, "a layer that is measured has a weight"
    fed = feeds[layer.input]
    channels, outputs = (fed.shape[1], layer.weight.shape[0]) if layer.op == "Conv" else (1, 1)
    answered = fed.nbytes // channels * outputs
    return 2 * (sum(each.nbytes for each in feeds.values()) + answered)


def _entries(layer: Layer) -> list[str]:
    """Tensors that a layer and what follows it read."""
    return list(dict.fromkeys([layer.input, *([layer.shortcut] if layer.shortcut else [])]))


def _entry_shapes(subject: Subject, layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the layers read, as they really are: from one run on `feeds`.

    One layer after another, since all tensors of a large batch may not fit into the memory.
    """
    feeds = subject.feeds
    shapes = {name: feed.shape for name, feed in feeds.items()}
    for name in dict.fromkeys(name for layer in layers for name in _entries(layer)):
        if name not in shapes:
            part = extract(subject.model, list(feeds), [name])
            (value,) = run(open_session(part, subject.runtime), [name], feeds)
            shapes[name] = value.shape
    return shapes


def _idle(part: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model with what is fed to `part` that does nothing: what a call costs by itself."""
    stored = {tensor.name for tensor in part.graph.initializer}
    fed = [value for value in part.graph.input if value.name not in stored]
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [None])
    node = helper.make_node("Shape", [fed[0].name], ["shape"])
    graph = helper.make_graph([node], "idle", fed, [shape])
    return helper.make_model(graph, opset_imports=part.opset_import, ir_version=part.ir_version)
