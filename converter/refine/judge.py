"""How a converted network stands beside its original on held-out images, under onnxruntime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from converter.config import Runtime
from converter.refine.images import Images
from converter.refine.loss import answers_differ, holds_scores
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
        `answers_differ` of the outputs; infinite where an answer is not finite.
    agreement : float or None
        Share of images with the same best class; None for networks that are no classifiers.
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
        self._wanted = self._answers(0, original)

    def _answers(self, which: int, model: onnx.ModelProto) -> dict[str, Tensor]:
        import torch

        answers = self._networks.under_onnxruntime(which, model, self._runtime)
        parts = [
            answers({name: feed.numpy() for name, feed in self._images.batch(rows, "cpu").items()})
            for rows in self._images.in_order(JUDGED_TOGETHER)
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
        scores = next((name for name in outputs if holds_scores(self._wanted[name])), None)
        agreement = None
        if scores is not None:
            same = found[scores].argmax(1) == self._wanted[scores].argmax(1)
            agreement = float(same.float().mean())
        return Judgement(loss if math.isfinite(loss) else math.inf, agreement)
