"""How far a model's answers are from another's, on images that no range was taken from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.sets import Batch, CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.config import Runtime
from converter.refine.loss import holds_scores, relative_error
from converter.runtime import model_inputs, open_session, run

__all__ = ["Deviation", "Judge", "held_batches"]


@dataclass(frozen=True)
class Deviation:
    """How far one model's answers are from another's.

    Attributes
    ----------
    error : float
        Squared error relative to the variance over the images, mean over the outputs; infinite where an
        answer is not finite or has another shape.
    agreement : float or None
        Share of images with the same best class; None for networks that are no classifiers.
    """

    error: float
    agreement: float | None


def held_batches(
    model: onnx.ModelProto, held: CalibrationSet, runtime: Runtime, batch: int, memory_mib: int
) -> list[Batch]:
    """Read the held-out images, evenly fewer where they and three sets of answers pass the bound.

    Parameters
    ----------
    model : onnx.ModelProto
        Whose answers count.
    held : CalibrationSet
        Of two images or more.
    runtime : Runtime
    batch : int
        Images that run at once; a model with a fixed batch overrides it.
    memory_mib : int
    """
    fixed = fixed_batch(model_inputs(model))
    size = fixed or batch
    first = next(iter(held.batches(fixed or 1)))
    feeds = (padded(first, fixed) if fixed else first).feeds
    answers = run(open_session(model, runtime, spinning=False), None, feeds)
    one = (sum(each.nbytes for each in feeds.values()) + 3 * sum(a.nbytes for a in answers)) / (
        fixed or 1
    )
    fitting = max(2, int(memory_mib * 2**20 / max(one, 1.0)))
    if fitting < len(held):
        held = Subset(held, fitting)
    return [padded(each, fixed) if fixed else each for each in held.batches(size)]


class Judge:
    """Compares models with one whose answers are right.

    Parameters
    ----------
    model : onnx.ModelProto
        Whose answers are right.
    batches : sequence of Batch
    runtime : Runtime
    """

    def __init__(self, model: onnx.ModelProto, batches: Sequence[Batch], runtime: Runtime) -> None:
        self._batches, self._runtime = batches, runtime
        self._names = [output.name for output in model.graph.output]
        self._wanted = self._answers(model)

    @property
    def images(self) -> int:
        """How many images it judges on."""
        return sum(each.count for each in self._batches)

    def of(self, model: onnx.ModelProto) -> Deviation:
        """Say how far a model's answers are off.

        Raises
        ------
        ModelError, CalibrationError
            Where onnxruntime refuses the model or the images.
        """
        import torch

        errors, agreement = [], None
        for found, wanted in zip(self._answers(model), self._wanted, strict=True):
            if found.shape != wanted.shape or not np.isfinite(found).all():
                return Deviation(math.inf, None)
            mine, theirs = (torch.from_numpy(each).double() for each in (found, wanted))
            errors.append(float(relative_error(mine, theirs)))
            if agreement is None and wanted.dtype.kind == "f" and holds_scores(theirs):
                agreement = float((mine.argmax(1) == theirs.argmax(1)).double().mean())
        return Deviation(sum(errors) / len(errors), agreement)

    def _answers(self, model: onnx.ModelProto) -> list[NDArray[Any]]:
        """Run a model on all images: one array for each output."""
        session = open_session(model, self._runtime, spinning=False)
        parts = []
        for batch in self._batches:
            filled = next(len(feed) for feed in batch.feeds.values())
            answers = run(session, self._names, batch.feeds)
            parts.append(
                [
                    each[: batch.count] if each.ndim and len(each) == filled else each
                    for each in answers
                ]
            )
        return [_joined(row) for row in zip(*parts, strict=True)]


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put the batches of one output together; flat where it has no batch axis, or free sizes."""
    if len({each.shape[1:] for each in parts if each.ndim}) == 1 and parts[0].ndim:
        return np.concatenate(parts)
    return np.concatenate([each.ravel() for each in parts])
