"""The program `twofold`: arguments to settings, one call, tables and an exit code.

Exit codes: 0 done, 1 a gate failed, 2 usage or a setting, 3 the model, 4 the calibration data,
5 internal, 130 interrupted. Each failure is one sentence on standard error.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

import converter
from converter.config import (
    PRESETS,
    SCHEME_NAMES,
    Budget,
    CalibrationSettings,
    Gates,
    Precision,
    Preprocessing,
    Provider,
    QuantizationSettings,
    RecoverySettings,
    Runtime,
    SolverName,
    SolverSettings,
    Target,
    gates_from_options,
    preprocessing_from_options,
    recovery_length,
)
from converter.errors import ConfigError, ConverterError, ValidationError
from converter.progress import SILENT, Progress
from converter.project import (
    PROJECT_FILE,
    SCHEMA_FILE,
    Setting,
    read_project,
    schema,
    settings_of,
    starter,
)

__all__ = ["app", "main", "project_settings"]

DEBUG = "TWOFOLD_DEBUG"
"""Environment variable that shows tracebacks and the warnings of libraries."""

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the file that a job on GitHub shows as its summary."""

_T = TypeVar("_T")

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
_BUDGET = "What the result may cost (one or two), or lose"
_RECOVERY = "Recovery, with the original as teacher"
_QUANTIZATION = "Quantization, last of all"
_GATES = "What must hold"
_OUTPUT = "Output"

_TABLES = {
    _BUDGET: "budget",
    _IMAGES: "preprocessing",
    _RUNNING: "running",
    _RECOVERY: "recovery",
    _QUANTIZATION: "quantization",
    _GATES: "gates",
    _OUTPUT: "output",
}
"""Table of `twofold.toml` for the options under each heading; those under none stand at the top."""

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_OUTPUT)
]
Html = Annotated[
    Path | None,
    typer.Option(help="Page to write: one HTML file for any browser.", rich_help_panel=_OUTPUT),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model.")]
Calib = Annotated[
    Path, typer.Option(help="Folder of images, .npy or .npz file; labels are not needed.")
]


Batch = Annotated[
    int,
    typer.Option(help="Images at once that the result must be fast at.", rich_help_panel=_RUNNING),
]
Timing = Annotated[
    bool,
    typer.Option(
        "--timing/--no-timing",
        help="Whether layers and results are timed; without, MACs alone count.",
        rich_help_panel=_RUNNING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.", rich_help_panel=_RUNNING)]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda[:N]", help="torch device of fits and training.", rich_help_panel=_RUNNING
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(help="JSON file of the gates to write.", rich_help_panel=_OUTPUT),
]
Junit = Annotated[
    Path | None,
    typer.Option(help="JUnit XML file to write, a test for each gate.", rich_help_panel=_OUTPUT),
]


def _config_option(*, required: bool) -> Any:
    """Make the option that names the project file, whose values become the defaults of all others."""

    def read(context: typer.Context, config: Path) -> Path:
        with _one_sentence():
            if required or config.exists() or config != Path(PROJECT_FILE):
                values = read_project(config, project_settings())
                # what `check` calls the two models
                values |= {"converted": values.get("out"), "against": values.get("model")}
                context.default_map = values
        return config

    return typer.Option(
        help="Settings; options override them.", is_eager=True, callback=read, show_default=True
    )


def _with_those_of_the_file(context: typer.Context, gates: list[str] | None) -> list[str]:
    """Put typed gates behind those of the project file; of one name the last counts."""
    return [*(context.default_map or {}).get("gate", ()), *(gates or ())]


@dataclass(frozen=True)
class _Images:
    """Options that say how images are prepared; None is what was not given."""

    preset: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PRESETS),
            help="Named preparation, which the options below override; unit where none is given.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="H[xW]",
            help="Height and width that the model gets, where it does not fix them.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    resize: Annotated[
        int | None,
        typer.Option(help="Shorter side before the crop, in pixels.", rich_help_panel=_IMAGES),
    ] = None
    crop: Annotated[
        str | None,
        typer.Option(metavar="center|none", help="Crop after --resize.", rich_help_panel=_IMAGES),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="nchw|nhwc", help="Axis order of the model's input.", rich_help_panel=_IMAGES
        ),
    ] = None
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="rgb|bgr|gray",
            help="Channels of the model's input, in order.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(help="Factor on pixel values, which are 0 to 255.", rich_help_panel=_IMAGES),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="Subtracted after the scale, as in 0.485,0.456,0.406.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B", help="Divided by after the mean is off.", rich_help_panel=_IMAGES
        ),
    ] = None

    def preprocessing(self, data: Path, *, quiet: bool) -> Preprocessing:
        """Lay them over the preset; say it where nothing tells how pixels of `data` are scaled."""
        settings = preprocessing_from_options(
            **{f.name: getattr(self, f.name) for f in fields(self)}
        )
        said = (self.preset, self.scale, self.mean, self.std) != (None, None, None, None)
        if data.is_dir() and not said and not quiet:
            _say(
                "pixels are scaled to 0..1 and nothing else (--preset unit), since no preset, scale, "
                "mean or std was given"
            )
        return settings


