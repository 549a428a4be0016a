"""What networks answer to some images, beside what their original does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from converter.calibration.patches import Tensors, bytes_of
from converter.calibration.samples import spread
from converter.calibration.sets import CalibrationSet, fixed_batch, padded
from converter.calibration.subset import Subset
from converter.config import Runtime
from converter.fitting import UNSEEN_EVERY
from converter.outcome import Answers
from converter.runtime import model_inputs, open_session, run
from converter.sensitivity import NO_VARIANCE

__all__ = ["OfImages", "affordable", "compare_answers"]

MOST_IMAGES = 512
"""Images that a conversion is judged on."""
LEAST_IMAGES, WORK = 32, 5e11
"""Images at the least, and multiply-accumulates that more of them may take."""
MOST_BYTES = 2**26
"""Bytes of these images: they are held while both networks run."""
_BATCH, _BATCH_BYTES = 32, 2**22
"""Images that run at once, and bytes of them: at 224×224 one tensor of 32 images has 400 MiB."""

_HELD = 2**28
"""Bytes of answers that are held of one network: maps of classes take megabytes for an image."""

Rows = Mapping[str, NDArray[np.float32]]


def affordable(macs: int, most: int) -> int:
    """Say how many images, up to `most`, a network of so many multiply-accumulates runs on."""
    return min(most, max(LEAST_IMAGES, int(WORK / max(macs, 1))))


class OfImages:
    """Some images, what an original answers to them, and how far others are from that.

    Parameters
    ----------
    data : CalibrationSet
        The images; evenly fewer are taken where their answers are large.
    fixed : int or None
        The batch that the original insists on.
    original : callable
        Runs it on what is fed, and gives the tensors that are compared, by name; it is not kept.

    Attributes
    ----------
    batches : list of Batch
        The images, in batches that the network takes.
    right : dict of str to ndarray of shape (n, elements), float32
        What the original answers, of those that have a row for each image and differ between images.
    """

    def __init__(
        self, data: CalibrationSet, fixed: int | None, original: Callable[[Tensors], Tensors]
    ) -> None:
        size = bytes_of(next(iter(data.batches(1))).feeds)
        together = max(1, min(_BATCH, _BATCH_BYTES // max(size, 1)))
        batches = [
            padded(each, fixed) if fixed else each for each in data.batches(fixed or together)
        ]
        held = _HELD // max(bytes_of(original(batches[0].feeds)), 1)
        self.batches = [batches[at] for at in spread(len(batches), max(2, held))]
        found = self.answers(original)
        self.right: Rows = {
            name: rows for name, rows in found.items() if rows.size and _differs(rows)
        }

    @property
    def images(self) -> int:
        """How many images these are."""
        return sum(each.count for each in self.batches)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are compared."""
        return tuple(self.right)

    def answers(self, network: Callable[[Tensors], Tensors]) -> Rows:
        """Let a network answer, which runs on what is fed."""
        return self.gathered(network(each.feeds) for each in self.batches)

    def gathered(self, answers: Iterable[Tensors]) -> Rows:
        """Put batches together: outputs with a row for each image, (n, elements) each."""
        parts: dict[str, list[NDArray[np.float32]]] = {}
        for batch, tensors in zip(self.batches, answers, strict=True):
            filled = next(len(each) for each in batch.feeds.values())
            for name, rows in tensors.items():
                if rows.shape[:1] == (filled,):
                    real = rows[: batch.count].reshape(batch.count, -1).astype(np.float32)
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
            wide = float(right.var(0, dtype=np.float64).sum()) * len(right)
            errors.append(float(np.square(rows - right).sum(dtype=np.float64)) / wide)
        error = float(np.mean(errors))
        return error if math.isfinite(error) else math.inf


def _differs(rows: NDArray[np.floating]) -> bool:
    """Whether an output differs between images by more than rounding, as for Ω."""
    mean = rows.mean(0, dtype=np.float64)
    return float(rows.var(0, dtype=np.float64).sum()) > NO_VARIANCE * float(np.square(mean).sum())


def compare_answers(
    original: Path,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    runtime: Runtime,
    macs: int,
) -> Answers | None:
    """Say how far a conversion is off, on calibration images that its fits kept back.

    Parameters
    ----------
    original : Path
    converted : onnx.ModelProto
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
    most = max(2, min(affordable(macs, MOST_IMAGES), MOST_BYTES // max(one, 1)))
    used = _KeptBack(data, most) if len(data) >= 2 * UNSEEN_EVERY else data
    session = open_session(original, runtime, spinning=False)
    floating = {
        each.name: len(each.shape)
        for each in session.get_outputs()
        if each.type in ("tensor(float)", "tensor(float16)", "tensor(double)")
    }
    if not floating:
        return None
    fixed = fixed_batch(model_inputs(session))
    images = OfImages(used, fixed, _running(session, list(floating), original.name))
    if not images.names:
        return None
    del session  # of large networks there is no room for two
    label = "the converted model"
    other = open_session(converted, runtime, spinning=False, label=label)
    found = images.answers(_running(other, list(images.names), label))
    agreement = None
    for name in images.names:
        if floating[name] == 2 and name in found and images.right[name].shape[1] > 1:
            agreement = float((found[name].argmax(1) == images.right[name].argmax(1)).mean())
            break
    return Answers(images.error(found), agreement, images.images)


def _running(
    session: ort.InferenceSession, names: list[str], label: str
) -> Callable[[Tensors], Tensors]:
    def network(feeds: Tensors) -> Tensors:
        return dict(zip(names, run(session, names, feeds, label=label), strict=True))

    return network


class _KeptBack(Subset):
    """Samples that fits keep back, evenly at most so many of them."""

    def __init__(self, whole: CalibrationSet, most: int) -> None:
        super().__init__(whole, 1)
        rows = range(UNSEEN_EVERY - 1, len(whole), UNSEEN_EVERY)
        self._chosen = [rows[at] for at in spread(len(rows), min(most, len(rows)))]
