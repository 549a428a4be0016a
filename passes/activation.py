"""The function φ that follows a layer in the graph, as plain data: no graph, no solver.

The solver and the passes both speak of it; neither has to know the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["IDENTITY", "Activation"]

ActivationKind = Literal["identity", "relu", "clip", "leaky_relu", "silu", "hard_swish"]


@dataclass(frozen=True)
class Activation:
    """One activation with its parameters.

    Attributes
    ----------
    kind : {"identity", "relu", "clip", "leaky_relu", "silu", "hard_swish"}
        `clip` is min(max(y, low), high); `leaky_relu` is y for y ≥ 0 and slope · y below; `silu` is
        y · sigmoid(y); `hard_swish` is y · clip(y / 6 + 1/2, 0, 1), as in the ONNX operator.
    low, high : float, default −inf, inf
        Bounds of `clip`; of no effect on the others.
    slope : float, default 0.01
        Slope of `leaky_relu` below 0; of no effect on the others.
    """

    kind: ActivationKind
    low: float = -math.inf
    high: float = math.inf
    slope: float = 0.01

    def __str__(self) -> str:
        """Name as tables print it."""
        if self.kind == "clip":
            return f"clip {self.low:g}..{self.high:g}"
        return self.kind.replace("_", " ")


IDENTITY = Activation("identity")