@dataclass(frozen=True)
class _Running:
    """Options that say how onnxruntime runs."""

    provider: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda", help="What onnxruntime runs on.", rich_help_panel=_RUNNING
        ),
    ] = Runtime.provider
    threads: Annotated[
        int,
        typer.Option(
            help="onnxruntime's threads inside an operator; 0 takes all cores.",
            rich_help_panel=_RUNNING,
        ),
    ] = Runtime.threads

    def runtime(self) -> Runtime:
        return Runtime(cast(Provider, self.provider), self.threads)


@dataclass(frozen=True)
class _Planning:
    """Options of all that plans a model: what it is planned with, and what it is fast at."""

    solver: Annotated[
        str, typer.Option(metavar="admm|data-svd|svd", help="What decides each layer's parts.")
    ] = SolverSettings.name
    schemes: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Ways to write a layer that may be chosen from."),
    ] = ",".join(SCHEME_NAMES)
    images: Annotated[
        int | None,
        typer.Option(help="At most so many images, spread evenly.", rich_help_panel=_RUNNING),
    ] = None
    patches: Annotated[
        int, typer.Option(help="Patches sampled for each layer.", rich_help_panel=_RUNNING)
    ] = CalibrationSettings.patches
    memory: Annotated[
        int,
        typer.Option(
            metavar="MIB", help="Bound on what recording keeps in memory.", rich_help_panel=_RUNNING
        ),
    ] = CalibrationSettings.memory_mib
    calib_batch: Annotated[
        int, typer.Option(help="Images that are recorded at once.", rich_help_panel=_RUNNING)
    ] = CalibrationSettings.batch
    seed: Seed = CalibrationSettings.seed
    batch: Batch = Target.batch
    device: Device = SolverSettings.device
    timing: Timing = True
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of measured milliseconds; TWOFOLD_CACHE or the user's cache by default.",
            rich_help_panel=_RUNNING,
        ),
    ] = None

    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that finished layers are kept in: a run that was killed goes on from there.",
            rich_help_panel=_RUNNING,
        ),
    ] = None

    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Scheduler of a Dask cluster that records and predicts, as tcp://host:8786.",
            rich_help_panel=_RUNNING,
        ),
    ] = None

    def place(self) -> AbstractContextManager[Executor | None]:
        """Open where the model is recorded and its forms are predicted: the cluster, or nothing."""
        if self.dask is None:
            return nullcontext()
        from converter.cluster import connect

        return connect(self.dask)

    def settings(self, running: _Running) -> dict[str, Any]:
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
class _Training:
    """Options of a recovery: how the converted model learns from the original."""

    labels: Annotated[
        bool,
        typer.Option("--labels", help="Learn class folders too.", rich_help_panel=_RECOVERY),
    ] = RecoverySettings.labels
    augment: Annotated[
        str,
        typer.Option(
            metavar="flip,shift|none",
            help="What happens to images before they are learned from.",
            rich_help_panel=_RECOVERY,
        ),
    ] = ",".join(RecoverySettings.augment)
    rate: Annotated[
        float,
        typer.Option(
            help="First step of a weight, relative to its size.", rich_help_panel=_RECOVERY
        ),
    ] = RecoverySettings.rate
    step_images: Annotated[
        int, typer.Option(help="Images of one step.", rich_help_panel=_RECOVERY)
    ] = RecoverySettings.batch
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16",
            help="Of activations; auto takes bfloat16 where it is clearly faster.",
            rich_help_panel=_RECOVERY,
        ),
    ] = RecoverySettings.precision

    def settings(self, length: str, *, device: str, memory: int, seed: int) -> RecoverySettings:
        """Give them as `RecoverySettings` for a length such as "10m" or "20e"."""
        ways = () if self.augment == "none" else tuple(self.augment.split(","))
        return RecoverySettings(
            **recovery_length(length),
            batch=self.step_images,
            rate=self.rate,
            augment=tuple(way.strip() for way in ways if way.strip()),
            labels=self.labels,
            precision=cast(Precision, self.precision),
            device=device,
            memory_mib=memory,
            seed=seed,
        )


