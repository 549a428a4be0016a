"""Quantization from model to model: sought, compared with the original, timed, and never slower."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from converter.answers import Judge
from converter.calibration.sets import CalibrationSet
from converter.calibration.subset import Subset
from converter.config import QuantizationSettings, Runtime, Target
from converter.drop import held_back
from converter.errors import CalibrationError, ConfigError, ModelError, SolverError
from converter.latency import Speedup, Timing, measure_latency, speedup, until_no_slower
from converter.outcome import Answers
from converter.pace import FINAL_SECONDS, HELD, TRIAL_SECONDS
from converter.planner.cost import count_cost
from converter.preparation import one_sample, target_batch
from converter.progress import Progress
from converter.quantization.half import in_float16
from converter.quantization.integers import ARITHMETICS, in_int8
from converter.quantization.ranged import find_ranges
from converter.quantization.search import Found, LeftInFloat, Trial, search_int8
from converter.runtime import weight_bytes
from converter.validation.interface import common_interface
from passes.precision import precision_of

__all__ = ["Alone", "InTurns", "Quantized", "quantize", "require_quantizable"]

HELD_OUT_EVERY = 10
HELD_OUT_MOST = 256
"""Every tenth image is held out, so many at most."""
LEAST_HELD_OUT = 2
_LARGEST = 2**31 - 2**20
"""Bytes of weights at most: the quantizer and onnx's inference work on one message of protobuf."""


@dataclass(frozen=True)
class InTurns:
    """What the original, the float model and the quantized one take on the target, measured in turns.

    Attributes
    ----------
    provider : str
    threads, batch : int
    original_ms, float_ms, quantized_ms : float
        Medians.
    speedup : Speedup
        Original over quantized.
    over_float : Speedup
        Float over quantized.
    """

    provider: str
    threads: int
    batch: int
    original_ms: float
    float_ms: float
    quantized_ms: float
    speedup: Speedup
    over_float: Speedup


@dataclass(frozen=True)
class Alone:
    """The original, quantized as the conversion was, but with no layer in float.

    It is about what there is without a conversion; a search of its own may do better.

    Attributes
    ----------
    deviation : Answers
        How far it is from the original.
    bytes : int
        In one file.
    ms : float or None
        Median on the target; None where nothing was timed.
    speedup : Speedup or None
        How many times as fast the quantized conversion is.
    """

    deviation: Answers
    bytes: int
    ms: float | None
    speedup: Speedup | None


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a quantization has come to.

    Attributes
    ----------
    model : onnx.ModelProto
        The quantized model; the float one as it was given where that is faster, or where the quantized
        one answers with NaN or infinity.
    shipped : bool
        Whether it is the quantized one.
    precision : {"int8", "float16"}
    types, ranges : str
        Integer types of activations × weights, and how the ranges were taken; "" for float16.
    layers : int
        Linear layers of the model.
    balanced : int
        Pairs of factors whose channels were scaled to one another before.
    left : tuple of LeftInFloat
        Those that stay in float.
    trials : tuple of Trial
        What was tried, in order.
    before, after : Answers
        How far the float model, and the quantized one, are from the original.
    images, held_out : int
        Images that the ranges come from, and those that the errors were measured on.
    bytes_before, bytes_after : int
        Of the float model and of the quantized one, in one file.
    latency : InTurns or None
        None where nothing was timed.
    alone : Alone or None
        None where it is the original that was quantized, or where that cannot be.
    notes : tuple of str
    """

    model: onnx.ModelProto
    shipped: bool
    precision: str
    types: str
    ranges: str
    layers: int
    balanced: int
    left: tuple[LeftInFloat, ...]
    trials: tuple[Trial, ...]
    before: Answers
    after: Answers
    images: int
    held_out: int
    bytes_before: int
    bytes_after: int
    latency: InTurns | None
    alone: Alone | None
    notes: tuple[str, ...]

    def withheld(self, given: onnx.ModelProto, why: str) -> Quantized:
        """Take back the quantized model: `given`, the float one, is what is left, and a note says why."""
        return dataclasses.replace(self, model=given, shipped=False, notes=(*self.notes, why))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model as JSON-ready values."""
        bare = dataclasses.replace(self, model=onnx.ModelProto())
        plain = dataclasses.asdict(bare)
        del plain["model"]
        return plain


