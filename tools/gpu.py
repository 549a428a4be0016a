"""Check and time Twofold on an NVIDIA GPU, and write docs/results-gpu.md.

    pip uninstall onnxruntime && pip install onnxruntime-gpu
    python -m tools.gpu [--quick] [--fresh] [--out docs/results-gpu.md]

First a small network is converted with the fits on the CPU and on the GPU, in closed form and with the
ADMM, and the results are compared. Then VGG-16 and ResNet-50 for 224×224 images, with random weights, are
converted at every budget; each result answers on the GPU and on the CPU, and is timed in fp32 and fp16 in
turns with the original. Rows are kept in the work folder; a run that was interrupted goes on from there,
`--fresh` starts over. `--quick` tries the way on one network, into a folder of its own.

Exit codes are those of `twofold`: 1 where a check fails, 2 where there is no GPU to use.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import typer
from numpy.typing import NDArray
from torch.nn.functional import interpolate

import converter
from converter import Budget, CalibrationSettings, Conversion, Runtime, SolverSettings, Target
from converter.config import SolverName
from converter.errors import ConfigError, ConverterError
from converter.latency import measure_latency, speedup
from converter.model_file import load_model
from converter.output_file import write_text_atomically
from converter.quantization.half import in_float16
from converter.report.words import interval
from converter.runtime import machine, model_inputs, open_session, run
from models import NETWORKS, build, export_onnx, initialise
from tools.reference import ROOT

__all__ = [
    "ERROR_TOLERANCE",
    "FITS_TOLERANCE",
    "OUTPUT_TOLERANCE",
    "WISHES",
    "Bench",
    "Case",
    "Finding",
    "FitCheck",
    "Row",
    "Wish",
    "check_fits",
    "main",
    "measure",
    "page",
    "require_cuda",
]

NAMES = {"vgg16": "VGG-16", "resnet50": "ResNet-50"}
"""Networks that are timed, and how the page names them."""

SMALL = "resnet20"
"""The network whose fits are made on both devices."""

FITS_TOLERANCE = 1e-3
"""Largest difference of the outputs of closed-form fits, relative to their range. On the CPU, round-off
in the images (2e-7 of each) moved those of ResNet-20 by 6e-7; an eigenvalue solver of another library may
amplify more, and a wrong fit is off by a hundredth and more."""

ERROR_TOLERANCE = 0.05
"""Largest relative difference of the layers' mean error after ADMM. Its iterations amplify round-off: the
same images with another number of threads moved the outputs of ResNet-20 by 2 % of their range. What must
hold is that the fits are as good."""

OUTPUT_TOLERANCE = {"fp32": 2e-2, "fp16": 2e-2}
"""Largest difference of outputs, relative to their range. On GPUs from Ampere on onnxruntime multiplies
fp32 in TF32, which has the 11 significant bits of fp16: an operand is off by up to 5e-4, and some fifty
layers add that up. A wrong kernel or a wrong graph is off by a tenth of the range and more."""

CHECKED_SOLVERS: tuple[SolverName, ...] = ("data-svd", "admm")
CHECKED_IMAGES = 8
STORE = "findings.json"


@dataclass(frozen=True)
class Wish:
    """One budget, and the batch that is planned for.

    Attributes
    ----------
    budget : Budget
    batch : int, default 1
        Matters to budgets in time alone.
    """

    budget: Budget
    batch: int = 1

    def __str__(self) -> str:
        if self.budget.timed:
            return f"speed-up {self.budget.speedup:g} at batch {self.batch}"
        return f"MACs ÷ {self.budget.macs:g}"


WISHES: tuple[Wish, ...] = (
    Wish(Budget(macs=2)),
    Wish(Budget(macs=4)),
    Wish(Budget(speedup=2), batch=1),
    Wish(Budget(speedup=2), batch=64),
)


@dataclass(frozen=True)
class Case:
    """A network with its calibration images.

    Attributes
    ----------
    name : str
        As the page names it.
    model : Path
    images : Path
        A `.npy` file, (n, channels, height, width) float32.
    """

    name: str
    model: Path
    images: Path


@dataclass(frozen=True)
class Bench:
    """Where things run and how long they are timed.

    Attributes
    ----------
    work : Path
        Folder of the models that are made and of measured milliseconds.
    runtime : Runtime
        Where models run.
    device : str
        torch device of the fits.
    batches : tuple of int, default (1, 64)
        Batches that results are timed at.
    seconds : float, default 2.0
        Timed seconds for each model, precision and batch.
    calibration : CalibrationSettings
    """

    work: Path
    runtime: Runtime
    device: str
    batches: tuple[int, ...] = (1, 64)
    seconds: float = 2.0
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)


@dataclass(frozen=True)
class FitCheck:
    """Fits on the CPU against fits on the device, on one network.

    Attributes
    ----------
    name : str
    solver : {"data-svd", "admm"}
        In closed form, or the method with its iterations.
    device : str
    layers : int
        Layers of the network.
    unlike : tuple of str
        Layers that took another form.
    difference : float
        Largest difference of the two results' outputs, relative to their range; NaN where an output is.
    cpu_error, device_error : float
        Mean over layers of the relative squared error on patches that the fit did not see.
    cpu_seconds, device_seconds : float
        Both conversions as a whole.
    """

    name: str
    solver: SolverName
    device: str
    layers: int
    unlike: tuple[str, ...]
    difference: float
    cpu_error: float
    device_error: float
    cpu_seconds: float
    device_seconds: float

    @property
    def passed(self) -> bool:
        """Whether the results agree to round-off or, after iterations, are equally good."""
        if self.solver == "admm":
            return abs(self.device_error - self.cpu_error) <= ERROR_TOLERANCE * self.cpu_error
        return not self.unlike and self.difference <= FITS_TOLERANCE


@dataclass(frozen=True)
class Row:
    """One converted network at one batch and precision, measured.

    Attributes
    ----------
    model, wish : str
    batch : int
    precision : {"fp32", "fp16"}
        Of both the original and the converted network.
    macs : float
        Reduction of the multiply-accumulates.
    replaced, layers : int
        Layers that took another form, of all.
    original_ms, converted_ms : float
        Medians.
    ratio, low, high : float
        Speed-up and its 95 % interval.
    off : float or None
        By how much the plan's milliseconds were off, as a share of the measured; None where nothing was
        planned for this batch and precision.
    difference : float
        Largest difference between the outputs here and in fp32 on the CPU, relative to their range.
    seconds : float
        The whole conversion.
    """

    model: str
    wish: str
    batch: int
    precision: str
    macs: float
    replaced: int
    layers: int
    original_ms: float
    converted_ms: float
    ratio: float
    low: float
    high: float
    off: float | None
    difference: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the outputs agree with those on the CPU."""
        return self.difference <= OUTPUT_TOLERANCE[self.precision]


