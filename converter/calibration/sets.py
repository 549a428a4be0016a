"""Calibration sets: samples for a model, from images, arrays or a data reader, batch by batch.

Every set can be gone through again and again and gives the same samples in the same order. None of
them holds more than one batch and a bounded look-ahead, except a data reader that cannot start
again, whose samples are kept within a bound. `opening` makes them, of what the user has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from converter.errors import CalibrationError

__all__ = ["Batch", "CalibrationSet", "DataReader", "ModelInput", "fixed_batch", "padded"]


@dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes
    ----------
    name : str
        Its name in the graph.
    shape : tuple of (int, str or None)
        Its shape, batch first; a name or None stands for a size that is not fixed.
    dtype : numpy.dtype
        Type of its elements.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, ready to be fed.

    Attributes
    ----------
    feeds : dict of str to ndarray of shape (n, ...)
        One array for each of the model's inputs; n is `count`, or more after `padded`.
    labels : ndarray of shape (count,), int64, or None
        Class of each real sample, where the set has classes.
    count : int
        How many samples are real.
    """

    feeds: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    count: int


@runtime_checkable
class CalibrationSet(Protocol):
    """Samples for a model; each iteration gives the same ones in the same order."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Give all samples in batches of `size`; the last one has what is left."""

    def describe(self) -> str:
        """Say in a few words what the samples are and where they come from."""

    def digest(self) -> str:
        """Return a SHA-256 over the samples' content, in hexadecimal."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, where the set has named ones."""


@runtime_checkable
class DataReader(Protocol):
    """What `onnxruntime.quantization.CalibrationDataReader` asks of its subclasses."""

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the next feeds, of any batch size, or None at the end."""


def fixed_batch(inputs: Sequence[ModelInput]) -> int | None:
    """Return the batch size that the model's inputs insist on; None where they take any.

    Raises
    ------
    CalibrationError
        Where an input has no batch axis, or two of them insist on different sizes.
    """
    sizes: dict[int, str] = {}
    for each in inputs:
        if not each.shape:
            raise CalibrationError(
                f"the model's input {each.name!r} has no batch axis; give a model whose inputs "
                "all have the batch first"
            )
        batch = each.shape[0]
        if isinstance(batch, int) and batch > 0:
            sizes.setdefault(batch, each.name)
    if len(sizes) > 1:
        (first, name), (second, other) = list(sizes.items())[:2]
        raise CalibrationError(
            f"the model's inputs {name!r} and {other!r} have the batches {first} and {second}; "
            "give a model whose inputs agree"
        )
    return next(iter(sizes), None)


def padded(batch: Batch, size: int) -> Batch:
    """Return the batch with its last sample repeated up to `size`; `count` and labels stay.

    Raises
    ------
    ValueError
        Where the batch has more than `size` samples, or none.
    """
    held = next(iter(batch.feeds.values())).shape[0]
    if held == size:
        return batch
    if not 0 < held < size:
        raise ValueError(f"a batch of {held} cannot be filled up to {size}")
    feeds = {
        name: np.concatenate([array, np.repeat(array[-1:], size - held, axis=0)])
        for name, array in batch.feeds.items()
    }
    return replace(batch, feeds=feeds)
