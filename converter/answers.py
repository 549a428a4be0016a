"""What networks answer to some images, beside what their original does."""

from __future__ import annotations

import copy
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
from converter.errors import ModelError
from converter.fitting import UNSEEN_EVERY
from converter.outcome import Answers
from converter.runtime import model_inputs, open_session, run
from converter.scores import holds_scores
from converter.sensitivity import NO_VARIANCE

__all__ = ["Judge", "NothingToJudgeError", "OfImages", "affordable", "compare_answers"]

MOST_IMAGES = 512
"""Images that a conversion is judged on."""
LEAST_IMAGES, WORK = 32, 5e11
"""Images at the least, and multiply-accumulates that more of them may take."""
MOST_BYTES = 2**26
"""Bytes of these images: they are held while both networks run."""
_BATCH, _BATCH_BYTES = 32, 2**22
"""Images that run at once, and bytes of them: at 224×224 one tensor of 32 images has 400 MiB."""

_HELD = 2**28
"""Bytes of images and of answers of one network: maps of classes take megabytes for an image."""
_FLOATING = frozenset({"tensor(float)", "tensor(float16)", "tensor(double)"})

Rows = Mapping[str, NDArray[np.float32]]


class NothingToJudgeError(ModelError):
    """No output of a network tells images apart."""


def affordable(macs: int, most: int) -> int:
    """Say how many images, up to `most`, a network of so many multiply-accumulates runs on."""
    return min(most, max(LEAST_IMAGES, int(WORK / max(macs, 1))))


class OfImages:
    """Some images, what an original answers to them, and how far others are from that.

    Parameters
    ----------
    data : CalibrationSet
        The images; evenly fewer are taken where they and their answers are large.
    fixed : int or None
        The batch that the original insists on.
    original : callable
        Runs it on what is fed, and gives the tensors that are compared, by name; it is not kept.
    together : int or None, default None
        Images that run at once, where no batch is fixed; None takes as many as are small together.
    held : int, default 256 MiB
        Bytes of images and of answers of one network that are held; two batches are in any case.

    Attributes
    ----------
    batches : list of Batch
        The images, in batches that the network takes.
    right : dict of str to ndarray of shape (n, elements), float32
        What the original answers, of those that have a row for each image and differ between images.
    scores : tuple of str
        Those that hold scores of classes.
    """

    def __init__(
        self,
        data: CalibrationSet,
        fixed: int | None,
        original: Callable[[Tensors], Tensors],
        *,
        together: int | None = None,
        held: int = _HELD,
    ) -> None:
        if together is None:
            size = bytes_of(next(iter(data.batches(1))).feeds)
            together = max(1, min(_BATCH, _BATCH_BYTES // max(size, 1)))
        batches = [
            padded(each, fixed) if fixed else each for each in data.batches(fixed or together)
        ]
        first = original(batches[0].feeds)
        fitting = held // max(bytes_of(first) + bytes_of(batches[0].feeds), 1)
        chosen = spread(len(batches), max(2, fitting))
        self.batches = [batches[at] for at in chosen]
        found = self.gathered(first if at == 0 else original(batches[at].feeds) for at in chosen)
        self.right: Rows = {
            name: rows for name, rows in found.items() if rows.size and _differs(rows)
        }
        self.scores = tuple(name for name in self.right if holds_scores(first[name]))

    def beside(self, original: Callable[[Tensors], Tensors]) -> OfImages:
        """Give the same images with what another original answers, which has the same outputs."""
        other = copy.copy(self)
        found = self.answers(original)
        other.right = {name: rows for name, rows in found.items() if rows.size and _differs(rows)}
        other.scores = tuple(name for name in self.scores if name in other.right)
        return other

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


class Judge:
    """Says how far networks are from an original, under onnxruntime.

    Parameters
    ----------
    original : Path or onnx.ModelProto
    data : CalibrationSet
    runtime : Runtime
    together, held
        As for `OfImages`.

    Raises
    ------
    ModelError, CalibrationError
        Where onnxruntime refuses the original or the images, or where it has no output to be judged by.
    """

    def __init__(
        self,
        original: Path | onnx.ModelProto,
        data: CalibrationSet,
        runtime: Runtime,
        *,
        together: int | None = None,
        held: int = _HELD,
    ) -> None:
        self._runtime = runtime
        # its session is gone when another network is opened: of large ones there is no room for two
        session, network = _opened(original, runtime)
        fixed = fixed_batch(model_inputs(session))
        self._seen = OfImages(data, fixed, network, together=together, held=held)
        self._require_names()

    def beside(self, original: onnx.ModelProto) -> Judge:
        """Give one that judges by another original with the same outputs, on the same images."""
        other = copy.copy(self)
        other._seen = self._seen.beside(_opened(original, self._runtime)[1])
        other._require_names()
        return other

    def _require_names(self) -> None:
        if not self._seen.names:
            raise NothingToJudgeError(
                "the original model has no output of floating-point type with a row for each image that "
                "differs between images, so answers cannot be compared; export it with such an output"
            )

    @property
    def images(self) -> int:
        """How many images it judges on."""
        return self._seen.images

    def of(self, network: onnx.ModelProto) -> Answers:
        """Say how far a network's answers are off.

        Raises
        ------
        ModelError, CalibrationError
            Where onnxruntime refuses the network or the images.
        """
        seen, label = self._seen, "the converted model"
        session = open_session(network, self._runtime, spinning=False, label=label)
        found = seen.answers(_running(session, list(seen.names), label))
        error, agreement = seen.error(found), None
        if seen.scores and math.isfinite(error):
            mine, right = found[seen.scores[0]], seen.right[seen.scores[0]]
            agreement = float((mine.argmax(1) == right.argmax(1)).mean())
        return Answers(error, agreement, seen.images)


def _opened(
    original: Path | onnx.ModelProto, runtime: Runtime
) -> tuple[ort.InferenceSession, Callable[[Tensors], Tensors]]:
    """Open a network, and what runs it for its outputs of floating-point type."""
    label = original.name if isinstance(original, Path) else "the original model"
    session = open_session(original, runtime, spinning=False, label=label)
    floating = [each.name for each in session.get_outputs() if each.type in _FLOATING]
    return session, _running(session, floating, label)


def _running(
    session: ort.InferenceSession, names: list[str], label: str
) -> Callable[[Tensors], Tensors]:
    def network(feeds: Tensors) -> Tensors:
        # onnxruntime takes no names for all names
        found = run(session, names, feeds, label=label) if names else []
        return dict(zip(names, found, strict=True))

    return network


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
    try:
        return Judge(original, used, runtime).of(converted)
    except NothingToJudgeError:
        return None


class _KeptBack(Subset):
    """Samples that fits keep back, evenly at most so many of them."""

    def __init__(self, whole: CalibrationSet, most: int) -> None:
        super().__init__(whole, 1)
        rows = range(UNSEEN_EVERY - 1, len(whole), UNSEEN_EVERY)
        self._chosen = [rows[at] for at in spread(len(rows), min(most, len(rows)))]
