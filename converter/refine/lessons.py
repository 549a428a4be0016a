"""What the original answers to the images that a network is trained on.

An image is seen in a few variants, flipped and shifted otherwise in each pass. What the original answers to a
variant is kept, and not computed again when that one's turn comes once more: at a seventh of the
multiply-accumulates, the original has two thirds of those of a step.

Where all answers are means over an image and its mirror image, they are the same for both. If images are
flipped and answers kept, each variant is then seen as it is and soon after turned round, and the original is
asked for the first alone: a short training, in which it has most of the work, makes up to twice the steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.config import RecoverySettings
from converter.refine.images import Images, augmented, mirror_images
from converter.refine.networks import Networks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "Lessons"]

VARIANTS = 6
"""Ways in which an image is seen, where so many answers can be kept; else each pass has its own."""
_SHARE = 4
"""Answers take up to a quarter of the memory that images may."""


class Lessons:
    """Images to learn from, and what the original answers to them.

    Parameters
    ----------
    networks : Networks
    images : Images
    settings : RecoverySettings
    earlier : Lessons or None, default None
        Those of another converted network, with the same original and images: what it answered is kept.

    Attributes
    ----------
    variants : int or None
        None where answers are too large to be kept: then each pass is a variant of its own.
    """

    def __init__(
        self,
        networks: Networks,
        images: Images,
        settings: RecoverySettings,
        earlier: Lessons | None = None,
    ) -> None:
        self._networks, self._images, self._settings = networks, images, settings
        self._known: Tensor
        self._answers: dict[str, Tensor]
        self._known, self._answers = (
            self._room() if earlier is None else (earlier._known, earlier._answers)
        )
        self.variants = len(self._known) or None
        # what is no score of a class, as a map, is another one for the mirror image
        scores_alone = all(each.ndim == 3 and each.shape[2] >= 2 for each in self._answers.values())
        flipped = networks.mirrored and "flip" in settings.augment
        self._turns = 2 if flipped and scores_alone and self.variants is not None else 1

    def _room(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Make room for answers, none where they are too many, and for which of them are known."""
        import torch

        settings, outputs = self._settings, self._networks.outputs
        probe = self._networks.original(self._images.batch(slice(0, 2), settings.device))
        shapes = {name: tuple(probe[name].shape[1:]) for name in outputs}
        each = sum(4 * math.prod(shape) for shape in shapes.values()) * len(self._images)
        wanted = VARIANTS if settings.augment else 1
        fits = wanted * each <= settings.memory_mib * 2**20 // _SHARE
        of_images = all(probe[name].shape[:1] == (2,) for name in outputs)
        held = (wanted if fits and of_images else 0, len(self._images))
        answers = {name: torch.empty(*held, *shape) for name, shape in shapes.items()}
        return torch.zeros(held, dtype=torch.bool), answers

    def lesson(
        self, step: int, size: int, casting: Any
    ) -> tuple[NDArray[np.int64], dict[str, Tensor], dict[str, Tensor]]:
        """Give the rows of a step, its images, and what the original answers.

        Inner responses are among the answers where a variant is new; else outputs alone are, also
        where the original has to be asked, so that a run which goes on from a checkpoint learns the same.

        Parameters
        ----------
        step, size : int
            Number of the step, and its images.
        casting : context manager
            What the original runs under.
        """
        settings, images = self._settings, self._images
        rows, seen, turn = images.seen_at(step, size, settings.seed, self._turns)
        variant = seen if self.variants is None else seen % self.variants
        feeds = images.batch(rows, settings.device)
        if settings.augment:
            chances = images.chances(rows, (settings.seed, 1, variant))
            feeds = augmented(feeds, settings.augment, chances)
        if turn:
            feeds = mirror_images(feeds)
        if self.variants is not None and bool(self._known[variant, rows].all()):
            kept = {name: each[variant, rows] for name, each in self._answers.items()}
            return rows, feeds, {name: each.to(settings.device) for name, each in kept.items()}
        with casting:
            answers = self._networks.original(feeds)
        if self.variants is not None:
            for name, each in self._answers.items():
                each[variant, rows] = answers[name].float().cpu()
            self._known[variant, rows] = True
            if seen != variant or turn:  # not for the first time
                answers = {name: answers[name] for name in self._answers}
        return rows, feeds, answers
