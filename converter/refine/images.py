"""Images that a network is trained on: held in memory, drawn in batches, flipped and shifted.

What is drawn depends on the seed and the number of the step alone, so that a run which goes on from a
checkpoint sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.sets import CalibrationSet
from converter.calibration.subset import Subset
from converter.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Images", "augmented", "holds_images", "load_images", "mirror_images"]

_COLOURS = (1, 3, 4)
"""Channels that an image may have; an axis of such a length tells the layout."""
_REACH = 1 / 16
"""Images are shifted by up to this share of their sides, rounded to pixels."""
_APART = 2048
"""Images after which they have their next turn."""
_READ = 256
_SEEN = 16
"""Images by which it is decided how all are held."""
_HALF = float(np.finfo(np.float16).max)
_COARSE = 0.005
"""Share of an image's standard deviation that rounding may be off by."""


class Images:
    """Samples in memory, those of floating-point type in half precision where that tells them apart.

    Parameters
    ----------
    feeds : dict of str to ndarray of shape (n, ...)
    labels : ndarray of shape (n,), int64, or None
    """

    def __init__(
        self, feeds: dict[str, NDArray[Any]], labels: NDArray[np.int64] | None = None
    ) -> None:
        self.feeds = feeds
        self.labels = labels

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def split(self, every: int, most: int) -> tuple[Images, Images]:
        """Return the images to train on, and every so-manieth, at most so many, that are held out."""
        held = np.zeros(len(self), bool)
        chosen = np.flatnonzero(np.arange(len(self)) % every == every - 1)
        held[chosen[:: max(1, -(-len(chosen) // most))]] = True
        return self._picked(~held), self._picked(held)

    def _picked(self, rows: NDArray[Any]) -> Images:
        feeds = {name: feed[rows] for name, feed in self.feeds.items()}
        return Images(feeds, None if self.labels is None else self.labels[rows])

    def batch(self, rows: NDArray[Any] | slice, device: str) -> dict[str, Tensor]:
        """Give some of them as tensors, floating-point ones in float32."""
        import torch

        tensors = {}
        for name, feed in self.feeds.items():
            tensor = torch.from_numpy(np.ascontiguousarray(feed[rows])).to(device)
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        return tensors

    def passes(self, steps: int, size: int, turns: int = 1) -> int:
        """Say how many whole passes some steps of `seen_at` make."""
        return steps // (turns * (len(self) // min(size, len(self))))

    def variant(
        self, rows: NDArray[Any] | slice, device: str, ways: tuple[str, ...], seed: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Give some of them `augmented`: the same way for the same image and seed."""
        feeds = self.batch(rows, device)
        return augmented(feeds, ways, self.chances(rows, seed)) if ways else feeds

    def classes(self, rows: NDArray[Any] | slice, device: str) -> Tensor | None:
        """Give the labels of some of them; None where there are none."""
        import torch

        return None if self.labels is None else torch.from_numpy(self.labels[rows]).to(device)

    def seen_at(
        self, step: int, size: int, seed: int, turns: int = 1
    ) -> tuple[NDArray[np.int64], int, int]:
        """Say which images a step sees, in which pass over all of them, and in which of its turns.

        Each pass goes through all images in an order of its own. Where it has several turns, that order is
        cut into runs of about `_APART` images, and each run is seen in all turns, each time in another order,
        before the next one begins: so training for less than a pass has all turns too.

        Parameters
        ----------
        step, size : int
            Number of the step, and its images.
        seed : int
        turns : int, default 1
            How often a pass sees each image.

        Returns
        -------
        tuple of (ndarray of shape (size,), int64, int, int)
            Rows, number of the pass, number of the turn.
        """
        size = min(size, len(self))
        steps, most = len(self) // size, max(1, _APART // size)
        seen, at = divmod(step, turns * steps)
        first = at // (turns * most) * most
        steps = min(most, steps - first)
        turn, at = divmod(at - turns * first, steps)
        order = np.random.default_rng((seed, seen)).permutation(len(self))
        rows = order[first * size : (first + steps) * size]
        if turn:
            rows = np.random.default_rng((seed, seen, first, turn)).permutation(rows)
        return rows[at * size : (at + 1) * size], seen, turn

    def chances(
        self, rows: NDArray[np.int64] | slice, seed: tuple[int, ...]
    ) -> NDArray[np.float64]:
        """Give what decides how some images are changed, (n, 3): the same for the same image and seed."""
        return np.random.default_rng(seed).random((len(self), 3))[rows]

    def in_order(self, size: int) -> Iterator[slice]:
        """Give slices of `size` that cover all images once."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


def load_images(data: CalibrationSet, memory_mib: int) -> tuple[Images, tuple[str, ...]]:
    """Read images into memory, evenly fewer of them where all do not fit.

    Parameters
    ----------
    data : CalibrationSet
    memory_mib : int
        Bound on what is held, in MiB.

    Returns
    -------
    tuple of (Images, tuple of str)
        The images, and a note where they are fewer.

    Raises
    ------
    CalibrationError
        Where not even 16 fit, or the set has none.
    """
    first = next(iter(data.batches(_SEEN)), None)
    if first is None:
        raise CalibrationError(f"{data.describe()} has no images; give a folder that has some")
    kinds = {name: _kept_type(feed) for name, feed in first.feeds.items()}
    one = sum(
        math.prod(feed.shape[1:]) * kinds[name].itemsize for name, feed in first.feeds.items()
    )
    fitting = memory_mib * 2**20 // max(one, 1)
    if fitting < 16:
        raise CalibrationError(
            f"16 images take more than {memory_mib} MiB; raise the memory, or use smaller images"
        )
    notes: tuple[str, ...] = ()
    if fitting < len(data):
        notes = (
            f"{fitting} of {len(data)} images are trained on, so that they stay within "
            f"{memory_mib} MiB; more memory allows more",
        )
        data = Subset(data, fitting)
    count = len(data)
    feeds = {
        name: np.empty((count, *feed.shape[1:]), kinds[name]) for name, feed in first.feeds.items()
    }
    labels: list[NDArray[np.int64]] = []
    done = 0
    for batch in data.batches(_READ):
        for name, feed in batch.feeds.items():
            _require_held(name, feed, kinds[name])
            feeds[name][done : done + batch.count] = feed[: batch.count]
        if batch.labels is not None:
            labels.append(batch.labels)
        done += batch.count
    return Images(feeds, np.concatenate(labels) if labels else None), notes


def _kept_type(feed: NDArray[Any]) -> np.dtype[Any]:
    """Floating-point numbers are held in half precision, those that it would not tell apart in float32."""
    if feed.dtype.kind != "f":
        return feed.dtype
    if not float(np.abs(feed).max(initial=0)) < _HALF / 2:
        return np.dtype(np.float32)
    lost = feed.astype(np.float64) - feed.astype(np.float16)
    coarse = float(lost.std()) > _COARSE * float(feed.std(dtype=np.float64))
    return np.dtype(np.float32 if coarse else np.float16)


def _require_held(name: str, feed: NDArray[Any], kind: np.dtype[Any]) -> None:
    if kind == np.float16 and float(np.abs(feed).max(initial=0)) > _HALF:
        raise CalibrationError(
            f"the input {name!r} has values beyond {_HALF:,.0f}, which half precision does not hold, and "
            "none of them in its first images; scale them down, or convert without recovery"
        )


def augmented(
    feeds: dict[str, Tensor],
    ways: tuple[str, ...],
    chances: NDArray[np.float64],
) -> dict[str, Tensor]:
    """Flip and shift images; arrays that are no images stay as they are.

    Parameters
    ----------
    feeds : dict of str to Tensor of shape (n, ...)
    ways : tuple of str
        Of "flip" (left to right, half of them) and "shift" (up to a sixteenth of each side, the edge
        mirrored).
    chances : ndarray of shape (n, 3)
        What decides it for each image, from 0 and below 1: `Images.chances`.
    """
    return {
        name: _changed(feed, ways, chances) if _axes(feed) else feed for name, feed in feeds.items()
    }


def holds_images(feeds: Mapping[str, Tensor]) -> bool:
    """Whether any of the arrays holds images, of one, three or four colours."""
    return any(_axes(feed) is not None for feed in feeds.values())


def mirror_images(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn images left to right; arrays that are no images stay as they are."""
    turned = {}
    for name, feed in feeds.items():
        axes = _axes(feed)
        turned[name] = feed if axes is None else feed.flip(axes[1])
    return turned


def _axes(feed: Tensor) -> tuple[int, int] | None:
    """Height and width of an image batch; None for anything else."""
    if feed.ndim != 4 or not feed.is_floating_point():
        return None
    if feed.shape[1] in _COLOURS:
        return 2, 3
    return (1, 2) if feed.shape[3] in _COLOURS else None


def _changed(feed: Tensor, ways: tuple[str, ...], chances: NDArray[np.float64]) -> Tensor:
    import torch

    axes = _axes(feed)
    assert axes is not None, "only images get here"
    images = feed if axes == (2, 3) else feed.permute(0, 3, 1, 2)
    count, _, high, wide = images.shape
    rows = np.broadcast_to(np.arange(high), (count, high))
    columns = np.broadcast_to(np.arange(wide), (count, wide))
    if "shift" in ways:
        rows = _mirrored(rows + _moves(chances[:, :1], high), high)
        columns = _mirrored(columns + _moves(chances[:, 1:2], wide), wide)
    if "flip" in ways:
        columns = np.where(chances[:, 2:] < 0.5, columns[:, ::-1], columns)
    at = torch.arange(count)[:, None, None]
    down = torch.from_numpy(np.ascontiguousarray(rows))[:, :, None]
    across = torch.from_numpy(np.ascontiguousarray(columns))[:, None, :]
    # channels last for the pick, so that each pixel's values are copied at once
    picked = images.permute(0, 2, 3, 1)[at, down, across]
    return picked.permute(0, 3, 1, 2) if axes == (2, 3) else picked


def _moves(chances: NDArray[np.float64], side: int) -> NDArray[np.int64]:
    reach = int(side * _REACH + 0.5)
    return np.floor(chances * (2 * reach + 1)).astype(np.int64) - reach


def _mirrored(places: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Bring places beyond an edge back, as in a mirror that stands on the outermost pixel."""
    within = np.abs(places)
    return np.where(within >= side, 2 * (side - 1) - within, within)
