"""How a form is put into a model to be measured, in either way, and what comes of measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
from numpy.typing import NDArray

from converter.config import Runtime
from converter.schemes.form import Form
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer
from passes.reorder_sums import ReorderSums
from passes.split import Branches, Split

__all__ = ["Feeds", "Measured", "Point", "Replace", "Subject", "with_forms"]

Point: TypeAlias = tuple[Form, float]
"""A form, and its multiply-accumulates for one sample."""
Replace: TypeAlias = Callable[[Layer, Form], Branches]
"""Gives branches of a form's shapes; their values do not matter, but must not be denormal."""
Feeds: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and under what.

    Attributes
    ----------
    model : onnx.ModelProto
        The normalised original; it is not changed.
    layers : tuple of Layer
    wanted : dict of str to list of Form
        Forms to measure, by layer.
    replace : callable
        Gives the branches of a layer in a form.
    feeds : mapping of str to ndarray
        One batch.
    runtime : Runtime
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    wanted: Mapping[str, Sequence[Form]]
    replace: Replace
    feeds: Feeds
    runtime: Runtime


@dataclass(frozen=True)
class Measured:
    """How what was measured becomes milliseconds that a user would measure.

    Attributes
    ----------
    factor : float
        On what this plan measured.
    drift : float
        On top of it, on what earlier plans measured: how much slower this machine is now.
    rest_ms : float
        Milliseconds of what is no layer's, with the factor.
    notes : tuple of str
        What speaks against these numbers.
    """

    factor: float
    drift: float
    rest_ms: float
    notes: tuple[str, ...] = ()


def with_forms(subject: Subject, forms: Mapping[str, Form]) -> onnx.ModelProto:
    """Return a copy of the model with some layers replaced, and nodes named after what they write."""
    graph = import_graph(subject.model)
    changed = [layer for layer in subject.layers if layer.name in forms]
    if changed:
        splits = [Split(layer, subject.replace(layer, forms[layer.name])) for layer in changed]
        run_passes(graph, [*splits, ReorderSums()])
    for node in graph.nodes:  # their own names may be empty, or stand for several nodes
        node.name = next((tensor.name for tensor in node.outputs if tensor.name), node.name)
    return export_model(graph, subject.model)