@dataclass(frozen=True)
class Finding:
    """What came of one wish: rows, or why there are none.

    Attributes
    ----------
    model, wish : str
    rows : tuple of Row
    refused : str or None
        What `convert` said where the budget is out of reach.
    """

    model: str
    wish: str
    rows: tuple[Row, ...] = ()
    refused: str | None = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Finding:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**plain, "rows": tuple(Row(**row) for row in plain["rows"])})


def main(
    work: Annotated[Path, typer.Option(help="Where models and rows go.")] = ROOT
    / "references"
    / "gpu",
    out: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="docs/results-gpu.md")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="ResNet-50 alone, few images, two budgets.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Timed seconds a model and batch size.")] = 2.0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget the rows of earlier runs.")
    ] = False,
) -> None:
    """Check and time Twofold on an NVIDIA GPU, and write the page."""
    try:
        require_cuda()
        if quick:
            work, networks, wishes, images = work / "quick", ["resnet50"], WISHES[::2], 16
        else:
            networks, wishes, images = list(NAMES), WISHES, 64
        page_file = out or (work if quick else ROOT / "docs") / "results-gpu.md"
        work.mkdir(parents=True, exist_ok=True)
        if fresh:
            (work / STORE).unlink(missing_ok=True)
        bench = Bench(work, Runtime("cuda"), "cuda", seconds=seconds)
        small = _case(SMALL, work, images)
        cases = [_case(name, work, images) for name in networks]
        passed = _benchmark(small, cases, wishes, bench, page_file)
    except ConverterError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    print(f"wrote {page_file}")
    if not passed:
        print(f"a check failed; {page_file} says which one", file=sys.stderr)
        raise typer.Exit(1)


