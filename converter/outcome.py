"""What a conversion leaves behind, as plain data: one entry for each layer, and the whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.solver.solution import Iteration
from passes.base import PassResult

if TYPE_CHECKING:
    from converter.front import FrontPoint

__all__ = ["Answers", "Conversion", "Drop", "Latency", "LayerOutcome", "Probe", "Search", "Stage"]


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
    scheme : str
        "kept", or the family of the form that it took, as "spatial" or "sparse + channel".
    ranks : tuple of int
        Of the low-rank part; () where it is absent.
    support : int
        Input channels kept by the sparse part; 0 where it is absent.
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
    ms_before, ms_after : float or None
        Milliseconds of the layer in the whole network on the target: as it was, and in the form that was
        planned for it, measured or interpolated between measurements; None where that is not known.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    activation: str
    scheme: str
    ranks: tuple[int, ...]
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
    ms_before: float | None = None
    ms_after: float | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Latency:
    """What the original and the converted model take on the target, measured in turns and predicted.

    Attributes
    ----------
    provider : str
    threads, batch : int
    original_ms, converted_ms : float
        Measured medians.
    speedup, low, high : float
        Original over converted, and its 95 % interval.
    predicted_ms : float
        What the plan had promised, relative to the original in the same runs.
    pace : float or None
        Where that is off by more than a tenth and the machine's pace has changed by as much: how many times
        as fast the plan, with random weights, read then as when it was made, relative to the original.
    """

    provider: str
    threads: int
    batch: int
    original_ms: float
    converted_ms: float
    speedup: float
    low: float
    high: float
    predicted_ms: float
    pace: float | None = None

    @property
    def off(self) -> float:
        """By how much the predicted latency of the converted model was off, as a share of the measured."""
        return self.predicted_ms / self.converted_ms - 1.0

    @property
    def off_at_pace(self) -> float:
        """By how much it was off at the pace of the measurement; as `off` where it was not far off."""
        return self.predicted_ms / (self.pace or 1.0) / self.converted_ms - 1.0


@dataclass(frozen=True)
class Answers:
    """How far the answers of a conversion are from the original's, on calibration images.

    Attributes
    ----------
    error : float
        Squared error relative to the variance over the images, mean over the outputs; infinite where an
        answer is not finite or has another shape.
    agreement : float or None
        Share of images with the same best class; None for networks that are no classifiers.
    images : int
        How many it was measured on: where there are enough, those that the fits kept back. A recovery may
        have learned from them.
    """

    error: float
    agreement: float | None
    images: int


@dataclass(frozen=True)
class Drop:
    """What a converted model has lost, on images that no layer was fitted on.

    Attributes
    ----------
    measure : {"accuracy", "agreement", "output error"}
    points : float
        Percentage points of accuracy that were lost, negative where it rose; percentage points of
        images whose best class is another one; or ‖converted − original‖ / ‖original‖ of the outputs
        in percent. Infinite where the converted model gives NaN or infinity and the original does not.
    standard_error : float or None
        Of `points`; None for an output error.
    images : int
        How many it was measured on.
    notes : tuple of str, default ()
        Why the measure is another one than the images might let expect, or says little.
    """

    measure: Literal["accuracy", "agreement", "output error"]
    points: float
    standard_error: float | None
    images: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it as in "0.42 ± 0.10 points of accuracy"."""
        if self.measure == "output error":
            return f"{self.points:.3g} % output error"
        spread = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        return f"{self.points:.2f}{spread} points of {self.measure}"


@dataclass(frozen=True)
class Probe:
    """One budget that was tried for a tolerance: planned, fitted, timed and judged.

    Attributes
    ----------
    asked : float
        Speed-up that was planned for, or reduction of the multiply-accumulates where nothing is timed.
    effect : float
        Predicted squared error of the network's output, relative to its variance.
    macs_reduction : float
    latency : Latency or None
        None where nothing is timed.
    drop : Drop
    within : bool
        Whether it is a model that gains something and loses no more than the tolerance.
    """

    asked: float
    effect: float
    macs_reduction: float
    latency: Latency | None
    drop: Drop
    within: bool

    @property
    def gained(self) -> float:
        """Measured speed-up; reduction of the multiply-accumulates where nothing is timed."""
        return self.macs_reduction if self.latency is None else self.latency.speedup


@dataclass(frozen=True)
class Search:
    """How the fastest model within a tolerance was found.

    Attributes
    ----------
    max_drop : float
        The tolerance, in the unit of `Drop.points`.
    images : str
        What the drops were measured on.
    probes : tuple of Probe
        In the order of the search.
    """

    max_drop: float
    images: str
    probes: tuple[Probe, ...]


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
    latency : Latency or None
        None where nothing was timed.
    stages : tuple of Stage
    notes : tuple of str
        Whatever a reader must know: a fall-back that was taken, a bound that bit.
    settings, calibration, machine : dict
        What was asked for; images and their SHA-256, patches and the memory bound; where it ran and
        with which versions.
    source_digest, out_digest : str
        SHA-256 of the models (`converter.model_file.model_digest`).
    peak_memory_mib : float
        Highest resident memory of this program so far.
    search : Search or None, default None
        The budgets that were tried; None where a budget was given.
    recovery : dict or None, default None
        `converter.refine.recovery.Recovered`, all but its model; None where nothing was recovered.
    quantization : dict or None, default None
        `converter.quantization.quantizing.Quantized`, all but its model; None where nothing was quantized.
    front : tuple of FrontPoint, default ()
        Predicted: the best plans for some budgets, from the original on.
    planned : FrontPoint or None, default None
        The plan that was carried out, as it was predicted; layers may have been put back since.
    answers : Answers or None, default None
        Of the model in float32, after a recovery where there is one; None where no layer was replaced.
    """

    source: Path
    out: Path
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    layers: tuple[LayerOutcome, ...]
    passes: tuple[PassResult, ...]
    latency: Latency | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    machine: dict[str, Any]
    source_digest: str
    out_digest: str
    peak_memory_mib: float
    search: Search | None = None
    recovery: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    front: tuple[FrontPoint, ...] = ()
    planned: FrontPoint | None = None
    answers: Answers | None = None
    format: str = field(default="twofold-conversion-2")

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
        if self.latency is not None:
            plain["latency"]["off"] = self.latency.off
            plain["latency"]["off_at_pace"] = self.latency.off_at_pace
        return plain
