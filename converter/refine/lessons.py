"""What the original answers to the images that a network is trained on.

An image is seen in a few variants, flipped and shifted otherwise in each pass. What the original answers to a
variant is kept, and not computed again when that one's turn comes once more: at a seventh of the
multiply-accumulates, the original has two thirds of those of a step.

Where scores are means over an image and its mirror image, and answers are kept, those to all variants of an
image that were seen so far are averaged too, which costs nothing: what the original answers to an image that
is shifted by a little is as often right, and wrong in other places.

Such a mean is the same for an image and its mirror image. If images are flipped, each variant is then seen as
it is and soon after turned round, and the original is asked for the first alone: a short training, in which
it has most of the work, makes up to twice the steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.config import RecoverySettings
from converter.refine.images import Images, holds_images, mirror_images
from converter.refine.networks import Networks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "Lessons"]

VARIANTS = 6
"""Ways in which an image is seen, where so many answers can be kept; else each pass has its own."""
HELD_OUT_VARIANTS = 3
"""Those of held-out images that a mean is taken over."""
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
    averaged : bool
        Whether means over variants are learned.
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
        kept = networks.mirrored and scores_alone and self.variants is not None
        self._turns = 2 if kept and "flip" in settings.augment else 1
        # variants that earlier parts saw
        self._before: int = 0 if earlier is None else earlier._before
        self.averaged = kept and "shift" in settings.augment

    def _room(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Make room for answers, none where they are too many, and for which of them are known."""
        import torch

        settings, outputs = self._settings, self._networks.outputs
        feeds = self._images.batch(slice(0, 2), settings.device)
        probe = self._networks.original(feeds)
        shapes = {name: tuple(probe[name].shape[1:]) for name in outputs}
        each = sum(4 * math.prod(shape) for shape in shapes.values()) * len(self._images)
        wanted = VARIANTS if settings.augment and holds_images(feeds) else 1
        fits = wanted * each <= settings.memory_mib * 2**20 // _SHARE
        of_images = all(probe[name].shape[:1] == (2,) for name in outputs)
        held = (wanted if fits and of_images else 0, len(self._images))
        answers = {name: torch.empty(*held, *shape) for name, shape in shapes.items()}
        return torch.zeros(held, dtype=torch.bool), answers

    def lesson(
        self, step: int, size: int, casting: Any
    ) -> tuple[NDArray[np.int64], dict[str, Tensor], dict[str, Tensor]]:
        """Give the rows of a step, its images, and what is learned of them.

        Inner responses are among the answers where a variant is new; else outputs alone are, also
        where the original has to be asked, so that a run which goes on from a checkpoint learns the same.

        Parameters
        ----------
        step, size : int
            Number of the step, and its images.
        casting : context manager
            What the original runs under.
        """
        import torch

        images = self._images
        rows, seen, turn = images.seen_at(step, size, self._settings.seed, self._turns)
        variant = seen if self.variants is None else seen % self.variants
        feeds = self._seen(images, rows, variant)
        if turn:
            feeds = mirror_images(feeds)
        if self.variants is None:
            with casting:
                return rows, feeds, self._networks.original(feeds)
        first: dict[str, Tensor] = {}
        numbers = self._numbers(variant, seen)
        for number in numbers:
            if bool(self._known[number, rows].all()):
                continue
            asked = feeds if number == variant else self._seen(images, rows, number)
            with casting:
                answers = self._networks.original(asked)
            for name, each in self._answers.items():
                each[number, rows] = answers[name].float().cpu()
            self._known[number, rows] = True
            if number == seen and not turn:
                first = answers
        device = self._settings.device
        learned = {
            name: torch.stack([each[number, rows] for number in numbers]).mean(0).to(device)
            for name, each in self._answers.items()
        }
        return rows, feeds, {**first, **learned}

    def ended(self, steps: int, size: int) -> None:
        """Note how far a training went, for one that goes on from here."""
        passes = self._images.passes(steps, size, self._turns)
        self._before = max(self._before, min(passes, VARIANTS))

    def of_held_out(self, held_out: Images, size: int) -> dict[str, Tensor]:
        """Say what would be learned of images that are held out, `size` of them at once."""
        import torch

        outputs, device = self._networks.outputs, self._settings.device

        def learned(rows: slice) -> dict[str, Tensor]:
            if not self.averaged:
                return self._networks.original(held_out.batch(rows, device))
            views = (self._seen(held_out, rows, number) for number in range(HELD_OUT_VARIANTS))
            answers = [self._networks.original(each) for each in views]
            return {name: torch.stack([each[name] for each in answers]).mean(0) for name in outputs}

        parts = [learned(rows) for rows in held_out.in_order(size)]
        return {name: torch.cat([part[name] for part in parts]) for name in outputs}

    def _seen(
        self, images: Images, rows: NDArray[np.int64] | slice, variant: int
    ) -> dict[str, Tensor]:
        settings = self._settings
        return images.variant(rows, settings.device, settings.augment, (settings.seed, 1, variant))

    def _numbers(self, variant: int, seen: int) -> list[int]:
        """Name the variants whose answers are learned: that which is seen, or all so far."""
        if not self.averaged:
            return [variant]
        return list(range(min(max(seen + 1, self._before), VARIANTS)))