@dataclass(frozen=True)
class _Quantizing:
    """Options of a quantization."""

    int8: Annotated[
        bool,
        typer.Option("--int8", help="8-bit integers, for CPUs.", rich_help_panel=_QUANTIZATION),
    ] = False
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Half precision, for CUDA.", rich_help_panel=_QUANTIZATION),
    ] = False
    harmless: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="Squared error of the outputs, of their variance, for which no layer stays in float.",
            rich_help_panel=_QUANTIZATION,
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


@dataclass(frozen=True)
class _Gating:
    """Options that say what a converted model must keep to, and how that is found out."""

    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help=f"What must hold, once for each: {', '.join(each.name for each in fields(Gates))}.",
            callback=_with_those_of_the_file,
            rich_help_panel=_GATES,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, .npy or .npz file that gates are judged on; class folders for "
            "accuracy.",
            rich_help_panel=_GATES,
        ),
    ] = None
    seconds: Annotated[
        float, typer.Option(help="Timed seconds for each model.", rich_help_panel=_GATES)
    ] = 2.0

    def asked(self, data: Path | None = None) -> tuple[Gates, Path]:
        """Give the gates and the images they are judged on, before any work."""
        from converter.gates import require_judgeable

        gates = gates_from_options(self.gate or ())
        chosen = self.data or data
        if chosen is None:
            raise ConfigError(
                "no images were given to judge the gates on; give --data a folder of some that the "
                "conversion does not see"
            )
        require_judgeable(gates, chosen)
        return gates, chosen


def _grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread each parameter that is a dataclass into one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters = []
    for name, given in signature(command).parameters.items():
        if name not in groups:
            plain = given.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters.append(plain)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        parameters += [
            Parameter(
                each.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if each.default is MISSING else each.default,
                annotation=types[each.name],
            )
            for each in fields(groups[name])
        ]

    @wraps(command)
    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{each.name: values.pop(each.name) for each in fields(group)})
        command(**values)

    # what typer reads
    spread.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # not declared of functions
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    return spread


