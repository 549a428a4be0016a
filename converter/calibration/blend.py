"""Calibration samples together with blends of two of them.

A network that was trained to the end answers its own training images with certainty: behind the last
layers they lie in a few points, one for each class, and fits on them learn nothing of the directions
between these points, where the images lie that it is less sure of. On a VGG-16 the error on images that
it had not been trained on was 3.6 times that on the calibration images. A blend of two images is such an
uncertain image, and needs no label. (Zhang, Cisse, Dauphin, Lopez-Paz, "mixup", arXiv:1710.09412, trained
on such blends; here the network only answers them.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.sets import CalibrationSet, Item, SampleSet, Subset

__all__ = ["Blended", "can_blend"]

POOL = 64
"""Samples, spread over the set, that others are blended with; they stay in memory."""
SHARES = (0.5, 0.9)
"""Share of a sample in its blend, drawn evenly between these."""


def can_blend(data: CalibrationSet) -> bool:
    """Whether a set has at least two samples, of floating-point inputs alone."""
    first = next(iter(data.batches(1)), None)
    return (
        first is not None
        and len(data) > 1
        and all(feed.dtype.kind == "f" for feed in first.feeds.values())
    )


class Blended(SampleSet):
    """A set in which a blend stands beside each sample: twice as many.

    Parameters
    ----------
    whole : CalibrationSet
        For which `can_blend` holds.
    seed : int
        Seed of partners and shares, from 0.
    """

    def __init__(self, whole: CalibrationSet, seed: int = 0) -> None:
        self._whole = whole
        self._seed = seed
        self._pool: list[dict[str, NDArray[Any]]] = []

    def __len__(self) -> int:
        """Return the number of samples, blends included."""
        return 2 * len(self._whole)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None: a blend has no class."""
        return None

    def describe(self) -> str:
        """Say what these are."""
        return f"{self._whole.describe()}, and as many blends of two of them"

    def digest(self) -> str:
        """Return a SHA-256 over the other set's and the seed."""
        return hashlib.sha256(f"{self._whole.digest()} blended {self._seed}".encode()).hexdigest()

    def _samples(self) -> Generator[Item, None, None]:
        partners = self._partners()
        random = np.random.default_rng(self._seed)
        for batch in self._whole.batches(32):
            for row in range(batch.count):
                own = {name: array[row] for name, array in batch.feeds.items()}
                other = partners[int(random.integers(len(partners)))]
                share = random.uniform(*SHARES)
                blend = {
                    name: (share * value + (1 - share) * other[name]).astype(value.dtype)
                    for name, value in own.items()
                }
                pair = [Item(own, None), Item(blend, None)]
                if random.integers(2):  # so that every second, or eighth, sample is not always a blend
                    pair.reverse()
                yield from pair

    def _partners(self) -> list[dict[str, NDArray[Any]]]:
        """Samples spread evenly over the set, read once."""
        if not self._pool:
            chosen = Subset(self._whole, POOL) if len(self._whole) > POOL else self._whole
            for batch in chosen.batches(32):
                for row in range(batch.count):
                    self._pool.append(
                        {name: array[row].copy() for name, array in batch.feeds.items()}
                    )
        return self._pool
