"""The program `twofold`: arguments to settings, one call, tables and an exit code.

Exit codes: 0 done, 1 a gate failed, 2 usage or a setting, 3 the model, 4 the calibration data,
5 internal, 130 interrupted. Each failure is one sentence on standard error.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer

import converter
from converter.config import (
    PRESETS,
    Budget,
    CalibrationSettings,
    Preprocessing,
    Provider,
    Runtime,
    SolverName,
    SolverSettings,
    preprocessing_from_options,
)
from converter.errors import ConverterError, ValidationError
from converter.progress import SILENT, Progress

__all__ = ["app", "main"]

DEBUG = "TWOFOLD_DEBUG"
"""Environment variable that shows tracebacks and the warnings of libraries."""

_INTERNAL = 5
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Make a trained CNN in ONNX smaller and measurably faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_IMAGES = "How images are prepared"
_RUNNING = "Where and how it runs"
_OUTPUT = "Output"

Preset = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(PRESETS),
        help="Named preparation, which the options below override; unit where none is given.",
        rich_help_panel=_IMAGES,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="H[xW]",
        help="Height and width that the model gets, where it does not fix them.",
        rich_help_panel=_IMAGES,
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(help="Shorter side before the crop, in pixels.", rich_help_panel=_IMAGES),
]
Crop = Annotated[
    str | None,
    typer.Option(metavar="center|none", help="Crop after --resize.", rich_help_panel=_IMAGES),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar="nchw|nhwc", help="Axis order of the model's input.", rich_help_panel=_IMAGES
    ),
]
Channels = Annotated[
    str | None,
    typer.Option(
        metavar="rgb|bgr|gray",
        help="Channels of the model's input, in order.",
        rich_help_panel=_IMAGES,
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(help="Factor on pixel values, which are 0 to 255.", rich_help_panel=_IMAGES),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Subtracted after the scale, as in 0.485,0.456,0.406.",
        rich_help_panel=_IMAGES,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="Divided by after the mean is off.", rich_help_panel=_IMAGES
    ),
]
ProviderName = Annotated[
    str,
    typer.Option("--provider", metavar="cpu|cuda", help="onnxruntime.", rich_help_panel=_RUNNING),
]
Threads = Annotated[
    int,
    typer.Option(
        help="onnxruntime's threads inside an operator; 0 takes all cores.",
        rich_help_panel=_RUNNING,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_OUTPUT)
]


def main() -> None:
    """Run `twofold` with the arguments of this process, and end it with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # tests put other streams in place
            reconfigure(errors="replace")  # a name that the terminal cannot show is no failure
    # torch's idle threads sleep instead of spinning: where other programs keep the cores busy, fits
    # took several times as long. OpenMP reads this when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _libraries_quiet():
        app(prog_name="twofold")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    with _one_sentence():
        if version:
            typer.echo(f"twofold {converter.__version__}")
            raise typer.Exit


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model to convert.")],
    calib: Annotated[
        Path, typer.Option(help="Folder of images, .npy or .npz file; labels are not needed.")
    ],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    macs: Annotated[
        float | None, typer.Option(help="Divide the multiply-accumulates by so much; above 1.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Divide the parameters by so much; above 1.")
    ] = None,
    solver: Annotated[
        str, typer.Option(metavar="admm|data-svd|svd", help="What decides each layer's parts.")
    ] = "admm",
    preset: Preset = None,
    size: Size = None,
    resize: Resize = None,
    crop: Crop = None,
    layout: Layout = None,
    channels: Channels = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    images: Annotated[
        int | None,
        typer.Option(help="At most so many images, spread evenly.", rich_help_panel=_RUNNING),
    ] = None,
    patches: Annotated[
        int, typer.Option(help="Patches sampled for each layer.", rich_help_panel=_RUNNING)
    ] = CalibrationSettings.patches,
    memory: Annotated[
        int,
        typer.Option(
            metavar="MIB", help="Bound on what recording keeps in memory.", rich_help_panel=_RUNNING
        ),
    ] = CalibrationSettings.memory_mib,
    batch: Annotated[
        int, typer.Option(help="Images that run at once.", rich_help_panel=_RUNNING)
    ] = CalibrationSettings.batch,
    seed: Annotated[
        int, typer.Option(help="Seed of all samples.", rich_help_panel=_RUNNING)
    ] = CalibrationSettings.seed,
    provider: ProviderName = Runtime.provider,
    threads: Threads = Runtime.threads,
    device: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda", help="torch device of the fits.", rich_help_panel=_RUNNING
        ),
    ] = SolverSettings.device,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON report to write; OUT with .json where none is given.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Convert a model, within a budget, and say what became of each layer."""
    with _one_sentence():
        _check_outputs(out, model, calib)
        report = out.with_suffix(".json") if report is None else report
        _check_outputs(report, model, calib, out)
        budget = Budget(macs=macs, params=params)
        preprocessing = preprocessing_from_options(
            preset, size, resize, crop, layout, channels, scale, mean, std
        )
        calibration = CalibrationSettings(images, batch, patches, memory, seed)
        runtime = Runtime(cast(Provider, provider), threads)
        settings = SolverSettings(cast(SolverName, solver), device)
        if not quiet and (preset, scale, mean, std) == (None, None, None, None):
            _say_default_preset(calib)
        conversion = converter.convert(
            model,
            calib,
            out,
            budget,
            preprocessing=preprocessing,
            calibration=calibration,
            solver=settings,
            runtime=runtime,
            progress=_progress(quiet),
        )
        from converter.report.files import write_report

        write_report(report, conversion.to_dict())
        if not quiet:
            from converter.report.console import print_conversion

            print_conversion(conversion, report)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model to look at.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="H[xW]", help="Size of the images, where the model leaves it free."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """List every Conv and Gemm: shape, cost, activation, and whether it can be converted."""
    with _one_sentence():
        if json is not None:
            _check_outputs(json, model)
        sides = Preprocessing() if size is None else preprocessing_from_options(size=size)
        inspection = converter.inspect(model, sides.size)
        from converter.report.console import print_inspection
        from converter.report.files import write_report

        if json is not None:
            write_report(json, inspection.to_dict())
        print_inspection(inspection)


@app.command()
def validate(
    original: Annotated[Path, typer.Argument(metavar="A", help="The model as it was.")],
    converted: Annotated[Path, typer.Argument(metavar="B", help="The model to compare with it.")],
    data: Annotated[
        Path, typer.Option(help="Folder of images, .npy or .npz file that both run on.")
    ],
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels",
            help="Whether subfolders are classes; as a rule, where all images are in subfolders.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="At most so many images, spread evenly.")
    ] = None,
    preset: Preset = None,
    size: Size = None,
    resize: Resize = None,
    crop: Crop = None,
    layout: Layout = None,
    channels: Channels = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    batch: Annotated[
        int,
        typer.Option(help="Images that run at once for the comparison.", rich_help_panel=_RUNNING),
    ] = 32,
    time_batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch to time, once for each; 1 and 32.", rich_help_panel=_RUNNING),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="Timed seconds for each model and batch.", rich_help_panel=_RUNNING),
    ] = 2.0,
    provider: ProviderName = Runtime.provider,
    threads: Threads = Runtime.threads,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_OUTPUT)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare two models under onnxruntime: outputs, accuracy, latency, size and cost."""
    with _one_sentence():
        if json is not None:
            _check_outputs(json, original, converted, data)
        preprocessing = preprocessing_from_options(
            preset, size, resize, crop, layout, channels, scale, mean, std
        )
        runtime = Runtime(cast(Provider, provider), threads)
        if not quiet and (preset, scale, mean, std) == (None, None, None, None):
            _say_default_preset(data)
        validation = converter.validate(
            original,
            converted,
            data,
            preprocessing=preprocessing,
            labels=labels,
            images=images,
            batch=batch,
            time_batches=time_batch or (1, 32),
            seconds=seconds,
            runtime=runtime,
            progress=_progress(quiet),
        )
        from converter.report.console import print_validation
        from converter.report.files import write_report

        if json is not None:
            write_report(json, {"format": "twofold-validation-1", **validation.to_dict()})
        if not quiet:
            print_validation(validation)
        if not validation.finite:
            raise ValidationError(
                f"{converted} gives NaN or infinity where {original} does not; do not use it"
            )


