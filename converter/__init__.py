"""Twofold: smaller and faster CNNs from trained ones, ONNX in and ONNX out.

>>> import converter
>>> conversion = converter.convert(
...     "vgg16.onnx", "images/", "small.onnx", converter.Budget(macs=2), preset="imagenet"
... )  # doctest: +SKIP
>>> converter.validate("vgg16.onnx", "small.onnx", "val/", preset="imagenet")  # doctest: +SKIP

Importing this package is quick: what needs onnx, onnxruntime or torch is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.config import (
    PRESETS,
    Budget,
    CalibrationSettings,
    Gates,
    Preprocessing,
    QuantizationSettings,
    RecoverySettings,
    Runtime,
    SolverSettings,
    Target,
)
from converter.errors import (
    CalibrationError,
    ConfigError,
    ConverterError,
    ModelError,
    SolverError,
    ValidationError,
)
from converter.progress import SILENT, Progress

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from converter.calibration.sets import CalibrationSet, DataReader
    from converter.difference import Change, Difference
    from converter.drop import Evaluation
    from converter.front import Front, FrontPoint, Verified
    from converter.gates import GateResult, Verdict
    from converter.inspection import Inspection, LayerInspection
    from converter.outcome import Conversion, Drop, LayerOutcome, Probe, Search
    from converter.quantization.quantizing import Quantized
    from converter.refine.recovery import Recovered
    from converter.validation.findings import Validation

    __version__: str

__all__ = [
    "PRESETS",
    "SILENT",
    "Budget",
    "CalibrationError",
    "CalibrationSet",
    "CalibrationSettings",
    "Change",
    "ConfigError",
    "Conversion",
    "ConverterError",
    "DataReader",
    "Difference",
    "Drop",
    "Front",
    "FrontPoint",
    "GateResult",
    "Gates",
    "Inspection",
    "LayerInspection",
    "LayerOutcome",
    "ModelError",
    "Preprocessing",
    "Probe",
    "Progress",
    "QuantizationSettings",
    "Quantized",
    "Recovered",
    "RecoverySettings",
    "Runtime",
    "Search",
    "SolverError",
    "SolverSettings",
    "Target",
    "Validation",
    "ValidationError",
    "Verdict",
    "Verified",
    "__version__",
    "check",
    "convert",
    "diff",
    "inspect",
    "plan",
    "quantize",
    "recover",
    "validate",
]

_LAZY = {
    "CalibrationSet": "converter.calibration.sets",
    "Change": "converter.difference",
    "Conversion": "converter.outcome",
    "DataReader": "converter.calibration.sets",
    "Difference": "converter.difference",
    "Drop": "converter.outcome",
    "Front": "converter.front",
    "FrontPoint": "converter.front",
    "GateResult": "converter.gates",
    "Inspection": "converter.inspection",
    "LayerInspection": "converter.inspection",
    "LayerOutcome": "converter.outcome",
    "Probe": "converter.outcome",
    "Quantized": "converter.quantization.quantizing",
    "Recovered": "converter.refine.recovery",
    "Search": "converter.outcome",
    "Validation": "converter.validation.findings",
    "Verdict": "converter.gates",
    "Verified": "converter.front",
}
"""Types that are slow to import, and where they are."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("twofold")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def convert(
    model: str | Path,
    calib: str | Path | DataReader | CalibrationSet,
    out: str | Path,
    budget: Budget | None = None,
    *,
    max_drop: float | None = None,
    val: str | Path | DataReader | CalibrationSet | None = None,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    calibration: CalibrationSettings | None = None,
    solver: SolverSettings | None = None,
    target: Target | None = None,
    timing: bool = True,
    cache: str | Path | None = None,
    work: str | Path | None = None,
    recovery: RecoverySettings | None = None,
    recover_images: str | Path | DataReader | CalibrationSet | None = None,
    quantization: QuantizationSettings | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert a trained CNN into a smaller one, within a budget or a tolerance.

    Parameters
    ----------
    model : str or Path
        The ONNX model; it is not changed.
    calib : str, Path, DataReader or CalibrationSet
        What the layers are fitted on, without labels: a folder of images, a `.npy` or `.npz` file,
        or any `onnxruntime.quantization.CalibrationDataReader`.
    out : str or Path
        Where the new model goes. It appears whole or not at all.
    budget : Budget or None, default None
        What the result may cost, as in `Budget(speedup=2)` or `Budget(macs=4, params=2)`.
    max_drop : float or None, default None
        In place of a budget: the fastest model that loses no more, found by trying some budgets. In
        percentage points, from 0 to below 100: of accuracy where `val` has classes, otherwise of top-1
        agreement with the original; for networks that are no classifiers, the output error
        ‖converted − original‖ / ‖original‖ in percent. Without `timing`, the model of the fewest
        multiply-accumulates.
    val : str, Path, DataReader, CalibrationSet or None, default None
        What the drop is measured on, as `data` of `validate`, with the subfolders of an image folder as
        classes; only with `max_drop`. None holds back every fifth calibration image and measures
        agreement on those.
    preset : str or None, default None
        Key of `PRESETS`: how image files are prepared.
    preprocessing : Preprocessing or None, default None
        The same in full, in place of `preset`. With neither it is `unit`: pixels from 0 to 1.
    calibration : CalibrationSettings or None, default None
        How many images and patches, and how much memory; None takes the defaults.
    solver : SolverSettings or None, default None
        Which solver; None takes ADMM.
    target : Target or None, default None
        Where the result must be fast: provider, threads and batch; None takes the CPU with all cores and
        a batch of 1.
    timing : bool, default True
        Whether forms and the result are timed under onnxruntime, so that the result is not slower than
        the original; without it a budget in time is refused.
    cache : str, Path or None, default None
        Folder of measured milliseconds; None takes TWOFOLD_CACHE or the user's cache folder.
    work : str, Path or None, default None
        Folder that finished layers are kept in, so that a run that was killed goes on from there to the
        same result; None keeps nothing.
    recovery : RecoverySettings or None, default None
        Train the result to answer as the original does, as `recover`; it is written before and, where
        that made it better, after.
    recover_images : str, Path, DataReader, CalibrationSet or None, default None
        What it learns from; None takes `calib`.
    quantization : QuantizationSettings or None, default None
        Then quantize the result, as `quantize`. With timing, forms that gain too little of int8 here are
        left out of the plan before.
    executor : Executor or None, default None
        Where candidates of the layers are fitted; None does it in threads of this process. What is
        submitted can be pickled, so that processes and clusters do.
    progress : Progress, default SILENT
        Told of each stage.

    Returns
    -------
    Conversion
        What became of each layer and of the whole; also what the JSON report holds.

    Raises
    ------
    ConfigError
        Where a setting, the budget or the output path cannot be used.
    ModelError
        Where the model cannot be read or onnxruntime refuses it.
    CalibrationError
        Where the calibration data cannot be read or do not fit the model.
    ValidationError
        Where no faster model loses so little as `max_drop`; nothing is written then.
    SolverError
        Where a fit becomes non-finite.
    """
    if (budget is None) == (max_drop is None):
        raise ConfigError(
            "give either a budget or a tolerance, one of the two: --speedup 2 to halve the time, or "
            "--max-drop 0.5 for the fastest model that loses half a point at most"
        )
    if max_drop is None and val is not None:
        raise ConfigError("--val is what --max-drop is measured on; give both or neither")
    from converter.pipeline import convert as run
    from converter.tolerance import Tolerance

    tolerance = None
    if max_drop is not None:
        learned = recover_images if recovery is not None else None
        tolerance = Tolerance(max_drop, _evaluation(val, calib, learned))
    return run(
        Path(model),
        _source(calib),
        Path(out),
        budget,
        tolerance=tolerance,
        preprocessing=_preprocessing(preset, preprocessing),
        calibration=calibration or CalibrationSettings(),
        solver=solver or SolverSettings(),
        target=target or Target(),
        timing=timing,
        cache=None if cache is None else Path(cache),
        work=None if work is None else Path(work),
        recovery=recovery,
        recover_images=_source(calib if recover_images is None else recover_images),
        quantization=quantization,
        executor=executor,
        progress=progress,
    )


def plan(
    model: str | Path,
    calib: str | Path | DataReader | CalibrationSet,
    *,
    val: str | Path | DataReader | CalibrationSet | None = None,
    verify: int = 2,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    calibration: CalibrationSettings | None = None,
    solver: SolverSettings | None = None,
    target: Target | None = None,
    timing: bool = True,
    cache: str | Path | None = None,
    work: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Front:
    """Say what a model could become, without writing one: error against time, or against MACs.

    Parameters
    ----------
    model, calib
        As in `convert`.
    val : str, Path, DataReader, CalibrationSet or None, default None
        What the verified points are judged on, as in `convert`.
    verify : int, default 2
        How many points to carry out, from 0 to 16: to fit, to time, and to compare with the original.
    preset, preprocessing, calibration, solver, target, timing, cache, work, executor, progress
        As in `convert`.

    Returns
    -------
    Front
        The best plans for some budgets, from the original on.

    Raises
    ------
    ConfigError, ModelError, CalibrationError, SolverError
        As `convert`.
    """
    from converter.front import plan as run

    if verify == 0 and val is not None:
        raise ConfigError(
            "--val is what points are verified on, and --verify 0 asks for none; leave one out"
        )
    return run(
        Path(model),
        _source(calib),
        evaluation=_evaluation(val, calib),
        verify=verify,
        preprocessing=_preprocessing(preset, preprocessing),
        calibration=calibration or CalibrationSettings(),
        solver=solver or SolverSettings(),
        target=target or Target(),
        timing=timing,
        cache=None if cache is None else Path(cache),
        work=None if work is None else Path(work),
        executor=executor,
        progress=progress,
    )


def recover(
    original: str | Path,
    converted: str | Path,
    images: str | Path | DataReader | CalibrationSet,
    out: str | Path,
    settings: RecoverySettings,
    *,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    runtime: Runtime | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = SILENT,
) -> Recovered:
    """Train a converted model to answer as its original does, on images without labels.

    Parameters
    ----------
    original, converted : str or Path
        A model and what it was converted to; neither is changed.
    images : str, Path, DataReader or CalibrationSet
        What it learns from, as `calib` of `convert`; the more the better. Every tenth is held out.
    out : str or Path
        Where the better of the two goes: the converted model as it was, or as it was trained, by how far
        their answers on the held-out images are from the original's.
    settings : RecoverySettings
        As in `RecoverySettings(seconds=600)`.
    preset, preprocessing
        As in `convert`.
    runtime : Runtime or None, default None
        Where both are judged; None takes the CPU.
    checkpoint : str, Path or None, default None
        File that an interrupted run goes on from, and that is removed at the end; None takes `out` with
        the suffix .recovery.npz.
    progress : Progress, default SILENT
        Told of each stage.

    Returns
    -------
    Recovered

    Raises
    ------
    ConverterError
        As `convert`; `UnsupportedOperatorError` where an operator cannot be differentiated.
    """
    from converter.refine.pipeline import recover_files

    return recover_files(
        Path(original),
        Path(converted),
        _source(images),
        Path(out),
        settings,
        preprocessing=_preprocessing(preset, preprocessing),
        runtime=runtime or Runtime(),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
    )


def quantize(
    original: str | Path,
    converted: str | Path,
    calib: str | Path | DataReader | CalibrationSet,
    out: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    target: Target | None = None,
    timing: bool = True,
    progress: Progress = SILENT,
) -> Quantized:
    """Quantize a converted model: int8 for CPUs, or half precision for CUDA.

    Parameters
    ----------
    original, converted : str or Path
        A model and what it was converted to, or the same twice; neither is changed.
    calib : str, Path, DataReader or CalibrationSet
        What ranges are taken from, as in `convert`. Every tenth image is held out; what suits the model is
        chosen on those.
    out : str or Path
        Where the quantized model goes; the converted one as it is where that is faster.
    settings : QuantizationSettings or None, default None
        None takes int8.
    preset, preprocessing
        As in `convert`.
    target, timing
        As in `convert`; without timing the quantized model is written even if it is slower.
    progress : Progress, default SILENT
        Told of each stage.

    Returns
    -------
    Quantized

    Raises
    ------
    ValidationError
        Where the inputs or outputs of the two models differ.
    ConverterError
        As `convert`.
    """
    from converter.quantization.pipeline import quantize_files

    return quantize_files(
        Path(original),
        Path(converted),
        _source(calib),
        Path(out),
        settings or QuantizationSettings(),
        preprocessing=_preprocessing(preset, preprocessing),
        target=target or Target(),
        timing=timing,
        progress=progress,
    )


def validate(
    original: str | Path,
    converted: str | Path,
    data: str | Path | DataReader | CalibrationSet,
    *,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    labels: bool | None = None,
    images: int | None = None,
    batch: int = 32,
    time_batches: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    runtime: Runtime | None = None,
    progress: Progress = SILENT,
) -> Validation:
    """Compare two models under onnxruntime: outputs, answers, accuracy, latency and cost.

    Parameters
    ----------
    original, converted : str or Path
        Two ONNX models with the same inputs and outputs.
    data : str, Path, DataReader or CalibrationSet
        What both run on, as `calib` of `convert`; better images that the conversion has not seen.
    preset, preprocessing
        As in `convert`.
    labels : bool or None, default None
        Whether accuracy is wanted, with the subfolders of an image folder as classes, in sorted
        order (or the key `labels` of a `.npz` file). None decides by itself: a folder counts as
        labelled where it has images in subfolders only.
    images : int or None, default None
        At most so many images, spread evenly over the set; None takes all.
    batch : int, default 32
        Images that run at once for the comparison, from 1.
    time_batches : sequence of int, default (1, 32)
        Batch sizes to time.
    seconds : float, default 2.0
        Timed seconds for each model and batch size, above 0.
    runtime, progress
        As in `convert`.

    Returns
    -------
    Validation

    Raises
    ------
    ValidationError
        Where the inputs or outputs of the two models differ.
    ModelError, CalibrationError, ConfigError
        Where a model, the data or a setting cannot be used.
    """
    _, validation = _compared(
        Path(original),
        Path(converted),
        _source(data),
        _preprocessing(preset, preprocessing),
        labels=labels,
        images=images,
        batch=batch,
        time_batches=time_batches,
        seconds=seconds,
        runtime=runtime or Runtime(),
        progress=progress,
    )
    return validation


def check(
    original: str | Path,
    converted: str | Path,
    data: str | Path | DataReader | CalibrationSet,
    gates: Gates,
    *,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    target: Target | None = None,
    seconds: float = 2.0,
    progress: Progress = SILENT,
) -> Verdict:
    """Judge a converted model by gates: whether it may take the place of its original.

    Parameters
    ----------
    original, converted : str or Path
        As in `validate`.
    data : str, Path, DataReader or CalibrationSet
        What both run on, as in `validate`; class folders for accuracy.
    gates : Gates
        What must hold, as in `Gates(min_speedup=1.8, max_accuracy_drop=0.5)`; one at least.
    preset, preprocessing
        As in `convert`.
    target : Target or None, default None
        Provider, threads and batch that speed is judged at; None as in `convert`.
    seconds : float, default 2.0
        Timed seconds for each model, above 0.
    progress : Progress, default SILENT

    Returns
    -------
    Verdict
        Also where gates fail; `passed` and `failed` say so.

    Raises
    ------
    ConfigError
        Where no gate is given, or one needs labels that the data do not have.
    ValidationError, ModelError, CalibrationError
        As `validate`.
    """
    from converter.calibration.opening import has_classes
    from converter.gates import Verdict, judge, require_judgeable
    from converter.model_file import model_digest
    from converter.runtime import machine

    first, second, source = Path(original), Path(converted), _source(data)
    prepared = _preprocessing(preset, preprocessing)
    target = target or Target()
    require_judgeable(gates, source)
    chosen, validation = _compared(
        first,
        second,
        source,
        prepared,
        labels=has_classes(source),
        images=None,
        batch=32,
        time_batches=(target.batch,),
        seconds=seconds,
        runtime=target.runtime,
        progress=progress,
    )
    return Verdict(
        original=first,
        converted=second,
        gates=judge(gates, validation),
        validation=validation,
        data={"data": chosen.describe(), "digest": chosen.digest()},
        original_digest=model_digest(first),
        converted_digest=model_digest(second),
        settings={
            "gates": gates.asked(),
            "preprocessing": asdict(prepared),
            "target": asdict(target),
            "seconds": seconds,
        },
        machine=machine(),
    )


def _compared(
    original: Path,
    converted: Path,
    source: Path | DataReader | CalibrationSet,
    preprocessing: Preprocessing,
    *,
    labels: bool | None,
    images: int | None,
    batch: int,
    time_batches: Sequence[int],
    seconds: float,
    runtime: Runtime,
    progress: Progress,
) -> tuple[CalibrationSet, Validation]:
    """Open the images and compare two models on them; see `validate`."""
    from converter.calibration.opening import has_classes, open_calibration_set
    from converter.model_file import load_model
    from converter.runtime import model_inputs
    from converter.validation import pipeline

    if images is not None and images < 1:
        raise ConfigError(f"{images} images to validate on are too few; give at least 1")
    chosen = open_calibration_set(
        source,
        model_inputs(load_model(original), label=str(original)),
        preprocessing,
        images=images,
        labels=has_classes(source) if labels is None else labels,
    )
    if labels and all(batch.labels is None for batch in islice(chosen.batches(1), 1)):
        raise CalibrationError(
            f"{chosen.describe()} has no labels; put images into one subfolder for each class, or leave "
            "--labels out"
        )
    with _Comparing(progress, len(chosen)) as compared:
        return chosen, pipeline.validate(
            original,
            converted,
            chosen,
            runtime,
            batch=batch,
            time_batches=time_batches,
            seconds=seconds,
            progress=compared,
        )


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare the reports of two conversions: settings, versions, hashes, layers and figures.

    Parameters
    ----------
    first, second : str or Path
        JSON reports of `twofold convert` or `twofold run`.

    Returns
    -------
    Difference

    Raises
    ------
    ConfigError
        Where a file cannot be read or is no such report.
    """
    from converter.difference import diff as run

    return run(Path(first), Path(second))


