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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.config import (
    PRESETS,
    Budget,
    CalibrationSettings,
    Preprocessing,
    Runtime,
    SolverSettings,
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
    from converter.calibration.sets import CalibrationSet, DataReader
    from converter.inspection import Inspection, LayerInspection
    from converter.outcome import Conversion, LayerOutcome
    from converter.validation import Validation

    __version__: str

__all__ = [
    "PRESETS",
    "SILENT",
    "Budget",
    "CalibrationError",
    "CalibrationSet",
    "CalibrationSettings",
    "ConfigError",
    "Conversion",
    "ConverterError",
    "DataReader",
    "Inspection",
    "LayerInspection",
    "LayerOutcome",
    "ModelError",
    "Preprocessing",
    "Progress",
    "Runtime",
    "SolverError",
    "SolverSettings",
    "Validation",
    "ValidationError",
    "__version__",
    "convert",
    "inspect",
    "validate",
]

_LAZY = {
    "CalibrationSet": "converter.calibration.sets",
    "Conversion": "converter.outcome",
    "DataReader": "converter.calibration.sets",
    "Inspection": "converter.inspection",
    "LayerInspection": "converter.inspection",
    "LayerOutcome": "converter.outcome",
    "Validation": "converter.validation",
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
    budget: Budget,
    *,
    preset: str | None = None,
    preprocessing: Preprocessing | None = None,
    calibration: CalibrationSettings | None = None,
    solver: SolverSettings | None = None,
    runtime: Runtime | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert a trained CNN into a smaller one, within a budget.

    Parameters
    ----------
    model : str or Path
        The ONNX model; it is not changed.
    calib : str, Path, DataReader or CalibrationSet
        What the layers are fitted on, without labels: a folder of images, a `.npy` or `.npz` file,
        or any `onnxruntime.quantization.CalibrationDataReader`.
    out : str or Path
        Where the new model goes. It appears whole or not at all.
    budget : Budget
        What the result may cost, as in `Budget(macs=2)`.
    preset : str or None, default None
        Key of `PRESETS`: how image files are prepared.
    preprocessing : Preprocessing or None, default None
        The same in full, in place of `preset`. With neither it is `unit`: pixels from 0 to 1.
    calibration : CalibrationSettings or None, default None
        How many images and patches, and how much memory; None takes the defaults.
    solver : SolverSettings or None, default None
        Which solver; None takes ADMM.
    runtime : Runtime or None, default None
        Where onnxruntime runs; None takes the CPU with all cores.
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
    SolverError
        Where a fit becomes non-finite.
    """
    from converter.pipeline import convert as run

    return run(
        Path(model),
        _source(calib),
        Path(out),
        budget,
        preprocessing=_preprocessing(preset, preprocessing),
        calibration=calibration or CalibrationSettings(),
        solver=solver or SolverSettings(),
        runtime=runtime or Runtime(),
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
    from converter import validation
    from converter.calibration.sets import open_calibration_set
    from converter.model_file import load_model
    from converter.runtime import model_inputs

    first, second, source = Path(original), Path(converted), _source(data)
    chosen = open_calibration_set(
        source,
        model_inputs(load_model(first), label=str(first)),
        _preprocessing(preset, preprocessing),
        images=images,
        labels=_has_classes(source) if labels is None else labels,
    )
    with _Comparing(progress, len(chosen)) as compared:
        return validation.validate(
            first,
            second,
            chosen,
            runtime or Runtime(),
            batch=batch,
            time_batches=time_batches,
            seconds=seconds,
            progress=compared,
        )


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


def _has_classes(source: Path | DataReader | CalibrationSet) -> bool:
    """Whether a source can be taken as labelled: no image lies outside of a subfolder."""
    from converter.calibration.images import IMAGE_SUFFIXES

    if not isinstance(source, Path) or not source.is_dir():
        return True  # labels are then taken where the source has them
    try:
        names = [path for path in source.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False  # opening it says what is wrong
    return not any(path.suffix.lower() in IMAGE_SUFFIXES for path in names)


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