def require_cuda() -> None:
    """Raise `ConfigError` where onnxruntime or torch has no CUDA."""
    missing = []
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        missing.append(f"onnxruntime {ort.__version__} has no CUDAExecutionProvider")
    if not torch.cuda.is_available():
        missing.append(f"torch {torch.__version__} finds no CUDA GPU")
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)}, and this benchmark needs both; run it on a machine with an NVIDIA "
            "GPU, with torch built for CUDA, after "
            "`pip install --force-reinstall --no-deps onnxruntime-gpu`"
        )


def _case(name: str, work: Path, images: int) -> Case:
    """Export a network with random weights and draw its images, unless they are there."""
    size = NETWORKS[name].size
    case = Case(NAMES.get(name, name), work / f"{name}.onnx", work / f"images-{size}.npy")
    if not case.model.exists():
        net = build(name)
        initialise(net, 0, size=size)
        export_onnx(net, case.model, size=size)
    if not case.images.exists():
        # smooth, as images are: on white noise the answers of a random network hardly differ
        coarse = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        np.save(case.images, interpolate(coarse, size=(size, size), mode="bilinear").numpy())
    return case


def _benchmark(
    small: Case, cases: Sequence[Case], wishes: Sequence[Wish], bench: Bench, out: Path
) -> bool:
    """Run the checks and timings that are not stored yet, and write the page; whether all agree."""
    store = bench.work / STORE
    stored: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    findings = [Finding.from_dict(each) for each in stored.get("findings", [])]
    checks = []
    for solver in CHECKED_SOLVERS:
        print(f"== {small.name}: {solver} on cpu and {bench.device}", flush=True)
        checks.append(check_fits(small, solver, bench))
    for case in cases:
        for wish in wishes:
            if any((each.model, each.wish) == (case.name, str(wish)) for each in findings):
                continue
            print(f"== {case.name}: {wish}", flush=True)
            findings.append(measure(case, wish, bench))
            plain = {"findings": [asdict(each) for each in findings]}
            write_text_atomically(store, json.dumps(plain, indent=1) + "\n")
            write_text_atomically(out, page(checks, findings, _accelerator(bench)))
    write_text_atomically(out, page(checks, findings, _accelerator(bench)))
    agreeing = all(row.passed for each in findings for row in each.rows)
    return agreeing and all(check.passed for check in checks)


def check_fits(case: Case, solver: SolverName, bench: Bench) -> FitCheck:
    """Convert a network with the fits on the CPU and on the device, and compare the results.

    Both are planned without milliseconds and run on the CPU, so that nothing but the fits can differ.

    Parameters
    ----------
    case : Case
    solver : {"data-svd", "admm"}
    bench : Bench

    Raises
    ------
    ConverterError
        As `converter.convert`.
    """
    results: list[tuple[Conversion, float]] = []
    # torch multiplies in TF32 inside cuDNN unless told otherwise; that is no round-off
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for place, device in (("cpu", "cpu"), ("device", bench.device)):
            started = time.monotonic()
            conversion = converter.convert(
                case.model,
                case.images,
                bench.work / f"{case.model.stem}-{solver}-{place}.onnx",
                Budget(macs=2),
                calibration=bench.calibration,
                solver=SolverSettings(solver, device),
                timing=False,
            )
            results.append((conversion, time.monotonic() - started))
    (first, cpu_seconds), (second, device_seconds) = results
    images = np.load(case.images)[:CHECKED_IMAGES]
    expected, got = (_answers(load_model(each.out), images, Runtime()) for each in (first, second))
    return FitCheck(
        name=case.name,
        solver=solver,
        device=bench.device,
        layers=len(first.layers),
        unlike=tuple(
            one.name
            for one, other in zip(first.layers, second.layers, strict=True)
            if (one.scheme, one.ranks, one.support) != (other.scheme, other.ranks, other.support)
        ),
        difference=_difference(expected, got),
        cpu_error=_mean_error(first),
        device_error=_mean_error(second),
        cpu_seconds=cpu_seconds,
        device_seconds=device_seconds,
    )


