"""What a conversion leaves behind, as plain data: one entry for each layer, and the whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from converter.solver.solution import Iteration
from passes.base import PassResult

__all__ = ["Conversion", "LayerOutcome", "Stage"]

Scheme = Literal["kept", "channel", "sparse", "sparse + channel"]


@dataclass(frozen=True)
class LayerOutcome:
    """What became of one Conv, Gemm or MatMul.

    Attributes
    ----------
    name, op : str
        Node name and operator.
    shape : tuple of int
        Weight shape (N, C, *kernel).
    activation : str
        The activation that the error is measured after.
    scheme : {"kept", "channel", "sparse", "sparse + channel"}
    rank, support : int
        Rank of the low-rank part; input channels kept by the sparse part; 0 where the part is absent.
    macs_before, macs_after, params_before, params_after : int
        Multiply-accumulates of one sample; weights and biases.
    error : float or None
        Relative squared error of the response after the activation, on patches that the fit did
        not see; None for layers that were kept.
    effect : float or None
        Predicted relative squared error that the layer brings to the network's output.
    status : str
        How the solver ended: "converged", "iteration limit", "stalled", or "closed form" for the baselines.
    iterations : int
    seconds : float
    reason : str or None
        Why the layer was kept.
    trace : tuple of Iteration
        The ADMM log.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    activation: str
    scheme: Scheme
    rank: int
    support: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    error: float | None = None
    effect: float | None = None
    status: str = ""
    iterations: int = 0
    seconds: float = 0.0
    reason: str | None = None
    trace: tuple[Iteration, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Conversion:
    """What `convert` returns; the report is this, as JSON.

    Attributes
    ----------
    source, out : Path
        The model that was read, and the one that was written.
    macs_before, macs_after, params_before, params_after : int
        Of the whole network, for one sample.
    layers : tuple of LayerOutcome
        In graph order, the kept ones too.
    passes : tuple of PassResult
        What each graph pass changed and skipped.
    stages : tuple of Stage
    notes : tuple of str
        Whatever a reader must know: a fall-back that was taken, a bound that bit.
    settings, calibration, machine : dict
        What was asked for; images, patches and the memory bound; where it ran.
    source_digest, out_digest : str
        SHA-256 of the files.
    peak_memory_mib : float
        Highest resident memory of this program so far.
    """

    source: Path
    out: Path
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    layers: tuple[LayerOutcome, ...]
    passes: tuple[PassResult, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    machine: dict[str, Any]
    source_digest: str
    out_digest: str
    peak_memory_mib: float
    format: str = field(default="twofold-conversion-1")

    @property
    def macs_reduction(self) -> float:
        """Original multiply-accumulates over converted ones."""
        return self.macs_before / self.macs_after

    @property
    def params_reduction(self) -> float:
        """Original parameters over converted ones."""
        return self.params_before / self.params_after

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        plain = dataclasses.asdict(self)
        plain["source"], plain["out"] = str(self.source), str(self.out)
        plain["macs_reduction"] = self.macs_reduction
        plain["params_reduction"] = self.params_reduction
        return plain
