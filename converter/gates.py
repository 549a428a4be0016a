"""Gates: what a converted model must keep to, judged on one comparison with its original.

A gate passes or fails; one that cannot be judged, as accuracy without labels, counts as failed, since
whoever acts on the exit code must not take silence for consent. Speed is judged on the median ratio
alone: the interval beside it says how far another reading may be off, and a verdict whose threshold lies
within it says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.calibration.opening import has_classes
from converter.calibration.sets import CalibrationSet, DataReader
from converter.config import Gates
from converter.errors import ConfigError
from converter.validation.findings import Latency, Validation

__all__ = ["GateResult", "Verdict", "judge", "require_judgeable"]

Status = Literal["passed", "failed", "cannot be judged"]


@dataclass(frozen=True)
class GateResult:
    """One gate and what became of it.

    Attributes
    ----------
    name : str
        As in `Gates`, or "finite", which always holds: no NaN and no infinity that the original has not.
    wanted : float
        At least so much where the name begins with "min", otherwise at most.
    found : float or None
        What was measured; None where it could not be.
    status : {"passed", "failed", "cannot be judged"}
    unit : str
        Of both numbers, such as "ms"; "" for a factor.
    detail : str
        How sure the number is, or why there is none.
    """

    name: str
    wanted: float
    found: float | None
    status: Status
    unit: str
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the gate holds; not where it cannot be judged."""
        return self.status == "passed"

    @property
    def bound(self) -> str:
        """What is wanted, in words: "at least 1.8"."""
        word = "at least" if self.name.startswith("min") else "at most"
        return f"{word} {self.wanted:g}{self.unit and ' '}{self.unit}"

    @property
    def figure(self) -> str:
        """What was found, in words."""
        return "–" if self.found is None else f"{self.found:.4g}{self.unit and ' '}{self.unit}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values, its words too."""
        said = {"passed": self.passed, "bound": self.bound, "figure": self.figure}
        return {**dataclasses.asdict(self), **said}


@dataclass(frozen=True)
class Verdict:
    """What `check` returns.

    Attributes
    ----------
    original, converted : Path
    gates : tuple of GateResult
        Those that were asked for, and "finite".
    validation : Validation
        What they were judged on.
    data : dict
        The images: what they are and their SHA-256.
    original_digest, converted_digest : str
        SHA-256 of the models.
    settings, machine : dict
    """

    original: Path
    converted: Path
    gates: tuple[GateResult, ...]
    validation: Validation
    data: dict[str, Any]
    original_digest: str
    converted_digest: str
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """The gates that do not hold."""
        return tuple(each for each in self.gates if not each.passed)

    @property
    def passed(self) -> bool:
        """Whether all of them hold."""
        return not self.failed

    @property
    def speedup(self) -> float | None:
        """Measured speed-up; None where nothing was timed."""
        found = [each.speedup.ratio for each in self.validation.latencies if each.speedup]
        return found[0] if found else None

    def sentence(self) -> str:
        """Say which gates do not hold."""
        said = [
            f"{each.name} {each.status}: {each.figure}, {each.bound} is wanted"
            if each.found is not None
            else f"{each.name} {each.status}: {each.detail}"
            for each in self.failed
        ]
        return f"{len(said)} of {len(self.gates)} gates failed; " + "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {
            "format": "twofold-verdict-1",
            "passed": self.passed,
            "speedup": self.speedup,
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)},
            "gates": [each.to_dict() for each in self.gates],
            "validation": self.validation.to_dict(),
        }


def require_judgeable(gates: Gates, source: Path | DataReader | CalibrationSet) -> None:
    """Refuse, before any work, gates that nothing can be said about.

    Raises
    ------
    ConfigError
        Where no gate is given, or one needs labels and images lie outside of class folders.
    """
    asked = gates.asked()
    if not asked:
        raise ConfigError(
            "no gate was given, so nothing could fail; say what must hold, as in "
            "--gate min_speedup=1.8 --gate max_accuracy_drop=0.5"
        )
    needing = [name for name in asked if "accuracy" in name]
    if needing and not has_classes(source):
        raise ConfigError(
            f"the gate {needing[0]} needs labels, and {source} has images outside of class folders; "
            "put them into one subfolder for each class, or ask for min_agreement"
        )


def judge(gates: Gates, validation: Validation) -> tuple[GateResult, ...]:
    """Judge the gates that were asked for on a comparison that has timed one batch at most."""
    return (
        *(_result(name, wanted, validation) for name, wanted in gates.asked().items()),
        _finite(validation),
    )


@dataclass(frozen=True)
class _Figure:
    """A measured number, its unit, and its interval where it has one."""

    value: float | None
    unit: str = ""
    detail: str = ""
    low: float | None = None
    high: float | None = None