def _mean_error(conversion: Conversion) -> float:
    return sum(layer.error or 0.0 for layer in conversion.layers) / len(conversion.layers)


def measure(case: Case, wish: Wish, bench: Bench) -> Finding:
    """Convert a network for one wish, compare the result's outputs with the CPU's, and time it.

    Parameters
    ----------
    case : Case
    wish : Wish
    bench : Bench

    Returns
    -------
    Finding
        A row for each batch and precision; none where the budget is out of reach.

    Raises
    ------
    ConverterError
        As `converter.convert` and `converter.latency.measure_latency`.
    """
    started = time.monotonic()
    unit = "speedup" if wish.budget.timed else "macs"
    factor = wish.budget.speedup or wish.budget.macs
    made = bench.work / f"{case.model.stem}-{unit}{factor:g}-batch{wish.batch}.onnx"
    try:
        conversion = converter.convert(
            case.model,
            case.images,
            made,
            wish.budget,
            calibration=bench.calibration,
            solver=SolverSettings(device=bench.device),
            target=Target(bench.runtime, wish.batch),
            timing=wish.budget.timed,
            cache=bench.work / "milliseconds",
        )
    except ConfigError as error:
        return Finding(case.name, str(wish), refused=str(error))
    took = time.monotonic() - started

    original, converted = load_model(case.model), load_model(made)
    models = {
        "fp32": (original, converted),
        "fp16": (
            in_float16(original, Path("original.onnx")),
            in_float16(converted, Path("converted.onnx")),
        ),
    }
    images = np.load(case.images)
    checked = images[:CHECKED_IMAGES]
    expected = _answers(converted, checked, Runtime())
    differences = {
        precision: _difference(expected, _answers(model, checked, bench.runtime))
        for precision, (_, model) in models.items()
    }
    (entry,) = model_inputs(original)
    rows = []
    for batch in bench.batches:
        timings = measure_latency(
            {
                f"{name} {precision}": model
                for precision, pair in models.items()
                for name, model in zip(("original", "converted"), pair, strict=True)
            },
            {entry.name: np.resize(images, (batch, *images.shape[1:]))},
            bench.runtime,
            seconds=bench.seconds,
        )
        for precision in models:
            before = timings[f"original {precision}"]
            after = timings[f"converted {precision}"]
            gained = speedup(before, after)
            planned = conversion.latency if (batch, precision) == (wish.batch, "fp32") else None
            rows.append(
                Row(
                    model=case.name,
                    wish=str(wish),
                    batch=batch,
                    precision=precision,
                    macs=conversion.macs_reduction,
                    replaced=sum(layer.scheme != "kept" for layer in conversion.layers),
                    layers=len(conversion.layers),
                    original_ms=before.median_ms,
                    converted_ms=after.median_ms,
                    ratio=gained.ratio,
                    low=gained.low,
                    high=gained.high,
                    off=None if planned is None else planned.off,
                    difference=differences[precision],
                    seconds=took,
                )
            )
    return Finding(case.name, str(wish), tuple(rows))


def _answers(
    model: onnx.ModelProto, images: NDArray[np.float32], runtime: Runtime
) -> list[NDArray[Any]]:
    (entry,) = model_inputs(model)
    return run(open_session(model, runtime), None, {entry.name: images})