def _extending(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options of another one too; it gets them together, as `asked`."""

    def extended(command: Callable[..., None]) -> Callable[..., None]:
        taken = signature(base).parameters
        own = [each for name, each in signature(command).parameters.items() if name != "asked"]

        @wraps(command)
        def spread(**values: Any) -> None:
            command(asked={name: values.pop(name) for name in taken}, **values)

        parameters = [*taken.values(), *own]
        spread.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        spread.__annotations__ = {each.name: each.annotation for each in parameters}
        return spread

    return extended


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
@_grouped
def convert(
    *,
    model: Model,
    calib: Calib,
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    speedup: Annotated[
        float | None,
        typer.Option(help="Make it so many times faster; above 1.", rich_help_panel=_BUDGET),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds that one batch may take.", rich_help_panel=_BUDGET),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(
            help="Divide the multiply-accumulates by so much; above 1.", rich_help_panel=_BUDGET
        ),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Divide the parameters by so much; above 1.", rich_help_panel=_BUDGET),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="In place of a budget: the fastest model that loses no more than so many percentage "
            "points of accuracy, or of top-1 agreement without labels (an output error in percent "
            "where there are no classes).",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            help="What --max-drop is measured on, class folders for accuracy; every fifth calibration "
            "image where none is given.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|EPOCHS",
            help="Then train the result to answer as the original does: for a time as 90s, 10m, 1h, or "
            "for epochs as 20e.",
            rich_help_panel=_RECOVERY,
        ),
    ] = None,
    recover_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder, .npy or .npz to learn from, the more the better; --calib where none is given.",
            rich_help_panel=_RECOVERY,
        ),
    ] = None,
    training: _Training,
    quantizing: _Quantizing,
    preparation: _Images,
    planning: _Planning,
    running: _Running,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON report to write; OUT with .json where none is given.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Convert a model, within a budget, and say what became of each layer."""
    with _one_sentence():
        read = [model, calib] if val is None else [model, calib, val]
        _check_outputs(out, *read)
        report = out.with_suffix(".json") if report is None else report
        _check_outputs(report, *read, out)
        if html is not None:
            _check_outputs(html, *read, out, report)
        asked = {"macs": macs, "params": params, "speedup": speedup, "latency_ms": latency_ms}
        if max_drop is not None and any(each is not None for each in asked.values()):
            raise ConfigError("--max-drop takes the place of a budget; leave one of the two out")
        if recover is None and recover_images is not None:
            raise ConfigError(
                "--recover-images is what --recover learns from; say how long, as in --recover 10m"
            )
        recovery = None
        if recover is not None:
            recovery = training.settings(
                recover, device=planning.device, memory=planning.memory, seed=planning.seed
            )
        with planning.place() as executor:
            conversion = converter.convert(
                model,
                calib,
                out,
                Budget(**asked) if max_drop is None else None,
                max_drop=max_drop,
                val=val,
                recovery=recovery,
                recover_images=recover_images,
                quantization=quantizing.settings(
                    batch=planning.calib_batch, memory_mib=planning.memory
                ),
                **planning.settings(running),
                preprocessing=preparation.preprocessing(calib, quiet=quiet),
                executor=executor,
                progress=_progress(quiet),
            )
        from converter.report.files import write_report

        write_report(report, conversion.to_dict())
        if html is not None:
            from converter.report.page import write_page

            write_page(html, conversion.to_dict())
        if not quiet:
            from converter.report.console import print_conversion

            print_conversion(conversion, [each for each in (report, html) if each is not None])


@app.command()
@_grouped
def plan(
    *,
    model: Model,
    calib: Calib,
    val: Annotated[
        Path | None,
        typer.Option(
            help="What points are verified on, class folders for accuracy; every fifth calibration "
            "image where none is given."
        ),
    ] = None,
    verify: Annotated[
        int, typer.Option(help="Points to carry out, time and compare; 0 for none.")
    ] = 2,
    preparation: _Images,
    planning: _Planning,
    running: _Running,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_OUTPUT)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|svg", help="Picture to write.", rich_help_panel=_OUTPUT),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Say what a model could become, error against time; no model is written."""
    with _one_sentence():
        read = [model, calib] if val is None else [model, calib, val]
        if json is not None:
            _check_outputs(json, *read)
        if picture is not None:
            from converter.report.picture import check_picture

            _check_outputs(picture, *read, *([] if json is None else [json]))
            check_picture(picture)
        with planning.place() as executor:
            front = converter.plan(
                model,
                calib,
                val=val,
                verify=verify,
                **planning.settings(running),
                preprocessing=preparation.preprocessing(calib, quiet=quiet),
                executor=executor,
                progress=_progress(quiet),
            )
        from converter.report.console import print_front
        from converter.report.files import write_report

        if json is not None:
            write_report(json, front.to_dict())
        if picture is not None:
            from converter.report.picture import draw_front

            draw_front(front, picture)
        if not quiet:
            print_front(front, [each for each in (json, picture) if each is not None])


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
@_grouped
def recover(
    *,
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model as it was.")],
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="What it was converted to.")
    ],
    images: Annotated[
        Path, typer.Option(help="Folder of images, .npy or .npz file to learn from.")
    ],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    length: Annotated[
        str,
        typer.Option(
            "--for", metavar="TIME|EPOCHS", help="How long: 90s, 10m, 1h, or epochs as 20e."
        ),
    ] = "10m",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File that an interrupted run goes on from; OUT with .recovery.npz where none is given."
        ),
    ] = None,
    training: _Training,
    preparation: _Images,
    running: _Running,
    device: Device = RecoverySettings.device,
    memory: Annotated[
        int,
        typer.Option(metavar="MIB", help="Bound on images in memory.", rich_help_panel=_RUNNING),
    ] = RecoverySettings.memory_mib,
    seed: Seed = RecoverySettings.seed,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_OUTPUT)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to answer as its original does, without labels."""
    with _one_sentence():
        read = [original, converted, images]
        _check_outputs(out, *read)
        if json is not None:
            _check_outputs(json, *read, out)
        recovered = converter.recover(
            original,
            converted,
            images,
            out,
            training.settings(length, device=device, memory=memory, seed=seed),
            preprocessing=preparation.preprocessing(images, quiet=quiet),
            runtime=running.runtime(),
            checkpoint=checkpoint,
            progress=_progress(quiet),
        )
        from converter.report.console import print_recovery
        from converter.report.files import write_report

        if json is not None:
            write_report(json, {"format": "twofold-recovery-1", **recovered.to_dict()})
        if not quiet:
            print_recovery(recovered, out)


@app.command()
@_grouped
def quantize(
    *,
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model as it was.")],
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="What it was converted to, or the same.")
    ],
    calib: Calib,
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    quantizing: _Quantizing,
    preparation: _Images,
    images: Annotated[
        int | None,
        typer.Option(help="At most so many images, spread evenly.", rich_help_panel=_RUNNING),
    ] = QuantizationSettings.images,
    running: _Running,
    batch: Batch = Target.batch,
    calib_batch: Annotated[
        int, typer.Option(help="Images that are recorded at once.", rich_help_panel=_RUNNING)
    ] = QuantizationSettings.batch,
    memory: Annotated[
        int,
        typer.Option(metavar="MIB", help="Bound on tensors in memory.", rich_help_panel=_RUNNING),
    ] = QuantizationSettings.memory_mib,
    timing: Timing = True,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_OUTPUT)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a converted model: --int8, which is taken where none is given, or --fp16."""
    with _one_sentence():
        read = [original, converted, calib]
        _check_outputs(out, *read)
        if json is not None:
            _check_outputs(json, *read, out)
        chosen = quantizing if quantizing.fp16 else replace(quantizing, int8=True)
        quantized = converter.quantize(
            original,
            converted,
            calib,
            out,
            chosen.settings(images=images, batch=calib_batch, memory_mib=memory),
            preprocessing=preparation.preprocessing(calib, quiet=quiet),
            target=Target(running.runtime(), batch),
            timing=timing,
            progress=_progress(quiet),
        )
        from converter.report.console import print_quantization
        from converter.report.files import write_report

        if json is not None:
            write_report(json, {"format": "twofold-quantization-1", **quantized.to_dict()})
        if not quiet:
            print_quantization(quantized, out)


