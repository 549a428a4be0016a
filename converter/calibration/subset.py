"""Calibration sets that are a part of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence

from converter.calibration.samples import Sample, SampleSet, spread
from converter.calibration.sets import CalibrationSet

__all__ = ["Subset"]


class Subset(SampleSet):
    """Some samples of another set, spread evenly over it.

    Parameters
    ----------
    whole : CalibrationSet
        The other set; where its samples cannot be picked, it is gone through whole.
    images : int
        How many samples, from 1.
    """

    def __init__(self, whole: CalibrationSet, images: int) -> None:
        self._whole = whole
        self._chosen = spread(len(whole), images)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._chosen)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the other set."""
        return self._whole.class_names

    def whole_and_position(self, index: int) -> tuple[CalibrationSet, int]:
        """Return the other set, and where a sample of this one stands in it."""
        return self._whole, self._chosen[index]

    def describe(self) -> str:
        """Say how many samples these are, and of what."""
        return f"{len(self)} of {self._whole.describe()}"

    def digest(self) -> str:
        """Return a SHA-256 over the other set's and the choice of samples."""
        return hashlib.sha256(f"{self._whole.digest()} {self._chosen}".encode()).hexdigest()

    def _samples(self) -> Generator[Sample, None, None]:
        return self.picked(range(len(self)))

    def picked(self, positions: Sequence[int]) -> Generator[Sample, None, None]:
        """Give the samples at some rising positions."""
        rows = [self._chosen[position] for position in positions]
        if isinstance(self._whole, SampleSet):
            yield from self._whole.picked(rows)
            return
        chosen, last, position = set(rows), rows[-1], 0
        for batch in self._whole.batches(32):
            for row in range(batch.count):
                if position in chosen:
                    feeds = {name: array[row] for name, array in batch.feeds.items()}
                    yield Sample(feeds, None if batch.labels is None else int(batch.labels[row]))
                position += 1
            if position > last:
                return
