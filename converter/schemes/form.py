"""What a layer may become, and what that costs: plain data that planner, fits and report share."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["KEEP", "Candidate", "Form", "Geometry"]


@dataclass(frozen=True, order=True)
class Form:
    """One way to write a layer: a scheme for L, its ranks, and how many input channels S keeps.

    Attributes
    ----------
    scheme : str
        "keep" for the layer as it is, "sparse" for S alone, else the scheme that factorises L:
        "channel", "spatial", "depthwise" or "tucker".
    ranks : tuple of int
        Of L, the widths between its factors: (r,) for "channel" and "spatial"; (r₁, r₂) for "tucker", and for
        "depthwise", where r₂ is r₁ as often as a channel has filters; () for the others.
    support : int, default 0
        Input channels that S keeps; 0 for no sparse branch.
    """

    scheme: str
    ranks: tuple[int, ...] = ()
    support: int = 0

    @property
    def family(self) -> str:
        """The scheme with its sparse branch, or with its filters: "sparse + spatial", "depthwise ×2"."""
        if self.scheme == "depthwise" and self.ranks[1] > self.ranks[0]:
            return f"{self.scheme} ×{self.ranks[1] // self.ranks[0]}"
        beside = self.support > 0 and self.scheme != "sparse"
        return f"sparse + {self.scheme}" if beside else self.scheme

    def __str__(self) -> str:
        parts = [self.family]
        if self.ranks:
            parts.append("r " + "×".join(map(str, self.ranks)))
        if self.support:
            parts.append(f"s {self.support}")
        return " ".join(parts)


KEEP = Form("keep")


@dataclass(frozen=True)
class Geometry:
    """Shapes of one layer, as far as costs depend on them.

    Attributes
    ----------
    op : str
        "Conv", "Gemm" or "MatMul".
    outputs, channels : int
        N and C of the weight (N, C, *kernel).
    kernel : tuple of int
        () for Gemm and MatMul.
    in_shape, out_shape : tuple of int
        Spatial shape of input and response; for a MatMul the axes between the first and the last one.
    bias : bool
        Whether the layer has a bias; every replacement has one.
    fold : int, default 1
        How many blocks of these shapes one sample has: more than 1 where its frames, windows or tokens
        are folded into the batch.
    """

    op: str
    outputs: int
    channels: int
    kernel: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    bias: bool
    fold: int = 1

    @property
    def taps(self) -> int:
        """Kernel taps of one channel."""
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """Length of a patch, D."""
        return self.channels * self.taps

    @property
    def positions(self) -> int:
        """Positions of the response of one sample."""
        return self.fold * math.prod(self.out_shape)

    @property
    def in_positions(self) -> int:
        """Positions of the input of one sample."""
        return self.fold * math.prod(self.in_shape)


@dataclass(frozen=True)
class Candidate:
    """A form of one layer with everything that the choice needs.

    Attributes
    ----------
    form : Form
    effect : float
        Predicted squared error of the network's output, relative to its variance; from 0.
    macs, params : float
        Multiply-accumulates of one sample, and parameters, of the whole layer in this form.
    ms : float or None, default None
        Milliseconds of the layer in this form on the target; None where nothing was measured.
    """

    form: Form
    effect: float
    macs: float
    params: float
    ms: float | None = None
