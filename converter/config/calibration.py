"""How activations are recorded."""

from __future__ import annotations

from dataclasses import dataclass

from converter.config.require import require

__all__ = ["CalibrationSettings"]


@dataclass(frozen=True)
class CalibrationSettings:
    """How activations are recorded.

    Attributes
    ----------
    images : int or None, default None
        At most so many images are used, spread evenly over the set; None uses all.
    batch : int, default 64
        Images that run through the model at once, from 1; a model with a fixed batch overrides it.
    patches : int, default 16384
        Patches that are sampled for each layer, from 256.
    memory_mib : int, default 1024
        Bound on what recording keeps in memory at any time, in MiB, from 64.
    seed : int, default 0
        Seed of every sample that is drawn.
    """

    images: int | None = None
    batch: int = 64
    patches: int = 16384
    memory_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.images is None or self.images > 0,
            f"{self.images} calibration images are too few; give at least 1",
        )
        require(
            1 <= self.batch <= 4096,
            f"calibration batch {self.batch} is not from 1 to 4096; correct it",
        )
        require(
            self.patches >= 256, f"{self.patches} patches a layer are too few; give at least 256"
        )
        require(
            self.memory_mib >= 64,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 64",
        )
        require(self.seed >= 0, f"seed {self.seed} is below 0; correct it")