def _result(name: str, wanted: float, validation: Validation) -> GateResult:
    figure = _FIGURES[name](validation)
    if figure.value is None:
        return GateResult(name, wanted, None, "cannot be judged", figure.unit, figure.detail)
    holds = figure.value >= wanted if name.startswith("min") else figure.value <= wanted
    detail = figure.detail
    if figure.low is not None and figure.high is not None and figure.low <= wanted <= figure.high:
        detail += ", too near to be sure: another run may judge otherwise"
    return GateResult(
        name, wanted, figure.value, "passed" if holds else "failed", figure.unit, detail
    )


def _finite(validation: Validation) -> GateResult:
    more = max(
        (each.nonfinite_converted - each.nonfinite_original for each in validation.outputs),
        default=0,
    )
    return GateResult(
        name="finite",
        wanted=0.0,
        found=float(max(more, 0)),
        status="passed" if validation.finite else "failed",
        unit="new NaN or infinity",
        detail="",
    )


def _speedup(validation: Validation) -> _Figure:
    latency = _timed(validation)
    if latency.speedup is None:
        return _Figure(None, detail=_untimed(latency))
    ratio = latency.speedup
    return _Figure(
        ratio.ratio,
        detail=f"{ratio.low:.2f} to {ratio.high:.2f} with 95 %",
        low=ratio.low,
        high=ratio.high,
    )


def _milliseconds(validation: Validation) -> _Figure:
    latency = _timed(validation)
    if latency.converted is None:
        return _Figure(None, "ms", _untimed(latency))
    timing = latency.converted
    return _Figure(
        timing.median_ms, "ms", f"10 to 90 % of runs: {timing.p10_ms:.3g} to {timing.p90_ms:.3g} ms"
    )


def _timed(validation: Validation) -> Latency:
    return next(iter(validation.latencies), Latency(0, skipped="nothing was timed"))


def _untimed(latency: Latency) -> str:
    return latency.skipped or "it was not timed"


def _accuracy_drop(validation: Validation) -> _Figure:
    accuracy = validation.accuracy
    if accuracy is None:
        return _Figure(None, "points", _NO_LABELS)
    if accuracy.by_chance:
        return _Figure(None, "points", _BY_CHANCE.format(accuracy.original))
    spread = 1.96 * accuracy.standard_error_points
    return _Figure(
        accuracy.drop_points,
        "points",
        f"± {accuracy.standard_error_points:.2g} on {accuracy.images:,} images",
        low=accuracy.drop_points - spread,
        high=accuracy.drop_points + spread,
    )


def _accuracy(validation: Validation) -> _Figure:
    accuracy = validation.accuracy
    if accuracy is None:
        return _Figure(None, "%", _NO_LABELS)
    detail = f"{100 * accuracy.original:.4g} % before, on {accuracy.images:,} images"
    return _Figure(100 * accuracy.converted, "%", detail)


def _agreement(validation: Validation) -> _Figure:
    agreement = validation.agreement
    if agreement is None:
        return _Figure(None, "%", "no output looks like scores of classes; use max_output_error")
    return _Figure(100 * agreement.top1, "%", f"on {validation.images:,} images")


def _output_error(validation: Validation) -> _Figure:
    errors = {each.name: each.relative_l2 for each in validation.outputs}
    known = {name: error for name, error in errors.items() if error is not None}
    if not known or len(known) < len(errors):
        return _Figure(None, "%", "an output of the original is nothing but zeros or not finite")
    worst = max(known, key=lambda name: known[name])
    return _Figure(100 * known[worst], "%", f"output {worst}, on {validation.images:,} images")


def _file_size(validation: Validation) -> _Figure:
    before, after = validation.original.bytes, validation.converted.bytes
    return _Figure(after / 1e6, "MB", f"{before / 1e6:.4g} MB before")


def _macs(validation: Validation) -> _Figure:
    if validation.original.uncounted or validation.converted.uncounted:
        return _Figure(None, detail="layers inside If, Loop or Scan are not counted")
    return _Figure(validation.macs_reduction, detail="")


def _params(validation: Validation) -> _Figure:
    return _Figure(validation.params_reduction)


_NO_LABELS = "the images have no labels that fit the model; give one subfolder for each class"
_BY_CHANCE = (
    "the original is right for {:.1%} of the images, no more often than by chance; put the class folders "
    "into the order of the model's classes, and prepare images as in its training"
)

_FIGURES: dict[str, Callable[[Validation], _Figure]] = {
    "min_speedup": _speedup,
    "max_latency_ms": _milliseconds,
    "max_accuracy_drop": _accuracy_drop,
    "min_accuracy": _accuracy,
    "min_agreement": _agreement,
    "max_output_error": _output_error,
    "max_file_mb": _file_size,
    "min_macs_reduction": _macs,
    "min_params_reduction": _params,
}
