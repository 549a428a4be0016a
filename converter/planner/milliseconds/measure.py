"""What a whole model would take, predicted from few measurements of its layers.

On the CPU the layers are measured where they stand (`in_place.py`), on CUDA each alone (`alone.py`). Those
with the same geometry share their measurements (`shelf.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from converter.config import Target
from converter.planner.measurements import Measurements
from converter.planner.milliseconds.alone import measured_alone
from converter.planner.milliseconds.forms import Feeds, Point, Replace, Subject
from converter.planner.milliseconds.in_place import measured_in_place
from converter.planner.milliseconds.model import LatencyModel, curves
from converter.planner.milliseconds.shelf import Shelf, context
from converter.progress import SILENT, Progress
from passes.layers import Layer

__all__ = ["measure_layers"]


def measure_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    points: Mapping[str, Sequence[Point]],
    replace: Replace,
    feeds: Feeds,
    target: Target,
    cache: Measurements,
    *,
    alone: bool | None = None,
    progress: Progress = SILENT,
) -> LatencyModel:
    """Measure what each layer takes in some of its forms.

    Parameters
    ----------
    model : onnx.ModelProto
        The normalised original, with its weights in memory; it is not changed.
    layers : sequence of Layer
        Its layers that can be converted, from `find_layers`.
    points : mapping of str to sequence of Point
        By layer: the forms to measure, two or more of each family. "keep" is measured anyway and
        need not be among them.
    replace : callable
        Gives the branches of a layer in a form.
    feeds : mapping of str to ndarray
        One batch of input, of `target.batch` samples.
    target : Target
    cache : Measurements
        What is known already is taken from here, and what is new is kept here.
    alone : bool or None, default None
        Whether each layer is measured alone rather than where it stands; None does so on CUDA.
    progress : Progress, default SILENT

    Raises
    ------
    ConfigError, ModelError, CalibrationError
        As `converter.runtime.open_session` and `converter.runtime.run`.
    """
    alone = target.runtime.provider == "cuda" if alone is None else alone
    shared = context(target, alone=alone)
    shelf = Shelf(model, layers, feeds, cache.read(shared))
    wanted = {
        layer.name: list(dict.fromkeys(form for form, _ in points.get(layer.name, ())))
        for layer in layers
    }
    subject = Subject(model, tuple(layers), wanted, replace, feeds, target.runtime)
    measured = (measured_alone if alone else measured_in_place)(subject, shelf, progress)
    cache.write(shared, shelf.new(measured.drift))
    found, missing = curves(layers, points, shelf, measured)
    return LatencyModel(measured.rest_ms, found, (*missing, *measured.notes, *cache.notes))