def inspect(model: str | Path, size: tuple[int, int] | None = None) -> Inspection:
    """List a model's linear layers: shapes, cost, activation, and whether they can be converted.

    Parameters
    ----------
    model : str or Path
        An ONNX model.
    size : tuple of (int, int) or None, default None
        Height and width of the images, for a model that leaves them free.

    Returns
    -------
    Inspection

    Raises
    ------
    ModelError
        Where the model cannot be read or onnxruntime refuses it.
    ConfigError
        Where `size` is needed, or does not fit.
    """
    from converter import inspection

    return inspection.inspect(Path(model), size)


def _source(
    data: str | Path | DataReader | CalibrationSet,
) -> Path | DataReader | CalibrationSet:
    return Path(data) if isinstance(data, str) else data


def _evaluation(
    val: str | Path | DataReader | CalibrationSet | None,
    fitted: str | Path | DataReader | CalibrationSet,
    learned: str | Path | DataReader | CalibrationSet | None = None,
) -> Evaluation:
    """Take a folder of images in class folders as labelled; what is judged on lies apart from the others."""
    from converter.calibration.opening import has_classes
    from converter.drop import Evaluation

    if val is None:
        return Evaluation()
    judged = _source(val)
    _require_apart(judged, _source(fitted), "the layers are fitted on")
    if learned is not None:
        _require_apart(judged, _source(learned), "the model learns from")
    return Evaluation(judged, labels=has_classes(judged))


