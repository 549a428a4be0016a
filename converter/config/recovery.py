"""How a converted network learns from its original, and for how long."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from converter.config.require import require

__all__ = ["Precision", "RecoverySettings", "recovery_length"]

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class RecoverySettings:
    """How a converted network learns from its original.

    Attributes
    ----------
    seconds : float or None, default None
        Time that the training takes, judging on held-out images within it, above 0; not beside `epochs`.
    epochs : float or None, default None
        How often it goes through the images, above 0. With `mirrored`, an image and its mirror image are two.
    batch : int, default 64
        Images of one step, from 2.
    rate : float, default 0.003
        First step of a weight, relative to the root mean square of its tensor; above 0 and below 1. On a
        ResNet-20 at half its size, held-out answers did not get better within 400 steps at 0.02.
    temperature : float, default 4
        What scores of classes are divided by before they are compared, above 0.
    features : float, default 0.5
        Weight of inner responses beside the outputs, from 0.
    refit : float, default 0
        Share of the length, from 0 to 1, in which biases and one factor for each output channel are trained
        alone, before all weights are; 1 trains nothing else.
    gradual : int or None, default None
        In how many parts a conversion goes its way, from 1 to 8, each converted and recovered before the
        next; None takes 2 for a budget of a half or less, and else 1.
    augment : tuple of str, default ("flip", "shift")
        What happens to images on their way: "flip" left to right, "shift" by up to a sixteenth.
    mirrored : bool, default False
        Whether scores of classes follow the mean of the original's answers to an image and to its mirror
        image, in place of the answer to the former alone. Where images are shifted, all outputs are scores
        and the answers fit into memory, it is a mean over the shifts that were seen so far, too.
    labels : bool, default False
        Whether the images' classes are learned as well.
    precision : {"auto", "float32", "bfloat16"}, default "auto"
        Of activations; auto takes bfloat16 where it is clearly faster.
    device : str, default "cpu"
        torch device: "cpu", "cuda" or "cuda:N".
    memory_mib : int, default 1024
        Bound on the images in memory, in MiB, from 16; the original's answers take up to a quarter more.
    seed : int, default 0
    """

    seconds: float | None = None
    epochs: float | None = None
    batch: int = 64
    rate: float = 0.003
    temperature: float = 4.0
    features: float = 0.5
    refit: float = 0.0
    gradual: int | None = None
    augment: tuple[str, ...] = ("flip", "shift")
    mirrored: bool = False
    labels: bool = False
    precision: Precision = "auto"
    device: str = "cpu"
    memory_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            (self.seconds is None) != (self.epochs is None),
            "a recovery ends after some time or some epochs; give one of them, as in --recover 10m "
            "or --recover 5e",
        )
        for name, value in (
            ("seconds", self.seconds),
            ("epochs", self.epochs),
            ("temperature", self.temperature),
        ):
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"{name} {value} of the recovery is not a number above 0; correct it",
            )
        require(2 <= self.batch <= 65536, f"batch {self.batch} is not from 2 to 65536; correct it")
        require(0 < self.rate < 1, f"the rate {self.rate} is not between 0 and 1; 0.003 is usual")
        require(
            math.isfinite(self.features) and self.features >= 0,
            f"the weight {self.features} of inner responses is not a number from 0; correct it",
        )
        require(
            0 <= self.refit <= 1,
            f"refit {self.refit} is no share of the recovery from 0 to 1; correct it",
        )
        require(
            self.gradual is None or 1 <= self.gradual <= 8,
            f"gradual {self.gradual} is not from 1 to 8 parts; 2 is usual",
        )
        unknown = [way for way in self.augment if way not in ("flip", "shift")]
        require(not unknown, f"augment {', '.join(unknown)}: give some of flip, shift, or none")
        require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"precision {self.precision!r} is none of auto, float32, bfloat16; give one",
        )
        require(
            self.memory_mib >= 16,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 16",
        )
        require(self.seed >= 0, f"seed {self.seed} is below 0; correct it")

    def of_share(self, share: float) -> RecoverySettings:
        """Give the same for a share of the length."""
        seconds = None if self.seconds is None else share * self.seconds
        epochs = None if self.epochs is None else share * self.epochs
        return dataclasses.replace(self, seconds=seconds, epochs=epochs)


_RECOVERY_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def recovery_length(text: str) -> dict[str, Any]:
    """Read how long a recovery takes, as "90s", "10m" and "1.5h", or "20e" for epochs.

    Returns
    -------
    dict of str to Any
        `seconds` or `epochs` of `RecoverySettings`.

    Raises
    ------
    ConfigError
        Where the text is neither.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:].lower()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    require(
        math.isfinite(value) and value > 0 and unit in (*_RECOVERY_UNITS, "e"),
        f"--recover {text!r} is neither a time such as 90s, 10m or 1h nor epochs such as 20e; correct it",
    )
    return {"epochs": value} if unit == "e" else {"seconds": value * _RECOVERY_UNITS[unit]}