def require_quantizable(
    model: onnx.ModelProto, path: Path, settings: QuantizationSettings, runtime: Runtime
) -> None:
    """Refuse at once, before anything is converted, what could not be quantized afterwards.

    Raises
    ------
    ConfigError
        Where the precision gains nothing on the provider.
    ModelError
        Where the model is no float32 model with linear layers, or too large.
    """
    if settings.precision == "float16" and runtime.provider != "cuda":
        raise ConfigError(
            "--fp16 is for CUDA: on a CPU onnxruntime computes half precision in float32, and converts to "
            "and fro, which is slower; use --int8, or --provider cuda"
        )
    if settings.precision == "int8" and runtime.provider == "cuda":
        raise ConfigError(
            "--int8 is for CPUs: onnxruntime's CUDA provider has no int8 convolution, and dequantizes before "
            "each; use --fp16, or --provider cpu"
        )
    found = precision_of(model)
    if found is not None:
        raise ModelError(f"{path} is {found} already; give the float32 model")
    if weight_bytes(model.graph) > _LARGEST:
        raise ModelError(
            f"{path} has more than 2 GiB of weights, which the quantizer does not take; convert it to a "
            "smaller one first"
        )


def images_to_see(data: CalibrationSet, settings: QuantizationSettings) -> CalibrationSet:
    """Give as many of the images as the settings ask for, and refuse them where too few could be held out.

    Raises
    ------
    CalibrationError
        Where there are fewer than 20.
    """
    if settings.images is not None and settings.images < len(data):
        data = Subset(data, settings.images)
    if len(data) < LEAST_HELD_OUT * HELD_OUT_EVERY:
        raise CalibrationError(
            f"{data.describe()} has too few images to hold some out; give at least "
            f"{LEAST_HELD_OUT * HELD_OUT_EVERY}"
        )
    return data