def _require_apart(
    judged: Path | DataReader | CalibrationSet,
    other: Path | DataReader | CalibrationSet,
    whose: str,
) -> None:
    if not (isinstance(judged, Path) and isinstance(other, Path)):
        return
    one, two = judged.resolve(), other.resolve()
    # an archive of arrays is no part of the folder that it lies in
    if one == two:
        lies = "is"
    elif two.is_dir() and one.is_dir() and one.is_relative_to(two):
        lies = "lies in"
    elif one.is_dir() and two.is_dir() and two.is_relative_to(one):
        lies = "has images of"
    else:
        return
    raise ConfigError(
        f"{judged} {lies} {other}, which {whose}, and says nothing about other images; give --val another "
        "folder, or leave it out to hold back every fifth image"
    )


def _preprocessing(preset: str | None, preprocessing: Preprocessing | None) -> Preprocessing:
    if preset is None:
        return preprocessing or PRESETS["unit"]
    if preprocessing is not None:
        raise ConfigError("both a preset and preprocessing were given; give one of them")
    if preset not in PRESETS:
        raise ConfigError(
            f"the preset {preset!r} is none of {', '.join(PRESETS)}; give one of these"
        )
    return PRESETS[preset]


class _Comparing:
    """Shows a comparison as two stages: the images, then the timing, whose steps are not known."""

    def __init__(self, progress: Progress, images: int) -> None:
        self._progress = progress
        self._images = images
        self._done = 0
        self._open = ExitStack()
        self._advance: Callable[[int], None] = lambda _: None

    def __enter__(self) -> _Comparing:
        self._advance = self._open.enter_context(
            self._progress.stage("comparing outputs", self._images)
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def __call__(self, done: int, total: int) -> None:
        self._advance(done - self._done)
        self._done = done
        if done >= total:
            self._open.close()
            self._advance = lambda _: None
            self._open.enter_context(self._progress.stage("timing both models", 1))
