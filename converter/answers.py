"""What networks answer to some images, beside what their original does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.patches import Tensors, bytes_of
from converter.calibration.samples import spread
from converter.calibration.segment import Segment
from converter.calibration.sets import Batch, CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.config import Runtime
from converter.fitting import UNSEEN_EVERY
from converter.outcome import Answers
from converter.runtime import model_inputs
from converter.sensitivity import NO_VARIANCE

__all__ = ["OfImages", "compare_answers"]

MOST_IMAGES, LEAST_IMAGES, WORK = 512, 32, 5e11
"""Images that a conversion is judged on, and multiply-accumulates that they take where a network is large."""
MOST_BYTES = 2**26
"""Bytes of these images: they are held while both networks run."""
_BATCH, _BATCH_BYTES = 32, 2**22
"""Images that run at once, and bytes of them: at 224×224 one tensor of 32 images has 400 MiB."""

Rows = Mapping[str, NDArray[np.float64]]


class OfImages:
    """What an original answers to some images, and how far others are from that.

    Parameters
    ----------
    original : onnx.ModelProto
    names : sequence of str
        Tensors of it that are compared; those count that have a row for each image and differ between images.
    data : CalibrationSet
    runtime : Runtime
    """

    def __init__(
        self,
        original: onnx.ModelProto,
        names: Sequence[str],
        data: CalibrationSet,
        runtime: Runtime,
    ) -> None:
        self._original, self._data, self._runtime = original, data, runtime
        written = {name for node in original.graph.node for name in node.output}
        self._names = tuple(name for name in names if name in written)

    @cached_property
    def batches(self) -> list[Batch]:
        """The images, in batches that the network takes."""
        fixed = fixed_batch(model_inputs(self._original))
        batches = self._data.batches(fixed or self._together())
        return [padded(each, fixed) if fixed else each for each in batches]

    def _together(self) -> int:
        size = bytes_of(next(iter(self._data.batches(1))).feeds)
        return max(1, min(_BATCH, _BATCH_BYTES // max(size, 1)))

    @cached_property
    def right(self) -> Rows:
        """What the original answers, of tensors that differ between images: (n, elements) each."""
        found = self.of(self._original, self._names)
        return {name: rows for name, rows in found.items() if rows.size and _differs(rows)}

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are compared."""
        return tuple(self.right)

    def of(self, model: onnx.ModelProto, names: Sequence[str]) -> Rows:
        """Let a whole network answer.

        Raises
        ------
        ModelError, CalibrationError
            Where onnxruntime refuses the network or the images.
        """
        if not names:
            return {}
        label = "the network, as it is compared"
        whole = Segment(model, tuple(self.batches[0].feeds), names, self._runtime, label=label)
        return self.gathered(whole.run(each.feeds) for each in self.batches)

    def gathered(self, answers: Iterable[Tensors]) -> Rows:
        """Put batches together: outputs with a row for each image, (n, elements) each."""
        parts: dict[str, list[NDArray[np.float64]]] = {}
        for batch, tensors in zip(self.batches, answers, strict=True):
            filled = next(len(each) for each in batch.feeds.values())
            for name, rows in tensors.items():
                if rows.shape[:1] == (filled,):
                    real = rows[: batch.count].reshape(batch.count, -1).astype(np.float64)
                    parts.setdefault(name, []).append(real)
        whole = {name: each for name, each in parts.items() if len(each) == len(self.batches)}
        return {
            name: np.concatenate(each)
            for name, each in whole.items()
            if len({rows.shape[1] for rows in each}) == 1
        }

    def error(self, answers: Rows) -> float:
        """Give the squared error relative to the variance over the images, a mean of the outputs.

        Infinite where one of them is missing, has another shape or is not finite.
        """
        errors = []
        for name, right in self.right.items():
            rows = answers.get(name)
            if rows is None or rows.shape != right.shape:
                return math.inf
            spread_out = float(np.square(right - right.mean(0)).sum())
            errors.append(float(np.square(rows - right).sum()) / spread_out)
        error = float(np.mean(errors))
        return error if math.isfinite(error) else math.inf


def _differs(rows: NDArray[np.float64]) -> bool:
    """Whether an output differs between images by more than rounding, as for Ω."""
    return float(rows.var(0).sum()) > NO_VARIANCE * float(np.square(rows.mean(0)).sum())


def compare_answers(
    original: onnx.ModelProto,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    runtime: Runtime,
    macs: int,
) -> Answers | None:
    """Say how far a conversion is off, on calibration images that its fits kept back.

    Parameters
    ----------
    original, converted : onnx.ModelProto
    data : CalibrationSet
        What it was fitted on; where it has fewer than two images that fits keep back, all of it is taken.
    runtime : Runtime
    macs : int
        Multiply-accumulates of the original for one image, by which images are counted.

    Returns
    -------
    Answers or None
        None where no output of floating-point type has a row for each image and differs between images.

    Raises
    ------
    ModelError, CalibrationError
        Where onnxruntime refuses a network or the images.
    """
    one = bytes_of(next(iter(data.batches(1))).feeds)
    most = min(MOST_IMAGES, max(LEAST_IMAGES, int(WORK / max(macs, 1))))
    most = max(2, min(most, MOST_BYTES // max(one, 1)))
    used = _KeptBack(data, most) if len(data) >= 2 * UNSEEN_EVERY else data
    floating = [
        output
        for output in original.graph.output
        if output.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    ]
    images = OfImages(original, [each.name for each in floating], used, runtime)
    if not images.names:
        return None
    found = images.of(converted, images.names)
    scores = [
        each.name
        for each in floating
        if each.name in images.names and len(each.type.tensor_type.shape.dim) == 2
    ]
    agreement = None
    if scores and images.right[scores[0]].shape[1] > 1 and scores[0] in found:
        mine, theirs = (each[scores[0]].argmax(1) for each in (found, images.right))
        agreement = float((mine == theirs).mean())
    return Answers(images.error(found), agreement, len(used))


class _KeptBack(Subset):
    """Samples that fits keep back, evenly at most so many of them."""

    def __init__(self, whole: CalibrationSet, most: int) -> None:
        super().__init__(whole, 1)
        rows = range(UNSEEN_EVERY - 1, len(whole), UNSEEN_EVERY)
        self._chosen = [rows[at] for at in spread(len(rows), min(most, len(rows)))]
