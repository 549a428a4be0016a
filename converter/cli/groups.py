"""The groups of options that several commands have, and the settings that are made of them."""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from converter.cli.options import (
    IMAGES,
    QUANTIZATION,
    RECOVERY,
    RUNNING,
    Batch,
    CalibBatch,
    Device,
    Images,
    Seed,
    Timing,
)
from converter.cli.terminal import say
from converter.config import (
    PRESETS,
    SCHEME_NAMES,
    CalibrationSettings,
    Precision,
    Preprocessing,
    Provider,
    QuantizationSettings,
    RecoverySettings,
    Runtime,
    SolverName,
    SolverSettings,
    Target,
    preprocessing_from_options,
    recovery_length,
)
from converter.errors import ConfigError

__all__ = ["Planning", "Preparation", "Quantizing", "Running", "Training"]


@dataclass(frozen=True)
class Preparation:
    """Options that say how images are prepared; None is what was not given."""

    preset: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PRESETS),
            help="Named preparation, which the options below override; unit where none is given.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="H[xW]",
            help="Height and width that the model gets, where it does not fix them.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    resize: Annotated[
        int | None,
        typer.Option(help="Shorter side before the crop, in pixels.", rich_help_panel=IMAGES),
    ] = None
    crop: Annotated[
        str | None,
        typer.Option(metavar="center|none", help="Crop after --resize.", rich_help_panel=IMAGES),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="nchw|nhwc", help="Axis order of the model's input.", rich_help_panel=IMAGES
        ),
    ] = None
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="rgb|bgr|gray",
            help="Channels of the model's input, in order.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(help="Factor on pixel values, which are 0 to 255.", rich_help_panel=IMAGES),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER,NUMBER",
            help="Subtracted after the scale: one number, or one for each of --channels in order.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER,NUMBER",
            help="Divided by after the mean is off.",
            rich_help_panel=IMAGES,
        ),
    ] = None

    def preprocessing(self, data: Path, *, quiet: bool) -> Preprocessing:
        """Lay them over the preset; say it where nothing tells how pixels of `data` are scaled."""
        settings = preprocessing_from_options(
            **{f.name: getattr(self, f.name) for f in fields(self)}
        )
        said = (self.preset, self.scale, self.mean, self.std) != (None, None, None, None)
        if data.is_dir() and not said and not quiet:
            say(
                "pixels are scaled to 0..1 and nothing else (--preset unit), since no preset, scale, "
                "mean or std was given"
            )
        return settings


@dataclass(frozen=True)
class Running:
    """Options that say how onnxruntime runs."""

    provider: Annotated[
        str,
        typer.Option(metavar="cpu|cuda", help="What onnxruntime runs on.", rich_help_panel=RUNNING),
    ] = Runtime.provider
    threads: Annotated[
        int,
        typer.Option(
            help="onnxruntime's threads inside an operator; 0 takes all cores.",
            rich_help_panel=RUNNING,
        ),
    ] = Runtime.threads

    def runtime(self) -> Runtime:
        """Give them as `Runtime`."""
        return Runtime(cast(Provider, self.provider), self.threads)


