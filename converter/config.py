"""Settings: frozen, validated where they are made, and nothing else.

A setting that makes no sense is refused here, with `ConfigError`, before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from converter.errors import ConfigError

__all__ = [
    "PRESETS",
    "Budget",
    "CalibrationSettings",
    "Gates",
    "Preprocessing",
    "QuantizationSettings",
    "RecoverySettings",
    "Runtime",
    "SolverSettings",
    "Target",
    "gates_from_options",
    "nearest",
    "preprocessing_from_options",
    "preset_resize",
    "recovery_length",
]

Provider = Literal["cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]
QuantizedPrecision = Literal["int8", "float16"]
SolverName = Literal["admm", "svd", "data-svd"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a model's input: x = (pixel · scale − mean) / std, per channel.

    Attributes
    ----------
    size : tuple of (int, int) or None, default None
        Height and width that the model gets; None takes them from the model's input.
    resize : int or None, default None
        Shorter side, in pixels, that an image is resized to before the crop; None resizes
        straight to `size`, without a crop.
    crop : {"center", "none"}, default "center"
        What happens after `resize`: a centred crop of `size`, or nothing.
    layout : {"nchw", "nhwc"}, default "nchw"
        Axis order of the model's input.
    channels : {"rgb", "bgr", "gray"}, default "rgb"
        Channel order of the model's input.
    scale : float, default 1/255
        Factor on pixel values (0 to 255), above 0.
    mean, std : tuple of float, default (0,), (1,)
        One value for all channels or one per channel, after `scale`; each std above 0.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["center", "none"] = "center"
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        count = 1 if self.channels == "gray" else 3
        if self.size is not None:
            _require(
                len(self.size) == 2 and all(0 < side <= 16384 for side in self.size),
                f"size {self.size} is not a height and a width from 1 to 16384; "
                "give one or two such numbers",
            )
        if self.resize is not None:
            _require(
                0 < self.resize <= 16384,
                f"resize {self.resize} is not from 1 to 16384 pixels; correct it",
            )
        for name, values, allowed in (
            ("crop", self.crop, ("center", "none")),
            ("layout", self.layout, ("nchw", "nhwc")),
            ("channels", self.channels, ("rgb", "bgr", "gray")),
        ):
            _require(
                values in allowed,
                f"{name} {values!r} is none of {', '.join(allowed)}; give one of these",
            )
        _require(
            math.isfinite(self.scale) and self.scale > 0,
            f"scale {self.scale} is not a number above 0; 1/255 maps pixels to 0..1",
        )
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            _require(
                len(numbers) in (1, count) and all(math.isfinite(n) for n in numbers),
                f"{name} {numbers} is not 1 or {count} finite numbers; give one for each channel",
            )
        _require(
            all(s > 0 for s in self.std),
            f"std {self.std} has a value that is not above 0; correct it",
        )

    def replace(self, **changes: object) -> Preprocessing:
        """Return a copy with some settings changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # validated by __post_init__