def _progress(quiet: bool) -> Progress:
    if quiet:
        return SILENT
    from converter.report.console import ConsoleProgress, output_console

    return ConsoleProgress(output_console(stderr=True))


def _say_default_preset(data: Path) -> None:
    if data.is_dir():
        _say(
            "pixels are scaled to 0..1 and nothing else (--preset unit), since no preset, scale, "
            "mean or std was given"
        )


def _check_outputs(out: Path, *inputs: Path) -> None:
    from converter.model_file import check_output_path

    check_output_path(out, *inputs)


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Keep what libraries say about themselves off the terminal."""
    if os.environ.get(DEBUG):
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn whatever goes wrong into one sentence and an exit code."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has gone; typer ends the program quietly
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _say("interrupted; no file was left half-written")
        raise typer.Exit(_INTERRUPTED) from None
    except ConverterError as error:
        _debug()
        _say(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except Exception as error:  # noqa: BLE001  # the last line of defence against a traceback
        _debug()
        _say(
            f"error: internal error, {type(error).__name__}: {error}; "
            f"set {DEBUG}=1 to see the traceback, and please report it"
        )
        raise typer.Exit(_INTERNAL) from None


def _debug() -> None:
    """Show the traceback of the exception in hand, where that is asked for."""
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exc()


def _say(text: str) -> None:
    from converter.report.console import print_message

    print_message(text)
