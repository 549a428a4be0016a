"""What a file may ask for at most: bounds that a hostile file cannot lift, and a user can.

Each limit is a number that an environment variable raises or lowers, so that it holds in every process of a
run and nothing in a model or a project file can change it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from converter.errors import ConfigError

__all__ = ["PIXELS", "SAMPLES", "SAMPLE_MIB", "WEIGHTS_GIB", "Limit"]

_DIGITS = 12


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes
    ----------
    variable : str
        The environment variable that sets it.
    default : int
        Where the variable is not set or empty.
    """

    variable: str
    default: int

    @property
    def value(self) -> int:
        """What holds now, from 1.

        Raises
        ------
        ConfigError
            Where the variable is no such number.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and int(text) > 0):
            raise ConfigError(
                f"{self.variable} is {text[:40]!r}, not a whole number from 1; correct it or unset it"
            )
        return int(text)

    def __str__(self) -> str:
        """Say how to lift it."""
        return f"set {self.variable} above {self.value} if it is right"


PIXELS = Limit("TWOFOLD_MAX_PIXELS", 89_478_485)
"""Pixels of an image, before and after its resize: Pillow's own bound, 256 MiB of RGB."""

SAMPLES = Limit("TWOFOLD_MAX_SAMPLES", 10_000_000)
"""Samples of a calibration set; their order is a list in memory."""

SAMPLE_MIB = Limit("TWOFOLD_MAX_SAMPLE_MIB", 1024)
"""MiB of one sample of an array file, which may claim any shape."""

WEIGHTS_GIB = Limit("TWOFOLD_MAX_WEIGHTS_GIB", 16)
"""GiB of external data that a model may ask for: all of it is held in memory."""
