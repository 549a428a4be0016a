"""How a converted network stands beside its original on held-out images, under onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from converter.config import RecoverySettings, Runtime
from converter.refine.images import Images
from converter.refine.loss import lessons_differ
from converter.refine.networks import Networks
from converter.scores import holds_scores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Judge", "Judgement", "judged_together"]

_JUDGED_STEPS = 4
"""Held-out images that are run at once, in those of a step: without gradients they take less room."""
_JUDGED_BYTES = 2**24
"""Bytes of these images, in float32: what a network computes of large ones takes gigabytes."""


def judged_together(settings: RecoverySettings, images: Images) -> int:
    """Say how many held-out images run at once."""
    size = sum(4 * math.prod(feed.shape[1:]) for feed in images.feeds.values())
    return max(1, min(_JUDGED_STEPS * settings.batch, _JUDGED_BYTES // max(size, 1)))


@dataclass(frozen=True)
class Judgement:
    """How a converted model stands beside its original on the held-out images, under onnxruntime.

    Attributes
    ----------
    loss : float
        `lessons_differ` of the outputs from what is learned; infinite where an answer is not finite.
    agreement : float or None
        Share of images with the same best class as the original gives to the image alone; None for networks
        that are no classifiers.
    """

    loss: float
    agreement: float | None


class Judge:
    """Compares a converted model with the original on the held-out images, under onnxruntime."""

    def __init__(
        self,
        networks: Networks,
        original: onnx.ModelProto,
        images: Images,
        wanted: Mapping[str, Tensor],
        settings: RecoverySettings,
        runtime: Runtime,
    ) -> None:
        self._networks, self._images, self._runtime = networks, images, runtime
        self._settings = settings
        self._original = self._wanted = self._answers(0, original)
        if networks.mirrored:
            self._wanted = {name: each.cpu().double() for name, each in wanted.items()}

    def _answers(self, which: int, model: onnx.ModelProto) -> dict[str, Tensor]:
        """Run a model on the images."""
        import torch

        answers = self._networks.under_onnxruntime(which, model, self._runtime)
        batches = (
            self._images.batch(rows, "cpu")
            for rows in self._images.in_order(judged_together(self._settings, self._images))
        )
        parts = [answers({name: feed.numpy() for name, feed in feeds.items()}) for feeds in batches]
        return {
            name: torch.from_numpy(np.concatenate([part[name] for part in parts])).double()
            for name in self._networks.outputs
        }

    def judge(self, model: onnx.ModelProto) -> Judgement:
        """Say how far a model's answers are from the original's."""
        found = self._answers(1, model)
        outputs = self._networks.outputs
        classes = self._images.classes(slice(None), "cpu") if self._settings.labels else None
        # in float64 and from 0: round-off must not make a model better than one that answers alike
        differ = lessons_differ(found, self._wanted, outputs, self._settings.temperature, classes)
        loss = max(0.0, float(differ))
        scores = next((name for name in outputs if holds_scores(self._original[name])), None)
        agreement = None
        if scores is not None:
            same = found[scores].argmax(1) == self._original[scores].argmax(1)
            agreement = float(same.float().mean())
        return Judgement(loss if math.isfinite(loss) else math.inf, agreement)