PRESETS: dict[str, Preprocessing] = {
    "imagenet": Preprocessing(resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "cifar10": Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "unit": Preprocessing(),
    "none": Preprocessing(scale=1.0),
}
"""Named ways to prepare images. `unit` maps pixels to 0..1, `none` keeps 0..255. `imagenet`
resizes the shorter side to 256 and crops the centre (scaled in proportion where the model's
input is not 224)."""


def preset_resize(size: tuple[int, int]) -> int:
    """Return the shorter side that the preset `imagenet` resizes to before it crops `size`.

    The preset's 256 belong to a crop of 224; another crop gets them in proportion to its longer
    side, so that it always fits: 256/224 · max(size), rounded.
    """
    return round(256 / 224 * max(size))


def preprocessing_from_options(
    preset: str | None = None,
    size: str | None = None,
    resize: int | None = None,
    crop: str | None = None,
    layout: str | None = None,
    channels: str | None = None,
    scale: float | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> Preprocessing:
    """Lay options, as they are typed, over a preset; None leaves what the preset says.

    Parameters
    ----------
    preset : str or None
        A key of `PRESETS`; None starts from the defaults of `Preprocessing`.
    size : str or None
        "224" for a square, or height and width as in "224x256".
    resize : int or None
        Shorter side before the crop, in pixels. Where only `size` is given, the preset's own is
        scaled to it (`preset_resize`).
    crop, layout, channels : str or None
        As in `Preprocessing`. With "bgr" the preset's mean and std turn round with the channels.
    scale : float or None
        Factor on pixel values.
    mean, std : str or None
        Numbers with commas between, as in "0.485,0.456,0.406".

    Raises
    ------
    ConfigError
        Where the preset is unknown, or an option cannot be read or makes no sense.
    """
    _require(
        preset is None or preset in PRESETS,
        f"the preset {preset!r} is none of {', '.join(PRESETS)}; give one of these",
    )
    base = Preprocessing() if preset is None else PRESETS[preset]
    changes: dict[str, object] = {
        name: value
        for name, value in (
            ("resize", resize),
            ("crop", crop),
            ("layout", layout),
            ("channels", channels),
            ("scale", scale),
        )
        if value is not None
    }
    if size is not None:
        changes["size"] = sides = _size_from(size)
        if resize is None and base.resize is not None:
            changes["resize"] = preset_resize(sides)
    if channels == "bgr":
        changes.update(mean=base.mean[::-1], std=base.std[::-1])
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            changes[name] = _numbers_from(name, text)
    return base.replace(**changes)


def _size_from(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    _require(
        len(sides) in (1, 2) and all(s.isascii() and s.isdigit() and len(s) <= 5 for s in sides),
        f"the size {text!r} is neither one number nor two, such as 224 or 224x256; correct it",
    )
    return int(sides[0]), int(sides[-1])


def _numbers_from(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{name} {text!r} is not a list of numbers such as 0.485,0.456,0.406; correct it"
        ) from error


@dataclass(frozen=True)
class Runtime:
    """Where and how models run under onnxruntime.

    Attributes
    ----------
    provider : {"cpu", "cuda"}, default "cpu"
    threads : int, default 0
        Threads inside one operator; 0 takes the cores that this process may use.
    """

    provider: Provider = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        _require(
            self.provider in ("cpu", "cuda"),
            f"provider {self.provider!r} is neither cpu nor cuda; give one",
        )
        _require(
            0 <= self.threads <= 1024, f"threads {self.threads} is not from 0 to 1024; correct it"
        )

    @property
    def thread_count(self) -> int:
        """Threads inside one operator, with 0 resolved."""
        if self.threads:
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else (os.cpu_count() or 1)


@dataclass(frozen=True)
class Target:
    """Where the converted model must be fast.

    Attributes
    ----------
    runtime : Runtime
        Provider and threads.
    batch : int, default 1
        Samples that run at once, from 1.
    """

    runtime: Runtime = Runtime()
    batch: int = 1

    def __post_init__(self) -> None:
        _require(1 <= self.batch <= 65536, f"batch {self.batch} is not from 1 to 65536; correct it")


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
        _require(
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
                _require(
                    math.isfinite(factor) and factor > 1,
                    f"the {name} budget {factor} is not a factor above 1; "
                    "2 asks for half of the original",
                )
        if self.latency_ms is not None:
            _require(
                math.isfinite(self.latency_ms) and self.latency_ms > 0,
                f"the latency budget {self.latency_ms} is not a number of milliseconds above 0; "
                "4.5 asks for a model that takes 4.5 ms",
            )
        _require(
            self.speedup is None or self.latency_ms is None,
            "both --speedup and --latency-ms were given, and both bound the time; give one of them",
        )

    @property
    def timed(self) -> bool:
        """Whether the budget bounds the time, so that candidates must be measured."""
        return self.speedup is not None or self.latency_ms is not None


@dataclass(frozen=True)
class CalibrationSettings:
    """How activations are recorded.

    Attributes
    ----------
    images : int or None, default None
        At most so many images are used, spread evenly over the set; None uses all.
    batch : int, default 64
        Images that run through the model at once, from 1; a model with a fixed batch overrides it.
    patches : int, default 16384
        Patches that are sampled for each layer, from 256.
    memory_mib : int, default 1024
        Bound on what recording keeps in memory at any time, in MiB, from 64.
    seed : int, default 0
        Seed of every sample that is drawn.
    """

    images: int | None = None
    batch: int = 64
    patches: int = 16384
    memory_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.images is None or self.images > 0,
            f"{self.images} calibration images are too few; give at least 1",
        )
        _require(
            1 <= self.batch <= 4096,
            f"calibration batch {self.batch} is not from 1 to 4096; correct it",
        )
        _require(
            self.patches >= 256, f"{self.patches} patches a layer are too few; give at least 256"
        )
        _require(
            self.memory_mib >= 64,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 64",
        )
        _require(self.seed >= 0, f"seed {self.seed} is below 0; correct it")


@dataclass(frozen=True)
class RecoverySettings:
    """How a converted network learns from its original.

    Attributes
    ----------
    seconds : float or None, default None
        Time that the training takes, judging on held-out images within it, above 0; not beside `epochs`.
    epochs : float or None, default None
        How often it goes through the images, above 0.
    batch : int, default 64
        Images of one step, from 2.
    rate : float, default 0.003
        First step of a weight, relative to the root mean square of its tensor; above 0 and below 1. On a
        ResNet-20 at half its size, held-out answers did not get better within 400 steps at 0.02.
    temperature : float, default 4
        What scores of classes are divided by before they are compared, above 0.
    features : float, default 0.5
        Weight of inner responses beside the outputs, from 0.
    refit : float, default 0
        Share of the length, from 0 to 1, in which biases and one factor for each output channel are trained
        alone, before all weights are; 1 trains nothing else.
    gradual : int or None, default None
        In how many parts a conversion goes its way, from 1 to 8, each converted and recovered before the
        next; None takes 2 for a budget of a half or less, and else 1.
    augment : tuple of str, default ("flip", "shift")
        What happens to images on their way: "flip" left to right, "shift" by up to an eighth.
    mirrored : bool, default False
        Whether scores of classes follow the mean of the original's answers to an image and to its mirror
        image, in place of the former alone.
    labels : bool, default False
        Whether the images' classes are learned as well.
    precision : {"auto", "float32", "bfloat16"}, default "auto"
        Of activations; auto takes bfloat16 where it is clearly faster.
    device : str, default "cpu"
        torch device: "cpu", "cuda" or "cuda:N".
    memory_mib : int, default 1024
        Bound on the images in memory, in MiB, from 16; the original's answers take up to a quarter more.
    seed : int, default 0
    """

    seconds: float | None = None
    epochs: float | None = None
    batch: int = 64
    rate: float = 0.003
    temperature: float = 4.0
    features: float = 0.5
    refit: float = 0.0
    gradual: int | None = None
    augment: tuple[str, ...] = ("flip", "shift")
    mirrored: bool = False
    labels: bool = False
    precision: Precision = "auto"
    device: str = "cpu"
    memory_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            (self.seconds is None) != (self.epochs is None),
            "a recovery ends after some time or some epochs; give one of them, as in --recover 10m "
            "or --recover 5e",
        )
        for name, value in (
            ("seconds", self.seconds),
            ("epochs", self.epochs),
            ("temperature", self.temperature),
        ):
            _require(
                value is None or (math.isfinite(value) and value > 0),
                f"{name} {value} of the recovery is not a number above 0; correct it",
            )
        _require(2 <= self.batch <= 65536, f"batch {self.batch} is not from 2 to 65536; correct it")
        _require(0 < self.rate < 1, f"the rate {self.rate} is not between 0 and 1; 0.003 is usual")
        _require(
            math.isfinite(self.features) and self.features >= 0,
            f"the weight {self.features} of inner responses is not a number from 0; correct it",
        )
        _require(
            0 <= self.refit <= 1,
            f"refit {self.refit} is no share of the recovery from 0 to 1; correct it",
        )
        _require(
            self.gradual is None or 1 <= self.gradual <= 8,
            f"gradual {self.gradual} is not from 1 to 8 parts; 2 is usual",
        )
        unknown = [way for way in self.augment if way not in ("flip", "shift")]
        _require(not unknown, f"augment {', '.join(unknown)}: give some of flip, shift, or none")
        _require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"precision {self.precision!r} is none of auto, float32, bfloat16; give one",
        )
        _require(
            self.memory_mib >= 16,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 16",
        )
        _require(self.seed >= 0, f"seed {self.seed} is below 0; correct it")

    def of_share(self, share: float) -> RecoverySettings:
        """Give the same for a share of the length."""
        seconds = None if self.seconds is None else share * self.seconds
        epochs = None if self.epochs is None else share * self.epochs
        return dataclasses.replace(self, seconds=seconds, epochs=epochs)


_RECOVERY_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def recovery_length(text: str) -> dict[str, Any]:
    """Read how long a recovery takes, as "90s", "10m" and "1.5h", or "20e" for epochs.

    Returns
    -------
    dict of str to Any
        `seconds` or `epochs` of `RecoverySettings`.

    Raises
    ------
    ConfigError
        Where the text is neither.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:].lower()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    _require(
        math.isfinite(value) and value > 0 and unit in (*_RECOVERY_UNITS, "e"),
        f"--recover {text!r} is neither a time such as 90s, 10m or 1h nor epochs such as 20e; correct it",
    )
    return {"epochs": value} if unit == "e" else {"seconds": value * _RECOVERY_UNITS[unit]}


@dataclass(frozen=True)
class QuantizationSettings:
    """How the converted model is quantized.

    Attributes
    ----------
    precision : {"int8", "float16"}, default "int8"
        8-bit integers, for CPUs; or half precision, for CUDA.
    error : float, default 0.001
        Squared error of the outputs, relative to their variance, that does no harm: no layer is left in
        float for less. From 0.
    images : int or None, default None
        At most so many calibration images, spread evenly; None takes all.
    batch : int, default 64
        Images that run at once, from 1; a model with a fixed batch overrides it.
    memory_mib : int, default 1024
        Bound on the tensors of one batch, and on the held-out images with their answers, in MiB, from 16.
    """

    precision: QuantizedPrecision = "int8"
    error: float = 0.001
    images: int | None = None
    batch: int = 64
    memory_mib: int = 1024

    def __post_init__(self) -> None:
        _require(
            self.precision in ("int8", "float16"),
            f"precision {self.precision!r} is neither int8 nor float16; give one",
        )
        _require(
            math.isfinite(self.error) and self.error >= 0,
            f"the error {self.error} that quantization may bring is not a number from 0; 0.001 is usual",
        )
        _require(
            self.images is None or self.images >= 1, f"images {self.images} is below 1; correct it"
        )
        _require(1 <= self.batch <= 65536, f"batch {self.batch} is not from 1 to 65536; correct it")
        _require(
            self.memory_mib >= 16,
            f"a memory bound of {self.memory_mib} MiB is too small; give at least 16",
        )


SCHEME_NAMES = ("channel", "spatial", "tucker", "sparse")


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
    schemes : tuple of str, default ("channel", "spatial", "tucker", "sparse")
        Ways to write a layer that the plan may choose from; the baselines have `channel` alone.
    """

    name: SolverName = "admm"
    device: str = "cpu"
    iterations: int = 25
    polish: int = 8
    schemes: tuple[str, ...] = SCHEME_NAMES

    def __post_init__(self) -> None:
        _require(
            self.name in ("admm", "svd", "data-svd"),
            f"solver {self.name!r} is none of admm, data-svd, svd; give one",
        )
        unknown = [name for name in self.schemes if name not in SCHEME_NAMES]
        _require(
            bool(self.schemes) and not unknown,
            f"schemes {', '.join(self.schemes) or 'none'}: give some of {', '.join(SCHEME_NAMES)}",
        )
        if self.name != "admm":
            object.__setattr__(self, "schemes", ("channel",))


@dataclass(frozen=True)
class Gates:
    """What a converted model must keep to before it is deployed; None is not asked for.

    Attributes
    ----------
    min_speedup : float or None, default None
        Original milliseconds over converted ones, ratio of medians, above 0.
    max_latency_ms : float or None, default None
        Median milliseconds of the converted model for one batch, above 0.
    max_accuracy_drop : float or None, default None
        Percentage points of top-1 accuracy that may be lost, from -100 to 100; needs class folders.
    min_accuracy : float or None, default None
        Top-1 accuracy of the converted model in percent, above 1 and up to 100; needs class folders.
    min_agreement : float or None, default None
        Percent of images with the same best class in both models, above 1 and up to 100.
    max_output_error : float or None, default None
        ‖converted − original‖ / ‖original‖ of the worst output, in percent, from 0.
    max_file_mb : float or None, default None
        Size of the converted model in megabytes of 1,000,000 bytes, above 0.
    min_macs_reduction : float or None, default None
        Multiply-accumulates of the original over those of the converted model, above 0.
    min_params_reduction : float or None, default None
        The same of parameters, above 0.
    """

    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_accuracy_drop: float | None = None
    min_accuracy: float | None = None
    min_agreement: float | None = None
    max_output_error: float | None = None
    max_file_mb: float | None = None
    min_macs_reduction: float | None = None
    min_params_reduction: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.asked().items():
            _require(math.isfinite(value), f"the gate {name} {value} is no number; correct it")
            if name in ("min_accuracy", "min_agreement"):
                # 0.99 would be meant as a share and hold for almost every model
                _require(
                    1 < value <= 100,
                    f"the gate {name} {value:g} is not a percentage above 1; 99 asks for 99 %",
                )
            elif name == "max_accuracy_drop":
                _require(
                    -100 <= value <= 100,
                    f"the gate {name} {value:g} is not from -100 to 100 percentage points; "
                    "0.5 allows half a point",
                )
            elif name == "max_output_error":
                _require(
                    value >= 0,
                    f"the gate {name} {value:g} is below 0 percent, which no model keeps to; correct it",
                )
            else:
                _require(value > 0, f"the gate {name} {value:g} is not above 0; correct it")

    def asked(self) -> dict[str, float]:
        """Those that were asked for, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def gates_from_options(options: Iterable[str]) -> Gates:
    """Read gates as they are typed, "min_speedup=1.8"; of two with one name the later counts.

    Raises
    ------
    ConfigError
        Where a gate is unknown, has no number, or makes no sense.
    """
    known = [each.name for each in dataclasses.fields(Gates)]
    found: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            remedy = f"did you mean {near!r}?" if near else f"give one of {', '.join(known)}"
            raise ConfigError(f"there is no gate {name!r}; {remedy}")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ConfigError(
                f"the gate {option!r} is not a name and a number such as {name}=1.8; correct it"
            ) from error
    return Gates(**found)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the known name that a mistyped one is most like; None where it is like none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
