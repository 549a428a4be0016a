"""What a converted model may cost."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from converter.config.require import require

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """What the converted model may cost; at least one is given, and all that are given hold.

    Attributes
    ----------
    macs : float or None
        Original multiply-accumulates over converted ones, above 1.
    params : float or None
        Original parameters over converted ones, above 1.
    speedup : float or None
        Original milliseconds over converted ones, above 1; not beside `latency_ms`.
    latency_ms : float or None
        Milliseconds of the whole converted model for one batch, above 0; not beside `speedup`.
    """

    macs: float | None = None
    params: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        require(
            any(value is not None for value in dataclasses.astuple(self)),
            "no budget was given; say --speedup 2 to halve the time, --macs 2 to halve the "
            "multiply-accumulates, --params 4 to quarter the parameters, or --max-drop 0.5 for the "
            "fastest model that loses no more than half a point",
        )
        for name, factor in (
            ("macs", self.macs),
            ("params", self.params),
            ("speedup", self.speedup),
        ):
            if factor is not None:
                require(
                    math.isfinite(factor) and factor > 1,
                    f"the {name} budget {factor} is not a factor above 1; "
                    "2 asks for half of the original",
                )
        if self.latency_ms is not None:
            require(
                math.isfinite(self.latency_ms) and self.latency_ms > 0,
                f"the latency budget {self.latency_ms} is not a number of milliseconds above 0; "
                "4.5 asks for a model that takes 4.5 ms",
            )
        require(
            self.speedup is None or self.latency_ms is None,
            "both --speedup and --latency-ms were given, and both bound the time; give one of them",
        )

    @property
    def timed(self) -> bool:
        """Whether the budget bounds the time, so that candidates must be measured."""
        return self.speedup is not None or self.latency_ms is not None
