"""How a converted network stands beside its original on held-out images, under onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from converter.config import Runtime
from converter.refine.images import Images, mirror_images
from converter.refine.loss import answers_differ, holds_scores, mean_scores
from converter.refine.networks import Networks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["JUDGED_TOGETHER", "Judge", "Judgement"]

JUDGED_TOGETHER = 256
"""Held-out images that are run at once."""


@dataclass(frozen=True)
class Judgement:
    """How a converted model stands beside its original on the held-out images, under onnxruntime.

    Attributes
    ----------
    loss : float
        `answers_differ` of the outputs from what is learned; infinite where an answer is not finite.
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
        runtime: Runtime,
        temperature: float,
    ) -> None:
        self._networks, self._images, self._runtime = networks, images, runtime
        self._temperature = temperature
        self._original = self._wanted = self._answers(0, original)
        if networks.mirrored:
            turned = self._answers(0, original, mirror_images)
            self._wanted = mean_scores(self._original, turned, networks.outputs)

    def _answers(
        self,
        which: int,
        model: onnx.ModelProto,
        seen: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    ) -> dict[str, Tensor]:
        """Run a model on the images as they are `seen`."""
        import torch

        answers = self._networks.under_onnxruntime(which, model, self._runtime)
        batches = (
            self._images.batch(rows, "cpu") for rows in self._images.in_order(JUDGED_TOGETHER)
        )
        parts = [
            answers({name: feed.numpy() for name, feed in seen(feeds).items()}) for feeds in batches
        ]
        return {
            name: torch.from_numpy(np.concatenate([part[name] for part in parts])).double()
            for name in self._networks.outputs
        }

    def judge(self, model: onnx.ModelProto) -> Judgement:
        """Say how far a model's answers are from the original's."""
        found = self._answers(1, model)
        outputs = self._networks.outputs
        # in float64 and from 0: round-off must not make a model better than one that answers alike
        loss = max(0.0, float(answers_differ(found, self._wanted, outputs, self._temperature)))
        scores = next((name for name in outputs if holds_scores(self._original[name])), None)
        agreement = None
        if scores is not None:
            same = found[scores].argmax(1) == self._original[scores].argmax(1)
            agreement = float(same.float().mean())
        return Judgement(loss if math.isfinite(loss) else math.inf, agreement)
