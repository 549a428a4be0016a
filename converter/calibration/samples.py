"""What the kinds of calibration set share: samples one by one, made into batches; even choices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.sets import Batch

__all__ = ["Sample", "SampleSet", "share", "spread"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample: its array for each input, without the batch axis, and its class."""

    feeds: dict[str, NDArray[Any]]
    label: int | None = None


class SampleSet(ABC):
    """A set that gives its samples one by one; batches are made of them here."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, where the set has named ones."""
        return None

    @abstractmethod
    def _samples(self) -> Generator[Sample, None, None]: ...

    def picked(self, positions: Sequence[int]) -> Generator[Sample, None, None]:
        """Give the samples at some rising positions; kinds that can do so read no others."""
        wanted, last = set(positions), positions[-1]
        with closing(self._samples()) as samples:
            for position, sample in enumerate(islice(samples, last + 1)):
                if position in wanted:
                    yield sample

    def batches(self, size: int) -> Iterator[Batch]:
        """Give all samples in batches of `size`; the last one has what is left.

        Raises
        ------
        CalibrationError
            Where a file or an array of the set cannot be used.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} is not possible; give at least 1")
        with closing(self._samples()) as samples:
            while chunk := list(islice(samples, size)):
                yield _batch_of(chunk)


def _batch_of(samples: Sequence[Sample]) -> Batch:
    feeds = {
        name: np.stack([sample.feeds[name] for sample in samples]) for name in samples[0].feeds
    }
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(feeds, np.array(labels, np.int64) if labels else None, len(samples))


def spread(total: int, wanted: int | None) -> list[int]:
    """Return `wanted` rising positions below `total`: the middles of as many equal parts."""
    if wanted is None or wanted >= total:
        return list(range(total))
    if wanted < 1:
        raise ValueError(f"{wanted} samples are too few; ask for at least 1")
    return [(2 * index + 1) * total // (2 * wanted) for index in range(wanted)]


def share(used: int, found: int) -> str:
    """Say how many samples are used, and of how many where that is not all."""
    return str(used) if used == found else f"{used} of {found}"