def _difference(expected: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> float:
    """Largest difference over all outputs, relative to the range of each."""
    return float(
        np.max(
            [
                np.abs(one - other).max() / (np.ptp(one) or 1.0)
                for one, other in zip(expected, got, strict=True)
            ]
        )
    )


def _accelerator(bench: Bench) -> str:
    """Name what the models ran on."""
    if bench.runtime.provider == "cpu":
        return "no GPU"
    name: str = torch.cuda.get_device_name()
    return name


INTRODUCTION = """\
# Results on a GPU

Written by `python -m tools.gpu`, with onnxruntime-gpu in the place of onnxruntime. Networks for 224×224
images with random weights, converted on random images: speed is real, accuracy means nothing here.

- Machine: {accelerator}; {processor}, {cores} cores; onnxruntime {onnxruntime}, torch {torch}.
- Fits and recordings run on the GPU. Models are timed with inputs and outputs bound to it, in turns, after
  warm-up runs in which cuDNN searches its algorithms (onnxruntime's default, exhaustive). fp32 uses TF32
  where the GPU has it, which is onnxruntime's default too.
- Speed-up: median ratio of original and converted in turns, both in the same precision, with its 95 %
  interval. fp16 is onnxruntime's `convert_float_to_float16` of both; plans are made in fp32.
- Plan off: by how much the planned milliseconds of the converted model were off the measured ones.
- Outputs off: largest difference between the converted model here and in fp32 on the CPU, relative to the
  outputs' range; at most {fp32:g} in fp32 and {fp16:g} in fp16, else marked ✗.

## Checks
"""


def page(checks: Sequence[FitCheck], findings: Sequence[Finding], accelerator: str) -> str:
    """Write checks and timings as a Markdown page.

    Parameters
    ----------
    checks : sequence of FitCheck
    findings : sequence of Finding
        In the order of the table.
    accelerator : str
        What the models ran on.
    """
    here = machine()
    rows = [row for finding in findings for row in finding.rows]
    agreeing = sum(row.passed for row in rows)
    lines = [
        INTRODUCTION.format(
            accelerator=accelerator,
            processor=here["processor"],
            cores=here["usable_cores"],
            onnxruntime=ort.__version__,
            torch=torch.__version__,
            **OUTPUT_TOLERANCE,
        ),
        *map(_checked, checks),
        f"- {_verdict(agreeing == len(rows))} Outputs under the GPU against the CPU: {agreeing} of "
        f"{len(rows)} rows agree.",
        "",
        "## Timings",
        "",
        "| model | asked | MACs ÷ | layers replaced | batch | precision | original ms | converted ms | "
        "speed-up | plan off | outputs off | convert seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    refused = [each for each in findings if each.refused is not None]
    if refused:
        lines += ["", "## Out of reach", ""]
        lines += [f"- {each.model}, {each.wish}: {each.refused}." for each in refused]
    return "\n".join(lines) + "\n"


def _verdict(passed: bool) -> str:
    return "✓" if passed else "✗"


def _checked(check: FitCheck) -> str:
    unlike = f", but not {', '.join(check.unlike)}" if check.unlike else ""
    asked = (
        f"the errors within {ERROR_TOLERANCE:.0%}"
        if check.solver == "admm"
        else f"the outputs within {FITS_TOLERANCE:g} and no other forms"
    )
    return (
        f"- {_verdict(check.passed)} `{check.solver}` on {check.device} against cpu, {check.name}, "
        f"MACs ÷ 2: mean error of the layers {check.device_error:.4f} against {check.cpu_error:.4f}, "
        f"outputs differ by {check.difference:.1e} of their range, "
        f"{check.layers - len(check.unlike)} of {check.layers} layers take the same form{unlike} "
        f"(asked: {asked}); {check.device_seconds:.0f} s against {check.cpu_seconds:.0f} s."
    )


def _line(row: Row) -> str:
    off = "–" if row.off is None else f"{100 * row.off:+.1f} %"
    difference = f"{row.difference:.1e}" + ("" if row.passed else " ✗")
    return (
        f"| {row.model} | {row.wish} | {row.macs:.2f} | {row.replaced} of {row.layers} | {row.batch} | "
        f"{row.precision} | {row.original_ms:.2f} | {row.converted_ms:.2f} | "
        f"{interval(row.ratio, row.low, row.high)} | {off} | {difference} | {row.seconds:.0f} |"
    )


if __name__ == "__main__":
    typer.run(main)
