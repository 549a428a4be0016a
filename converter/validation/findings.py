"""What a comparison of two models says: a record for each question, and all of them together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from converter.latency import Speedup, Timing
from converter.worst import WorstImage

__all__ = [
    "ENOUGH_IMAGES",
    "Accuracy",
    "Agreement",
    "Latency",
    "OutputComparison",
    "Size",
    "Validation",
]

ENOUGH_IMAGES = 100
"""Of fewer images it cannot be told whether a model is right by chance, or answers all alike."""


@dataclass(frozen=True)
class OutputComparison:
    """How far one output of the converted model is from the original's, over all images.

    Errors are taken over the elements that are finite in both; None where there are none.

    Attributes
    ----------
    name : str
    elements : int
        Elements compared, over all images.
    max_abs, mean_abs, median_abs, p99_abs : float or None
        Of |converted − original|.
    span : float or None
        Largest minus smallest element of the original.
    max_relative : float or None
        `max_abs` over `span`; 0 where both are 0, None where only `span` is.
    relative_l2 : float or None
        ‖converted − original‖ / ‖original‖; as `max_relative` where that is 0.
    tolerance : float or None
        The t that would have been enough in |converted − original| ≤ t + t·|original|.
    sampled : int or None
        Elements that the median and the quantile were taken from, where not all of them.
    nonfinite_original, nonfinite_converted : int
        Elements that are NaN or infinite.
    """

    name: str
    elements: int
    max_abs: float | None
    mean_abs: float | None
    median_abs: float | None
    p99_abs: float | None
    span: float | None
    max_relative: float | None
    relative_l2: float | None
    tolerance: float | None
    sampled: int | None
    nonfinite_original: int
    nonfinite_converted: int


@dataclass(frozen=True)
class Agreement:
    """How often the two models answer alike, from 0 to 1, without labels.

    Attributes
    ----------
    output : str
        The output that was taken for the scores of classes.
    top1 : float
        Share of images with the same best class. An image with a non-finite score never agrees.
    top5 : float or None
        Share of images whose best class in the original is among the five best of the converted
        model; None with five classes or fewer.
    """

    output: str
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of both models on the labelled images.

    An image with a non-finite score counts as wrong.

    Attributes
    ----------
    images : int
    original, converted : float
        Share of right answers, from 0 to 1.
    drop_points : float
        Original minus converted, in percentage points; negative where the converted model is
        better.
    standard_error_points : float
        Standard error of `drop_points`, in percentage points, from the images that only one model
        gets right (as in McNemar's test, 1947): √(b + c − (b − c)²/n) / n for b lost and c won
        images of n.
    lost, won : int
        Images that only the original, and only the converted model gets right.
    chance, chance_error : float or None, default None
        Share that the original would get right if its answers had nothing to do with the labels, Σ_c a_c b_c
        of the shares a of answers and b of labels, and its standard error, of that for κ without agreement
        (Fleiss, Cohen and Everitt 1969); None where all labels are one class.
    """

    images: int
    original: float
    converted: float
    drop_points: float
    standard_error_points: float
    lost: int
    won: int
    chance: float | None = None
    chance_error: float | None = None

    @property
    def by_chance(self) -> bool:
        """Whether the original is not surely right more often than by chance, of 100 images or more.

        Its classes are then likely in another order than the labels, or the images were prepared otherwise
        than in its training: a drop near 0 would say nothing.
        """
        if self.chance is None or self.chance_error is None or self.images < ENOUGH_IMAGES:
            return False
        return self.original < self.chance + 2.0 * self.chance_error


@dataclass(frozen=True)
class Latency:
    """Time for one batch size: both models measured in turns, or the reason why they were not."""

    batch: int
    original: Timing | None = None
    converted: Timing | None = None
    speedup: Speedup | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Size:
    """What one model weighs.

    Attributes
    ----------
    bytes : int
        Size of the model in one file, its external data within; of the weights alone over 2 GiB.
    params : int
        Parameters, as `converter.planner.cost` counts them.
    macs : int
        Multiply-accumulates of one sample, likewise.
    uncounted : tuple of str
        Layers inside If, Loop or Scan that `macs` misses.
    file, digest : str or None, default None
        The model's file and its SHA-256; None for a model that came from none.
    """

    bytes: int
    params: int
    macs: int
    uncounted: tuple[str, ...]
    file: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Validation:
    """What a conversion gained and cost.

    Attributes
    ----------
    images : int
        Images that both models saw.
    outputs : tuple of OutputComparison
        One for each output, in the original's order.
    agreement : Agreement or None
        None where no output looks like scores of classes.
    accuracy : Accuracy or None
        None where there are no labels or they do not fit the model.
    latencies : tuple of Latency
        One for each batch size that was asked for.
    original, converted : Size
    notes : tuple of str
        What was left out and why, one sentence each.
    data : str, default ""
        What the images are and where they come from.
    class_names : tuple of str or None, default None
        Names of the classes by number, where the images name one for each score.
    worst : tuple of WorstImage, default ()
        Images that they answer most differently, the worst first; () without scores of classes.
    """

    images: int
    outputs: tuple[OutputComparison, ...]
    agreement: Agreement | None
    accuracy: Accuracy | None
    latencies: tuple[Latency, ...]
    original: Size
    converted: Size
    notes: tuple[str, ...] = ()
    data: str = ""
    class_names: tuple[str, ...] | None = None
    worst: tuple[WorstImage, ...] = ()
    format: str = field(default="twofold-validation-1")

    @property
    def macs_reduction(self) -> float | None:
        """Original multiply-accumulates over converted ones; None where there are none left."""
        return _ratio(self.original.macs, self.converted.macs)

    @property
    def params_reduction(self) -> float | None:
        """Original parameters over converted ones; None where there are none left."""
        return _ratio(self.original.params, self.converted.params)

    @property
    def bytes_reduction(self) -> float | None:
        """Original size over converted size."""
        return _ratio(self.original.bytes, self.converted.bytes)

    @property
    def finite(self) -> bool:
        """Whether no output of the converted model has more non-finite elements than before."""
        return all(each.nonfinite_converted <= each.nonfinite_original for each in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings, numbers and None, fit for JSON."""
        plain = dataclasses.asdict(self)
        plain["macs_reduction"] = self.macs_reduction
        plain["params_reduction"] = self.params_reduction
        plain["bytes_reduction"] = self.bytes_reduction
        plain["finite"] = self.finite
        return plain


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None
