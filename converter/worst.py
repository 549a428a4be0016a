"""The images on which a converted model answers most unlike its original."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from converter.calibration.image_folder import image_file
from converter.calibration.images import thumbnail
from converter.calibration.sets import CalibrationSet

__all__ = ["WORST", "Worst", "WorstImage"]

WORST = 12
"""Images that are kept, as a rule."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class WorstImage:
    """One image that the two models answer differently.

    Attributes
    ----------
    index : int
        Its position in the data, from 0.
    original, converted : int
        Best class of each model; −1 where a score is not finite.
    label : int or None
        Its class, where that is known.
    error : float or None
        ‖converted − original‖ / ‖original‖ of its scores, from 0; None where that is not finite.
    file : str or None
        The file that it was read from; None where it came from an array.
    picture : str or None
        A small copy of that file as a JPEG, in base64.
    """

    index: int
    original: int
    converted: int
    label: int | None
    error: float | None
    file: str | None = None
    picture: str | None = None


class Worst:
    """Keeps the worst images of a stream: those with another best class first, then by error.

    Parameters
    ----------
    count : int
        How many, from 0.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[WorstImage] = []
        self._seen = 0

    def add(
        self, scores: tuple[Array, Array], best: tuple[Array, Array], labels: Array | None
    ) -> None:
        """Take in one batch.

        Parameters
        ----------
        scores : tuple of two ndarrays of shape (n, classes)
            Of the original and of the converted model.
        best : tuple of two ndarrays of shape (n,), int64
            Their best classes; −1 where a score is not finite.
        labels : ndarray of shape (n,), int64, or None
        """
        errors = _errors(*scores)
        order = np.lexsort((-errors, best[0] == best[1]))[: self._count]
        self._kept += [
            WorstImage(
                index=self._seen + int(row),
                original=int(best[0][row]),
                converted=int(best[1][row]),
                label=None if labels is None else int(labels[row]),
                error=float(errors[row]) if np.isfinite(errors[row]) else None,
            )
            for row in order
        ]
        self._kept.sort(key=_rank)
        del self._kept[self._count :]
        self._seen += len(errors)

    def images(self, data: CalibrationSet) -> tuple[WorstImage, ...]:
        """Return them, worst first, with their files and pictures where `data` has image files."""
        return tuple(_pictured(each, data) for each in self._kept)


def _rank(image: WorstImage) -> tuple[bool, float, int]:
    error = math.inf if image.error is None else image.error
    return image.original == image.converted, -error, image.index


def _errors(first: Array, second: Array) -> npt.NDArray[np.float64]:
    """Relative error of each row, shape (n,)."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(all="ignore"):  # what is no number becomes infinite below
        error = np.linalg.norm(other - one, axis=1)
        size = np.linalg.norm(one, axis=1)
        relative = np.where(error == 0, 0.0, error / size)
    return np.where(np.isfinite(relative), relative, np.inf)


def _pictured(image: WorstImage, data: CalibrationSet) -> WorstImage:
    path = image_file(data, image.index)
    if path is None:
        return image
    picture = base64.b64encode(thumbnail(path)).decode()
    return replace(image, file=str(path), picture=picture)
