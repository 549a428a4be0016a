"""How far a converted network's answers are from those of its original.

Scores of classes are compared as distributions, softened by a temperature τ (Hinton, Vinyals and Dean,
arXiv:1503.02531, §2):  τ² · KL(softmax(o/τ) ‖ softmax(c/τ)),  mean over images. That does not see what is
added to all K scores alike, so half of its square is added: where τ is large the two are ‖c − o‖² / 2K
together, so that a row of numbers which are no scores after all is followed too. All else is compared by its
squared error relative to the variance of the original's own answers,  ‖c − o‖² / ‖o − mean o‖², and so are
inner responses (Romero et al., arXiv:1412.6550, with a relative error in place of an absolute one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from converter.scores import holds_scores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["answers_differ", "lessons_differ", "mean_scores", "relative_error"]

LABEL_WEIGHT = 0.3
_TINY = 1e-12
_STEADY = 1e-6
"""Least variance of an output, in shares of its square: one that hardly differs between images, as a
confidence of 0.99999, would count more than all others together."""


def mean_scores(
    answers: Mapping[str, Tensor], mirrored: Mapping[str, Tensor], outputs: Sequence[str]
) -> dict[str, Tensor]:
    """Give answers with scores of classes averaged with those for the mirror images; all else as it is.

    Parameters
    ----------
    answers, mirrored : mapping of str to Tensor of shape (n, ...)
        Of the same network to images and to their mirror images.
    outputs : sequence of str
        Answers that may be scores.
    """
    scores = {name for name in outputs if holds_scores(answers[name])}
    return {
        name: (answer + mirrored[name]) / 2 if name in scores else answer
        for name, answer in answers.items()
    }


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to the variance of what is wanted, or to a millionth of its square."""
    spread = (wanted - wanted.mean(0, keepdim=True)).square().sum()
    least = _STEADY * wanted.square().sum() + _TINY
    return (found - wanted).square().sum() / spread.maximum(least)


def answers_differ(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    outputs: Sequence[str],
    temperature: float,
) -> Tensor:
    """Mean over the outputs of how far the answers differ, a scalar from 0.

    Parameters
    ----------
    found, wanted : mapping of str to Tensor of shape (n, ...)
        Answers of the converted network and of its original.
    outputs : sequence of str
    temperature : float
        τ, above 0.
    """
    from torch.nn import functional

    losses = []
    for name in outputs:
        mine, theirs = found[name], wanted[name]
        if not holds_scores(theirs):
            losses.append(relative_error(mine, theirs))
            continue
        soft = functional.kl_div(
            functional.log_softmax(mine / temperature, dim=1),
            functional.log_softmax(theirs / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        level = (mine - theirs).mean(1).square().mean()
        losses.append(temperature**2 * soft + level / 2)
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total / len(losses)


def lessons_differ(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    outputs: Sequence[str],
    temperature: float,
    classes: Tensor | None,
) -> Tensor:
    """`answers_differ`, and where classes are learned too, 0.3 of their cross-entropy beside it.

    Parameters
    ----------
    found, wanted, outputs, temperature
        As for `answers_differ`.
    classes : Tensor of shape (n,), int64, or None
        Of each image; the first output with scores of classes answers for it.
    """
    from torch.nn import functional

    differ = answers_differ(found, wanted, outputs, temperature)
    if classes is None:
        return differ
    scores = next(name for name in outputs if holds_scores(wanted[name]))
    return differ + LABEL_WEIGHT * functional.cross_entropy(found[scores], classes)