@app.command()
@_grouped
def validate(
    *,
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
    preparation: _Images,
    running: _Running,
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
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_OUTPUT)
    ] = None,
    html: Html = None,
    quiet: Quiet = False,
) -> None:
    """Compare two models under onnxruntime: outputs, accuracy, latency, size and cost."""
    with _one_sentence():
        if json is not None:
            _check_outputs(json, original, converted, data)
        if html is not None:
            _check_outputs(html, original, converted, data, *([] if json is None else [json]))
        validation = converter.validate(
            original,
            converted,
            data,
            preprocessing=preparation.preprocessing(data, quiet=quiet),
            labels=labels,
            images=images,
            batch=batch,
            time_batches=time_batch or (1, 32),
            seconds=seconds,
            runtime=running.runtime(),
            progress=_progress(quiet),
        )
        from converter.report.console import print_validation
        from converter.report.files import write_report

        if json is not None:
            write_report(json, validation.to_dict())
        if html is not None:
            from converter.report.page import write_page

            write_page(html, validation.to_dict())
        if not quiet:
            print_validation(validation)
        if not validation.finite:
            raise ValidationError(
                f"{converted} gives NaN or infinity where {original} does not; do not use it"
            )


@app.command()
def report(
    *,
    report: Annotated[
        Path,
        typer.Argument(metavar="REPORT", help="JSON report of convert, plan, validate or check."),
    ],
    validation: Annotated[
        Path | None, typer.Option(help="JSON report of validate or check on the same two models.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    quiet: Quiet = False,
) -> None:
    """Make a page of saved reports: one HTML file for any browser."""
    with _one_sentence():
        read = [report] if validation is None else [report, validation]
        _check_outputs(out, *read)
        from converter.report.page import read_report, write_page

        write_page(
            out,
            read_report(report),
            validation=None if validation is None else read_report(validation),
        )
        if not quiet:
            from converter.report.console import print_written

            print_written([out])


@app.command()
@_extending(convert)
@_grouped
def run(
    *,
    asked: dict[str, Any],
    config: Annotated[Path, _config_option(required=True)] = Path(PROJECT_FILE),
    gating: _Gating,
    json: Json = None,
    junit: Junit = None,
) -> None:
    """Convert as twofold.toml says, and judge the result by its gates."""
    del config  # its values are the defaults of all that is here
    with _one_sentence():
        gates, data = gating.asked(asked["val"])
        _check_verdict_outputs(asked["model"], asked["out"], data, json, junit)
    convert(**asked)
    with _one_sentence():
        _judge(
            asked["model"],
            asked["out"],
            data,
            gates,
            gating.seconds,
            preprocessing=_group(_Images, asked).preprocessing(data, quiet=True),
            target=Target(_group(_Running, asked).runtime(), asked["batch"]),
            json=json,
            junit=junit,
            html=asked["html"],
            report=asked["report"] or asked["out"].with_suffix(".json"),
            quiet=asked["quiet"],
        )


@app.command()
@_grouped
def check(
    *,
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="The model to judge; the project's OUT.")
    ],
    against: Annotated[Path, typer.Option(help="The model as it was; the project's MODEL.")],
    config: Annotated[Path, _config_option(required=False)] = Path(PROJECT_FILE),
    gating: _Gating,
    preparation: _Images,
    running: _Running,
    batch: Batch = Target.batch,
    json: Json = None,
    junit: Junit = None,
    quiet: Quiet = False,
) -> None:
    """Judge a converted model by gates; exit code 1 where one does not hold."""
    del config  # its values are the defaults of all that is here
    with _one_sentence():
        gates, data = gating.asked()
        _check_verdict_outputs(against, converted, data, json, junit)
        _judge(
            against,
            converted,
            data,
            gates,
            gating.seconds,
            preprocessing=preparation.preprocessing(data, quiet=quiet),
            target=Target(running.runtime(), batch),
            json=json,
            junit=junit,
            quiet=quiet,
        )