@dataclass(frozen=True)
class Planning:
    """Options of all that plans a model: what it is planned with, and what it is fast at."""

    solver: Annotated[
        str, typer.Option(metavar="admm|data-svd|svd", help="What decides each layer's parts.")
    ] = SolverSettings.name
    schemes: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Ways to write a layer that may be chosen from."),
    ] = ",".join(SCHEME_NAMES)
    images: Images = None
    patches: Annotated[
        int, typer.Option(help="Patches sampled for each layer.", rich_help_panel=RUNNING)
    ] = CalibrationSettings.patches
    memory: Annotated[
        int,
        typer.Option(
            metavar="MIB", help="Bound on what recording keeps in memory.", rich_help_panel=RUNNING
        ),
    ] = CalibrationSettings.memory_mib
    calib_batch: CalibBatch = CalibrationSettings.batch
    seed: Seed = CalibrationSettings.seed
    batch: Batch = Target.batch
    device: Device = SolverSettings.device
    timing: Timing = True
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of measured milliseconds; TWOFOLD_CACHE or the user's cache by default.",
            rich_help_panel=RUNNING,
        ),
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that finished layers are kept in: a run that was killed goes on from there.",
            rich_help_panel=RUNNING,
        ),
    ] = None
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Scheduler of a Dask cluster that records and predicts, as tcp://host:8786.",
            rich_help_panel=RUNNING,
        ),
    ] = None

    def place(self) -> AbstractContextManager[Executor | None]:
        """Open where the model is recorded and its forms are predicted: the cluster, or nothing."""
        if self.dask is None:
            return nullcontext()
        from converter.cluster import connect

        return connect(self.dask)

    def settings(self, running: Running) -> dict[str, Any]:
        """Give them as what `converter.convert` and `converter.plan` take by name."""
        schemes = tuple(name.strip() for name in self.schemes.split(",") if name.strip())
        return {
            "calibration": CalibrationSettings(
                images=self.images,
                batch=self.calib_batch,
                patches=self.patches,
                memory_mib=self.memory,
                seed=self.seed,
            ),
            "solver": SolverSettings(cast(SolverName, self.solver), self.device, schemes=schemes),
            "target": Target(running.runtime(), self.batch),
            "timing": self.timing,
            "cache": self.cache,
            "work": self.work,
        }


@dataclass(frozen=True)
class Training:
    """Options of a recovery: how the converted model learns from the original."""

    labels: Annotated[
        bool,
        typer.Option("--labels", help="Learn class folders too.", rich_help_panel=RECOVERY),
    ] = RecoverySettings.labels
    augment: Annotated[
        str,
        typer.Option(
            metavar="flip,shift|none",
            help="What happens to images before they are learned from.",
            rich_help_panel=RECOVERY,
        ),
    ] = ",".join(RecoverySettings.augment)
    mirrored: Annotated[
        bool,
        typer.Option(
            "--mirrored",
            help="Learn the mean of the original's scores for an image and for its mirror image, both "
            "shifted a little too: right more often where left and right are alike, and a little less as the "
            "original answers.",
            rich_help_panel=RECOVERY,
        ),
    ] = RecoverySettings.mirrored
    rate: Annotated[
        float,
        typer.Option(
            help="First step of a weight, relative to its size.", rich_help_panel=RECOVERY
        ),
    ] = RecoverySettings.rate
    refit: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of the length in which only biases and a factor for each channel are trained, "
            "from 0 to 1.",
            rich_help_panel=RECOVERY,
        ),
    ] = RecoverySettings.refit
    step_images: Annotated[
        int, typer.Option(help="Images of one step.", rich_help_panel=RECOVERY)
    ] = RecoverySettings.batch
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16",
            help="Of activations; auto takes bfloat16 where it is clearly faster.",
            rich_help_panel=RECOVERY,
        ),
    ] = RecoverySettings.precision

    def settings(self, length: str, *, device: str, memory: int, seed: int) -> RecoverySettings:
        """Give them as `RecoverySettings` for a length such as "10m" or "20e"."""
        ways = () if self.augment == "none" else tuple(self.augment.split(","))
        return RecoverySettings(
            **recovery_length(length),
            batch=self.step_images,
            rate=self.rate,
            refit=self.refit,
            augment=tuple(way.strip() for way in ways if way.strip()),
            mirrored=self.mirrored,
            labels=self.labels,
            precision=cast(Precision, self.precision),
            device=device,
            memory_mib=memory,
            seed=seed,
        )


@dataclass(frozen=True)
class Quantizing:
    """Options of a quantization."""

    int8: Annotated[
        bool,
        typer.Option("--int8", help="8-bit integers, for CPUs.", rich_help_panel=QUANTIZATION),
    ] = False
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Half precision, for CUDA.", rich_help_panel=QUANTIZATION),
    ] = False
    harmless: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="Squared error of the outputs, of their variance, for which no layer stays in float.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = 100 * QuantizationSettings.error

    def settings(self, **sizes: Any) -> QuantizationSettings | None:
        """Give them as `QuantizationSettings`; None where neither is asked for."""
        if self.int8 and self.fp16:
            raise ConfigError("--int8 and --fp16 are two forms of one model; leave one of them out")
        if not (self.int8 or self.fp16):
            return None
        return QuantizationSettings(
            "int8" if self.int8 else "float16", error=self.harmless / 100, **sizes
        )
