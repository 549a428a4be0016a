"""How a converted model is quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from converter.config.require import require

__all__ = ["QuantizationSettings", "QuantizedPrecision"]

QuantizedPrecision = Literal["int8", "float16"]


@dataclass(frozen=True)
class QuantizationSettings:
    """How the converted model is quantized.

    Attributes
    ----------
    precision : {"int8", "float16"}, default "int8"
        8-bit integers, for CPUs; or half precision, for CUDA.
    error : float, default 0.001
        Squared error of the outputs, relative to their variance, that does no harm: no layer is left in
        float for less. From 0.
    images : int or None, default None
        At most so many calibration images, spread evenly; None takes all.
    batch : int, default 64
        Images that run at once, from 1; a model with a fixed batch overrides it.
    memory_mib : int, default 1024
        Bound on the tensors of one batch, and on the held-out images with their answers, in MiB, from 16.
    """

    precision: QuantizedPrecision = "int8"
    error: float = 0.001
    images: int | None = None
    batch: int = 64
    memory_mib: int = 1024

    def __post_init__(self) -> None:
        require(
            self.precision in ("int8", "float16"),
            f"precision {self.precision!r} is neither int8 nor float16; give one",
        )
        require(
            math.isfinite(self.error) and self.error >= 0,
            f"the error {self.error} that quantization may bring is not a number from 0; 0.001 is usual",
        )
        require(
            self.images is None or self.images >= 1, f"images {self.images} is below 1; correct it"
        )
        require(1 <= self.batch <= 65536, f"batch {self.batch} is not from 1 to 65536; correct it")
        require(
            self.memory_mib >= 16,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 16",
        )