@app.command()
def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX model to write it for.")],
    config: Annotated[
        Path | None,
        typer.Option(help=f"File to write; {PROJECT_FILE} beside the model where none is given."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="H[xW]", help="Size of the images, where the model leaves it free."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a commented twofold.toml for a model, and the schema that editors complete it by."""
    with _one_sentence():
        target = model.parent / PROJECT_FILE if config is None else config
        rules = target.with_name(SCHEMA_FILE)
        _check_outputs(target, model)
        _check_outputs(rules, model, target)
        if target.exists() and not force:
            raise ConfigError(f"{target} is there already; --force writes over it")
        sides = Preprocessing() if size is None else preprocessing_from_options(size=size)
        inspection = converter.inspect(model, sides.size)
        from converter.model_file import write_text_atomically
        from converter.report.console import print_written
        from converter.report.files import write_report

        path = Path(os.path.relpath(model, target.parent)).as_posix()
        write_report(rules, schema(project_settings()))
        write_text_atomically(
            target, starter(inspection, path, project_settings(), size=sides.size)
        )
        print_written([target, rules])


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Report of a conversion.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Report of another one.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 where more than figures differs.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare two conversions: settings, versions, hashes, layers and figures."""
    with _one_sentence():
        if json is not None:
            _check_outputs(json, first, second)
        difference = converter.diff(first, second)
        from converter.report.console import print_difference
        from converter.report.files import write_report

        if json is not None:
            write_report(json, difference.to_dict())
        print_difference(difference)
        if exit_code and not difference.alike:
            raise typer.Exit(ValidationError.exit_code)


def project_settings() -> tuple[Setting, ...]:
    """List what twofold.toml may hold: the options of `run`, in tables by their headings, and the gates."""
    return settings_of(run, _TABLES)


def _group(kind: type[_T], values: dict[str, Any]) -> _T:
    """Make a group of options of those that a command was given."""
    return kind(**{each.name: values[each.name] for each in fields(kind)})  # type: ignore[arg-type]


def _check_verdict_outputs(
    original: Path, converted: Path, data: Path, json: Path | None, junit: Path | None
) -> None:
    read = [original, converted, data]
    for path in (json, junit):
        if path is not None:
            _check_outputs(path, *read)
            read.append(path)


def _judge(
    original: Path,
    converted: Path,
    data: Path,
    gates: Gates,
    seconds: float,
    *,
    preprocessing: Preprocessing,
    target: Target,
    json: Path | None,
    junit: Path | None,
    quiet: bool,
    html: Path | None = None,
    report: Path | None = None,
) -> None:
    """Judge, write what is asked for, and end with a sentence where a gate does not hold."""
    verdict = converter.check(
        original,
        converted,
        data,
        gates,
        preprocessing=preprocessing,
        target=target,
        seconds=seconds,
        progress=_progress(quiet),
    )
    from converter.report.console import print_verdict
    from converter.report.files import write_report

    if json is not None:
        write_report(json, verdict.to_dict())
    if junit is not None:
        from converter.report.junit import write_junit

        write_junit(junit, verdict)
    if html is not None and report is not None:
        from converter.report.page import read_report, write_page

        write_page(html, read_report(report), validation=verdict.to_dict())
    summary = os.environ.get(SUMMARY)
    if summary:
        from converter.report.markdown import append_summary

        append_summary(Path(summary), verdict)
    if not quiet:
        print_verdict(verdict, [each for each in (json, junit) if each is not None])
    if not verdict.passed:
        raise ValidationError(verdict.sentence())


def _progress(quiet: bool) -> Progress:
    if quiet:
        return SILENT
    from converter.report.console import ConsoleProgress, output_console

    return ConsoleProgress(output_console(stderr=True))


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
