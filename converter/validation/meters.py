"""What the outputs of two models say, taken in batch by batch.

Sums, maxima and counts are exact over all images. Medians and quantiles are exact up to `SAMPLE` elements of
an output; beyond that they come from a uniform random sample of so many, so memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from converter.scores import holds_scores, in_rows
from converter.validation.findings import ENOUGH_IMAGES, Accuracy, Agreement, OutputComparison
from converter.worst import Worst

__all__ = ["SAMPLE", "Array", "Comparison", "Meter"]

SAMPLE = 2**20
"""Elements of each output that are kept for quantiles."""
Array: TypeAlias = NDArray[Any]


class Meter:
    """Running comparison of one output."""

    def __init__(self, name: str, sample: int = SAMPLE) -> None:
        self.name = name
        self.elements = 0
        self.finite = 0
        self.nonfinite = [0, 0]
        self.highest = -math.inf
        self.lowest = math.inf
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.sum_squares = 0.0
        self.sum_original = 0.0
        self.tolerance = 0.0
        self._sample = sample
        self._random = np.random.default_rng(0)
        self._errors: Array = np.empty(0)
        self._keys: Array = np.empty(0)

    def add(self, original: Array, converted: Array) -> None:
        """Take in one batch; the arrays have the same shape."""
        for start in range(0, original.size, SAMPLE):
            part = slice(start, start + SAMPLE)
            self._add(
                original.ravel()[part].astype(np.float64),
                converted.ravel()[part].astype(np.float64),
            )

    def _add(self, first: Array, second: Array) -> None:
        good = np.isfinite(first) & np.isfinite(second)
        self.elements += first.size
        self.finite += int(good.sum())
        self.nonfinite[0] += int((~np.isfinite(first)).sum())
        self.nonfinite[1] += int((~np.isfinite(second)).sum())
        first, second = first[good], second[good]
        if not first.size:
            return
        errors = np.abs(second - first)
        self.highest = max(self.highest, float(first.max()))
        self.lowest = min(self.lowest, float(first.min()))
        self.max_abs = max(self.max_abs, float(errors.max()))
        self.sum_abs += float(errors.sum())
        self.sum_squares += float(errors @ errors)
        self.sum_original += float(first @ first)
        self.tolerance = max(self.tolerance, float((errors / (1.0 + np.abs(first))).max()))
        self._keep(errors)

    def _keep(self, errors: Array) -> None:
        """Keep the elements with the smallest random keys: a uniform sample without replacement."""
        self._errors = np.concatenate((self._errors, errors))
        self._keys = np.concatenate((self._keys, self._random.random(errors.size)))
        if self._errors.size > self._sample:
            kept = np.argpartition(self._keys, self._sample)[: self._sample]
            self._errors, self._keys = self._errors[kept], self._keys[kept]

    def result(self) -> OutputComparison:
        """Return what was seen so far."""
        span = self.highest - self.lowest
        any_finite = self.finite > 0
        return OutputComparison(
            name=self.name,
            elements=self.elements,
            max_abs=self.max_abs if any_finite else None,
            mean_abs=self.sum_abs / self.finite if any_finite else None,
            median_abs=float(np.median(self._errors)) if any_finite else None,
            p99_abs=float(np.quantile(self._errors, 0.99)) if any_finite else None,
            span=span if any_finite else None,
            max_relative=_relative(self.max_abs, span) if any_finite else None,
            relative_l2=_relative(math.sqrt(self.sum_squares), math.sqrt(self.sum_original))
            if any_finite
            else None,
            tolerance=self.tolerance if any_finite else None,
            sampled=self._errors.size if self._errors.size < self.finite else None,
            nonfinite_original=self.nonfinite[0],
            nonfinite_converted=self.nonfinite[1],
        )


def _relative(error: float, size: float) -> float | None:
    if size > 0:
        return error / size
    return 0.0 if error == 0 else None


class Comparison:
    """Running comparison of all outputs, and of the classes where one output holds scores."""

    def __init__(self, names: Sequence[str], worst: int) -> None:
        self.meters = [Meter(name) for name in names]
        self.worst = Worst(worst)
        self.images = 0
        self.notes: list[str] = []
        self.scores: str | None = None
        self.classes = 0
        self._alike = 0
        self._alike_five = 0
        self._labelled = 0
        self._right = [0, 0]
        self._lost = 0
        self._won = 0
        self._classes_seen: set[int] = set()  # in the original's answers
        # of images with labels: how often the original answers each class, and how often each is the label
        self._answered: NDArray[np.int64] = np.zeros(0, np.int64)
        self._labels: NDArray[np.int64] = np.zeros(0, np.int64)

    def choose_scores(self, outputs: Sequence[Array], count: int) -> None:
        """Take the first float output of shape (batch, classes ≥ 2) for scores.

        Trailing axes of length 1 are left aside.
        """
        for meter, output in zip(self.meters, outputs, strict=True):
            scored = holds_scores(output) and len(output) == count
            if scored and output.dtype.kind == "f":
                self.scores, self.classes = meter.name, output.shape[1]
                self._answered = np.zeros(self.classes, np.int64)
                self._labels = np.zeros(self.classes, np.int64)
                return
        self.notes.append(
            "no output has one score for each class, so agreement and accuracy are left out"
        )

    def add(self, pairs: Sequence[tuple[Array, Array]], count: int, labels: Array | None) -> None:
        """Take in one batch of `count` images.

        `pairs` are the outputs of both models; `labels` has shape (count,), or is None.
        """
        self.images += count
        for meter, (first, second) in zip(self.meters, pairs, strict=True):
            meter.add(first, second)
            if meter.name == self.scores:
                self._add_scores(in_rows(first), in_rows(second), labels)

    def _add_scores(self, first: Array, second: Array, labels: Array | None) -> None:
        best = _best(first), _best(second)
        self.worst.add((first, second), best, labels)
        sound = (best[0] >= 0) & (best[1] >= 0)
        self._alike += int((sound & (best[0] == best[1])).sum())
        self._classes_seen.update(np.unique(best[0]).tolist())
        if self.classes > 5:
            five = np.argsort(-second, axis=1, kind="stable")[:, :5]
            self._alike_five += int((sound & (five == best[0][:, None]).any(axis=1)).sum())
        if labels is not None:
            right = [answers == labels for answers in best]
            self._labelled += len(labels)
            # a network may give one image more scores than another
            answered = best[0][(best[0] >= 0) & (best[0] < self.classes)]
            self._answered += np.bincount(answered, minlength=self.classes)
            self._labels += np.bincount(labels, minlength=self.classes)
            for model in (0, 1):
                self._right[model] += int(right[model].sum())
            self._lost += int((right[0] & ~right[1]).sum())
            self._won += int((right[1] & ~right[0]).sum())

    def agreement(self) -> Agreement | None:
        """Return how often both answer alike."""
        if self.scores is None:
            return None
        top5 = self._alike_five / self.images if self.classes > 5 else None
        return Agreement(output=self.scores, top1=self._alike / self.images, top5=top5)

    def accuracy(self) -> Accuracy | None:
        """Return how often each is right."""
        if not self._labelled:
            return None
        count, lost, won = self._labelled, self._lost, self._won
        # of one image at least: that none of a few differs says little
        spread = max(lost + won - (lost - won) ** 2 / count, 1.0)
        chance, chance_error = self._chance()
        return Accuracy(
            images=count,
            original=self._right[0] / count,
            converted=self._right[1] / count,
            drop_points=100.0 * (lost - won) / count,
            standard_error_points=100.0 * math.sqrt(spread) / count,
            lost=lost,
            won=won,
            chance=chance,
            chance_error=chance_error,
        )

    def _chance(self) -> tuple[float | None, float | None]:
        """Say how often the original would be right if labels had nothing to do with it, and ± how much."""
        if int((self._labels > 0).sum()) < 2:
            return None, None
        a, b = self._answered / self._labelled, self._labels / self._labelled
        chance = float(a @ b)
        variance = chance + chance**2 - float((a * b) @ (a + b))
        return chance, math.sqrt(max(variance, 0.0) / self._labelled)

    def doubts(self) -> tuple[str, ...]:
        """Say where agreement or accuracy would be near what was, whatever became of the model."""
        said = []
        accuracy = self.accuracy()
        if accuracy is not None and accuracy.by_chance:
            said.append(
                f"the original is right for {accuracy.original:.1%} of {accuracy.images:,} images, no more "
                "often than by chance, so a drop in accuracy says nothing: see that the class folders are in "
                "the order of the model's classes, and the images prepared as in its training"
            )
        if self.images >= ENOUGH_IMAGES and len(self._classes_seen) == 1:
            said.append(
                f"the original gives all {self.images:,} images the same best class, so agreement says "
                f"little; if output '{self.scores}' holds no scores of classes, look at its error"
            )
        return tuple(said)


def _best(scores: Array) -> NDArray[np.int64]:
    """Best class of each row, shape (batch,); −1 where a score is not finite."""
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), -1)