def quantize(
    original: onnx.ModelProto,
    converted: onnx.ModelProto,
    data: CalibrationSet,
    settings: QuantizationSettings,
    target: Target,
    *,
    path: Path,
    timing: bool,
    progress: Progress,
) -> Quantized:
    """Quantize a converted model; see `converter.quantize`.

    Parameters
    ----------
    original, converted : onnx.ModelProto
        Neither is changed.
    data : CalibrationSet
        Images; every tenth is held out.
    settings : QuantizationSettings
    target : Target
        Where the result must be fast.
    path : Path
        Where `converted` is or goes, for messages.
    timing : bool
        Whether models are timed, so that the result is not slower than `converted`.
    progress : Progress

    Raises
    ------
    ConfigError, ModelError
        As `require_quantizable`.
    ValidationError
        Where the inputs or outputs of the two models differ.
    CalibrationError
        Where the images are too few or do not fit.
    SolverError
        Where a tensor of the model becomes NaN or infinite before anything is quantized.
    """
    runtime = target.runtime
    require_quantizable(converted, path, settings, runtime)
    inputs, _ = common_interface((original, converted), ("the original", str(path)))
    sample = one_sample(data, inputs)
    feeds = target_batch(converted, sample, target, path) if timing else {}
    data = images_to_see(data, settings)
    count = min(HELD_OUT_MOST, len(data) // HELD_OUT_EVERY)
    ranged, held = held_back(data, count)
    # the images are held with three sets of answers: of both models, and of what is tried
    room = settings.memory_mib * 2**20 // 3
    right = Judge(original, held, runtime, together=settings.batch, held=room)
    judge = right.beside(converted)
    before = right.of(converted)

    def times_of(models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        timings = measure_latency(
            {"float": converted, **models}, feeds, runtime, seconds=TRIAL_SECONDS
        )
        return {name: speedup(timings[name], timings["float"]).ratio for name in models}

    cost = count_cost(converted, sample, label=str(path))
    if not cost.layers:
        raise ModelError(f"{path} has no Conv, Gemm or MatMul, so there is nothing to quantize")
    images, pairs, notes = 0, 0, []
    if settings.precision == "int8":
        ready = find_ranges(converted, path, ranged, settings, runtime, progress)
        images, pairs = ready.images, ready.balanced
        if images < len(ranged):
            notes.append(
                f"ranges were taken from {images} of {len(ranged)} images, which is enough"
            )
        costs = {
            each.name: each for each in count_cost(ready.model, sample, label=str(path)).layers
        }
        found = search_int8(
            *(ready.model, ready.ranges, judge, times_of if timing else None, costs),
            *(settings.error, progress),
        )
    else:
        found = _half(converted, path, judge)
    unconverted: tuple[onnx.ModelProto, Answers] | None = None
    if original != converted:
        try:
            alike = _alike(original, found, ranged, settings, runtime, progress)
            unconverted = alike, right.of(alike)
        except (ModelError, CalibrationError, SolverError) as error:  # the conversion is there
            notes.append(f"how the original in {settings.precision} compares is not known: {error}")

    after, finite = right.of(found.model), math.isfinite(found.deviation.error)
    timings: dict[str, Timing] = {}
    if timing:
        models = {"original": original, "float": converted, "quantized": found.model}
        if unconverted is not None:
            models["alone"] = unconverted[0]
        with progress.stage("time the quantized model", 1):
            timings, _ = until_no_slower(
                lambda: measure_latency(models, feeds, runtime, seconds=FINAL_SECONDS),
                *("quantized", "float"),
                seen_faster=any((each.time or 1.0) < 1.0 - HELD for each in found.trials),
            )
    latency = _latency(timings, target) if timings else None
    alone = None
    if unconverted is not None:
        alone = _alone(unconverted[1], unconverted[0].ByteSize(), timings)
    faster = latency is None or latency.over_float.ratio >= 1.0
    return Quantized(
        model=found.model if faster and finite else converted,
        shipped=faster and finite,
        precision=settings.precision,
        types=found.types,
        ranges=found.ranges,
        layers=len(cost.layers),
        balanced=pairs,
        left=found.left,
        trials=found.trials,
        before=before,
        after=after,
        images=images,
        held_out=judge.images,
        bytes_before=converted.ByteSize(),
        bytes_after=found.model.ByteSize(),
        latency=latency,
        alone=alone,
        notes=(
            *notes,
            *_verdict(faster=faster, finite=finite),
            *(_better_alone(alone, after, timings, settings) if faster and finite else ()),
        ),
    )


def _half(converted: onnx.ModelProto, path: Path, judge: Judge) -> Found:
    model = in_float16(converted, path)
    deviation = judge.of(model)
    trial = Trial("float16", 0, deviation.error, deviation.agreement, None)
    return Found(model, deviation, "", "", (), (trial,))


def _alike(
    original: onnx.ModelProto,
    found: Found,
    images: CalibrationSet,
    settings: QuantizationSettings,
    runtime: Runtime,
    progress: Progress,
) -> onnx.ModelProto:
    """Quantize the original as the conversion was, but with all of its layers."""
    path = Path("the original")
    require_quantizable(original, path, settings, runtime)
    if settings.precision == "float16":
        return in_float16(original, path)
    ready = find_ranges(original, path, images, settings, runtime, progress)
    types = next(each for each in ARITHMETICS if each.name == found.types)
    return in_int8(ready.model, ready.ranges.by(found.ranges), types)


def _latency(timings: Mapping[str, Timing], target: Target) -> InTurns:
    return InTurns(
        provider=target.runtime.provider,
        threads=target.runtime.thread_count,
        batch=target.batch,
        original_ms=timings["original"].median_ms,
        float_ms=timings["float"].median_ms,
        quantized_ms=timings["quantized"].median_ms,
        speedup=speedup(timings["original"], timings["quantized"]),
        over_float=speedup(timings["float"], timings["quantized"]),
    )


def _alone(deviation: Answers, size: int, timings: Mapping[str, Timing]) -> Alone:
    if not timings:
        return Alone(deviation, size, None, None)
    gained = speedup(timings["alone"], timings["quantized"])
    return Alone(deviation, size, timings["alone"].median_ms, gained)


def _verdict(*, faster: bool, finite: bool) -> tuple[str, ...]:
    if not finite:
        return (
            "the quantized model answers with NaN or infinity, so the float model was written as it is",
        )
    if not faster:
        return (
            "the quantized model is slower than the float one on this machine, so the float one was written "
            "as it is",
        )
    return ()


def _better_alone(
    alone: Alone | None,
    after: Answers,
    timings: Mapping[str, Timing],
    settings: QuantizationSettings,
) -> tuple[str, ...]:
    """Say so where the original, quantized, answers better, is no slower, and faster than in float."""
    if alone is None or alone.speedup is None:
        return ()
    closer = alone.deviation.error < after.error
    pays = speedup(timings["original"], timings["alone"]).ratio >= 1.0
    if not (closer and pays) or alone.speedup.ratio > 1.0:
        return ()
    return (
        f"the original in {settings.precision} is closer to its own answers than this conversion, and no "
        "slower here: give `twofold quantize` the original twice to get it",
    )
