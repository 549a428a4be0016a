"""Which solver decides each layer's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from converter.config.require import require

__all__ = ["SCHEME_NAMES", "SolverName", "SolverSettings"]

SolverName = Literal["admm", "svd", "data-svd"]


SCHEME_NAMES = ("channel", "spatial", "depthwise", "tucker", "sparse")


@dataclass(frozen=True)
class SolverSettings:
    """Which solver decides each layer's parts, and how hard it works.

    Attributes
    ----------
    name : {"admm", "data-svd", "svd"}, default "admm"
        `admm` is the method; the other two are baselines (low rank alone, no activation).
    device : str, default "cpu"
        torch device of the fits: "cpu", "cuda" or "cuda:N".
    iterations : int, default 25
        Most ADMM iterations for one point of the path.
    polish : int, default 8
        Most rounds of polish for a layer.
    schemes : tuple of str, default ("channel", "spatial", "depthwise", "tucker", "sparse")
        Ways to write a layer that the plan may choose from; the baselines have `channel` alone.
    """

    name: SolverName = "admm"
    device: str = "cpu"
    iterations: int = 25
    polish: int = 8
    schemes: tuple[str, ...] = SCHEME_NAMES

    def __post_init__(self) -> None:
        require(
            self.name in ("admm", "svd", "data-svd"),
            f"solver {self.name!r} is none of admm, data-svd, svd; give one",
        )
        unknown = [name for name in self.schemes if name not in SCHEME_NAMES]
        require(
            bool(self.schemes) and not unknown,
            f"schemes {', '.join(self.schemes) or 'none'}: give some of {', '.join(SCHEME_NAMES)}",
        )
        if self.name != "admm":
            object.__setattr__(self, "schemes", ("channel",))
