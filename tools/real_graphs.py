"""Convert the graphs that exporters write, check every result, and write a section of docs/reliability.md.

    python -m tools.real_graphs [--only "U-Net"] [--fresh]

The graphs are those of `tools.architectures`, each by torch's old exporter (`dynamo=False`, opsets 11 to 20
in turns) and by its new one (opsets 18 to 23); the light networks that the onnx package ships; and all Conv,
ConvTranspose, Gemm and MatMul cases of its backend tests, as they come and with their weights bound.

Of each graph it is checked that

- with every layer replaced by branches that equal it, the outputs are the original's to round-off;
- the conversion, at MACs ÷ 1.3, ends with a model or with one sentence that says why not;
- the result loads, keeps inputs, outputs, opsets and metadata, and runs at other batches and sizes where
  the original does;
- its output error on inputs that it has not seen is not far from what the conversion predicted.

Whatever does not hold ends the script with exit code 1. Rows are kept; an interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

import converter
from converter import Budget, CalibrationSettings, Conversion, Runtime, SolverSettings, Target
from converter.errors import ConfigError, ConverterError, ModelError
from converter.model_file import load_model, save_model
from converter.preparation import normalised
from converter.runtime import model_inputs, open_session
from models import settle_norms
from passes.layers import find_layers
from tools.architectures import ARCHITECTURES, Architecture
from tools.architectures.blocks import Lambda
from tools.exact import in_rotation, split_all
from tools.reliability import load_figures, machine_line, save_figures, write_section

__all__ = ["Row", "backend_cases", "examine", "export", "main"]

OLD_OPSETS, NEW_OPSETS = range(11, 21), range(18, 24)
FACTORS = (1.3, 1.05)
"""Budgets that are tried; the second where the first is out of reach."""
SAMPLES, UNSEEN = 48, 32
ROUND_OFF = 1e-4
"""Of the outputs' range: float32 sums in another order, through all layers."""
SURPRISE, HARMLESS = 4.0, 0.02
"""An output error (squared, relative to the variance) is as stated up to the first factor: predictions are of
first order (ADR 0003). Below the second number none is large."""
LIGHT_FITTED = (
    "squeezenet",
    "shufflenet",
    "inception_v1",
    "resnet50",
    "densenet121",
    "inception_v2",
)
"""The others have Gemms of 100 million weights, which take minutes; their replacement is tested by
tests/passes/test_networks.py."""

Feeds = dict[str, NDArray[Any]]


@dataclass
class Row:
    """What became of one graph.

    Attributes
    ----------
    name, family, maker : str
    opset, layers, converted : int
    kept : dict of str to int
        Why layers were kept, and how many.
    macs : float
        Original over converted; 1 where it was left alone.
    exact : float or None
        Difference with exact branches, relative to the outputs' range.
    stated, error : float or None
        Squared output error relative to the variance, as predicted and on unseen inputs.
    left_alone : str or None
        The sentence that a conversion ended with.
    wrong : str or None
        What did not hold.
    judged : bool
        Whether its error must be as stated; not so where outputs jump (`Architecture.jumps`).
    """

    name: str
    family: str
    maker: str
    opset: int
    layers: int = 0
    converted: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    macs: float = 1.0
    exact: float | None = None
    stated: float | None = None
    error: float | None = None
    left_alone: str | None = None
    wrong: str | None = None
    judged: bool = True


class _WrongError(Exception):
    """Something that must hold does not."""


def main(
    only: Annotated[str, typer.Option(help="Part of the names of graphs.")] = "",
    fresh: Annotated[bool, typer.Option(help="Forget the rows of earlier runs.")] = False,
) -> None:
    """Convert all of them; exit code 1 where something does not hold."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    rows = load_figures("real-graphs", fresh=fresh)
    for row, path, batches, sizes in _cases(rows, only):
        key = f"{row.name} / {row.maker}"
        examine(row, path, batches=batches, sizes=sizes)
        if row.wrong:
            print(f"   WRONG {key}: {row.wrong}", flush=True)
        rows[key] = dataclasses.asdict(row)
        save_figures("real-graphs", rows)
    found = [Row(**each) for each in rows.values()]
    write_section("Real graphs", _section(found))
    if any(row.wrong for row in found):
        raise typer.Exit(1)


def _cases(
    done: Mapping[str, Any], only: str
) -> Iterator[tuple[Row, Path, Sequence[int], Sequence[int]]]:
    """Give each graph that is not done, as a file, with the batches and the growths it must take."""

    def wanted(name: str, maker: str) -> bool:
        return f"{name} / {maker}" not in done and only.lower() in name.lower()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for number, each in enumerate(ARCHITECTURES):
            for maker, opsets in (("old exporter", OLD_OPSETS), ("new exporter", NEW_OPSETS)):
                if not wanted(each.name, maker):
                    continue
                print(f"== {each.name}, {maker}", flush=True)
                opset = export(each, path, opsets[number % len(opsets)], new=maker[0] == "n")
                sizes = (1, 2) if each.free_size else (1,)
                row = Row(each.name, each.family, maker, opset, judged=not each.jumps)
                yield row, path, (1, 3), sizes
        data = Path(onnx.__file__).parent / "backend" / "test" / "data"
        for light in sorted((data / "light").glob("*.onnx")):
            name = light.stem.removeprefix("light_")
            if name in LIGHT_FITTED and wanted(name, "onnx light"):
                print(f"== {name}", flush=True)
                opset = load_model(light).opset_import[0].version
                yield Row(name, "light networks", "onnx light", opset), light, (1,), (1,)
        for name, model, feeds in backend_cases():
            for bound in (False, True):
                maker = "weights bound" if bound else "as it comes"
                if not wanted(name, maker):
                    continue
                changed = _bound(model, feeds) if bound else model
                if changed is not None:
                    save_model(changed, path)
                    opset = changed.opset_import[0].version
                    yield Row(name, "backend cases", maker, opset), path, (), ()


# Graphs --------------------------------------------------------------------------------------


def export(architecture: Architecture, path: Path, opset: int, *, new: bool) -> int:
    """Write a network with seeded random weights; return its opset.

    Parameters
    ----------
    architecture : Architecture
    path : Path
    opset : int
        The next one that the exporter can write is taken where it lacks an operator here.
    new : bool
        Whether torch's new exporter writes it.
    """
    torch.manual_seed(0)
    net = architecture.build()
    _shape_spectra(net)
    examples = tuple(torch.randn(4, *shape) for shape in architecture.inputs)
    settle_norms(net, *examples)
    for each in range(opset, 24):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            try:
                _export_as(net, architecture, examples, path, each, new)
            except torch.onnx.errors.UnsupportedOperatorError:
                continue
        written: int = onnx.load(path).opset_import[0].version
        return written
    raise ValueError(f"{architecture.name} cannot be exported from opset {opset} on")


def _shape_spectra(net: nn.Module) -> None:
    """Let the singular values of each weight fall like 1/i, as those of trained networks do."""
    with torch.no_grad():
        for module in net.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim > 1:
                matrix = weight.flatten(1)
                left, values, right = torch.linalg.svd(matrix, full_matrices=False)
                falling = values / torch.arange(1, len(values) + 1)
                changed = (left * falling) @ right * (values.norm() / falling.norm())
                weight.copy_(changed.reshape(weight.shape))


def _export_as(
    net: nn.Module,
    architecture: Architecture,
    examples: tuple[torch.Tensor, ...],
    path: Path,
    opset: int,
    new: bool,
) -> None:
    inputs = [f"image{number}" for number in range(len(examples))]
    outputs = [f"answer{number}" for number in range(architecture.outputs)]
    axes = {0: "batch"} | ({2: "height", 3: "width"} if architecture.free_size else {})
    free: dict[str, Any] = {}
    if new:
        dims = tuple({axis: torch.export.Dim(name) for axis, name in axes.items()} for _ in inputs)
        free["dynamic_shapes"] = (dims,) if isinstance(net, Lambda) else dims
        free["external_data"] = False
        free["verbose"] = False
    else:
        free["dynamic_axes"] = dict.fromkeys(inputs, axes) | {
            name: {0: "batch"} for name in outputs
        }
    torch.onnx.export(
        net,
        examples,
        str(path),
        input_names=inputs,
        output_names=outputs,
        opset_version=opset,
        dynamo=new,
        **free,
    )
    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = "made for", "a test of what is kept"
    onnx.save(model, path)


def backend_cases() -> Iterator[tuple[str, onnx.ModelProto, Feeds]]:
    """Give the backend test cases of onnx that have a linear layer, with their inputs."""
    from onnx.backend.test.case.node import collect_testcases
    from onnx.backend.test.loader import load_model_tests

    linear = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

    def has_linear(model: onnx.ModelProto) -> bool:
        return any(node.op_type in linear for node in model.graph.node)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnx, whose cases overflow on purpose
        cases = collect_testcases(None)
    for case in sorted(cases, key=lambda case: case.name):
        if case.model is not None and case.data_sets and has_linear(case.model):
            names = [value.name for value in case.model.graph.input]
            arrays = case.data_sets[0][0]
            yield case.name, case.model, dict(zip(names, map(np.asarray, arrays), strict=False))
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        for case in load_model_tests(kind=kind):
            folder = Path(case.model_dir or "")
            model = onnx.load(folder / "model.onnx")
            if not has_linear(model):
                continue
            feeds = {}
            for number, value in enumerate(model.graph.input):
                stored = folder / "test_data_set_0" / f"input_{number}.pb"
                if stored.exists():
                    tensor = onnx.TensorProto.FromString(stored.read_bytes())
                    feeds[value.name] = numpy_helper.to_array(tensor)
            yield f"{kind}: {case.name}", model, feeds


def _bound(model: onnx.ModelProto, feeds: Feeds) -> onnx.ModelProto | None:
    """Make the weights of a case initializers; None where it has other inputs than one, or none."""
    given = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in given]
    if len(free) < 2 or any(value.name not in feeds for value in free):
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.ir_version = max(model.ir_version, 4)
    del changed.graph.input[:]
    changed.graph.input.append(free[0])
    for value in free[1:]:
        changed.graph.initializer.append(numpy_helper.from_array(feeds[value.name], value.name))
    return changed


# Checks --------------------------------------------------------------------------------------


def examine(
    row: Row, path: Path, *, batches: Sequence[int] = (1, 3), sizes: Sequence[int] = (1,)
) -> None:
    """Convert one graph, check what comes out, and fill in the row.

    Parameters
    ----------
    row : Row
    path : Path
        The model.
    batches, sizes : sequence of int
        Batches that it must take, and factors on height and width; of no effect where the model fixes them.
    """
    try:
        model = load_model(path)
        layers = find_layers(normalised(model, path)[0])
    except ModelError as error:
        row.left_alone = str(error).replace(str(path), "it")
        return
    row.layers = len(layers)
    reasons = [layer.reason for layer in layers if layer.reason]
    try:
        inputs = model_inputs(model)
        feeds = _random_feeds(inputs, SAMPLES, seed=1)
        if feeds is not None and row.maker != "onnx light":
            row.exact = _exactness(model, feeds)
        with tempfile.TemporaryDirectory() as folder:
            _converted(row, path, model, feeds, Path(folder), batches, sizes)
    except _WrongError as error:
        row.wrong = str(error)
    except ConverterError as error:
        all_kept = reasons and len(reasons) == len(layers)
        row.left_alone = reasons[0] if all_kept else str(error).replace(str(path), "it")
    except Exception as error:  # noqa: BLE001  # a traceback is what is looked for
        row.wrong = f"{type(error).__name__}: {error}"


def _random_feeds(inputs: Sequence[Any], count: int, seed: int, size: int = 1) -> Feeds | None:
    """Draw samples; None where an input is no float tensor with a batch."""
    random = np.random.default_rng(seed)
    feeds: Feeds = {}
    for each in inputs:
        if each.dtype != np.float32 or not each.shape:
            return None
        sides = [side if isinstance(side, int) else 32 * size for side in each.shape[1:]]
        rows = each.shape[0] if isinstance(each.shape[0], int) else count
        feeds[each.name] = _smooth(random, (rows, *sides))
    return feeds


def _smooth(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw samples that differ in level, contrast and coarse shapes, as images do."""
    axes = range(2, len(shape))
    coarse = random.normal(size=[-(-n // 4) if axis in axes else n for axis, n in enumerate(shape)])
    for axis in axes:
        coarse = np.repeat(coarse, 4, axis)
    coarse = coarse[tuple(slice(n) for n in shape)]
    each = (shape[0], *[1] * (len(shape) - 1))
    level, contrast = random.normal(size=each), random.uniform(0.3, 1.5, size=each)
    fine = 0.3 * random.normal(size=shape)
    return (contrast * (coarse + fine) + level).astype(np.float32)


def _answers(model: onnx.ModelProto | Path, feeds: Feeds) -> list[NDArray[Any]]:
    session = open_session(model, Runtime(threads=1), spinning=False)
    return [np.asarray(each) for each in session.run(None, feeds)]


def _exactness(model: onnx.ModelProto, feeds: Feeds) -> float | None:
    """Replace all layers by exact branches; return the largest difference of an output."""
    worst = None
    for way in ("low rank", "parts"):
        changed, layers = split_all(model, in_rotation(way))
        if not layers:
            return None
        onnx.checker.check_model(changed)
        for found, wanted in zip(_answers(changed, feeds), _answers(model, feeds), strict=True):
            if found.shape != wanted.shape:
                raise _WrongError(f"with exact branches, {wanted.shape} became {found.shape}")
            scale = max(float(np.abs(wanted).max(initial=0)), 1e-30)
            worst = max(worst or 0.0, float(np.abs(found - wanted).max(initial=0)) / scale)
    if worst is not None and worst > ROUND_OFF:
        raise _WrongError(f"exact branches differ by {worst:.1e} of the outputs' range")
    return worst


def _converted(
    row: Row,
    path: Path,
    model: onnx.ModelProto,
    feeds: Feeds | None,
    folder: Path,
    batches: Sequence[int],
    sizes: Sequence[int],
) -> None:
    calib, out = folder / "calib.npz", folder / "small.onnx"
    stored: dict[str, Any] = feeds or {"none": np.zeros(1, np.float32)}
    np.savez(calib, **stored)
    conversion = _at_a_budget(path, calib, out)
    row.macs = conversion.macs_reduction
    row.converted = sum(layer.scheme != "kept" for layer in conversion.layers)
    row.layers = len(conversion.layers)
    row.kept = dict(Counter(_kind(layer.reason) for layer in conversion.layers if layer.reason))
    small = load_model(out)
    _require_same_interface(model, small)
    inputs = model_inputs(model)
    for batch in batches:
        for size in sizes:
            feed = _random_feeds(inputs, batch, seed=batch, size=size)
            assert feed is not None, "such graphs have been left alone"
            for found, wanted in zip(_answers(out, feed), _answers(path, feed), strict=True):
                if found.shape != wanted.shape or found.dtype != wanted.dtype:
                    raise _WrongError(f"at batch {batch}, {wanted.shape} became {found.shape}")
                if not np.isfinite(found).all():
                    raise _WrongError(f"at batch {batch}, an output is not finite")
    unseen = _random_feeds(inputs, UNSEEN, seed=2)
    assert unseen is not None, "such graphs have been left alone"
    row.error, noise = _output_error(_answers(out, unseen), _answers(path, unseen))
    row.stated = conversion.planned.effect if conversion.planned else None
    allowed = max(HARMLESS, SURPRISE * (row.stated or 0.0))
    if row.error - 2 * noise > allowed and row.judged:
        raise _WrongError(
            f"an output error of {row.error:.3g} ± {noise:.2g} where {allowed:.3g} is allowed"
        )


def _at_a_budget(path: Path, calib: Path, out: Path) -> Conversion:
    for factor in FACTORS[:-1]:
        try:
            return _convert(path, calib, out, factor)
        except ConfigError:
            continue
    return _convert(path, calib, out, FACTORS[-1])


def _convert(path: Path, calib: Path, out: Path, factor: float) -> Conversion:
    return converter.convert(
        path,
        calib,
        out,
        Budget(macs=factor),
        calibration=CalibrationSettings(batch=8, patches=512),
        solver=SolverSettings(iterations=4, polish=2),
        target=Target(Runtime(threads=1), 1),
        timing=False,
    )


def _kind(reason: str) -> str:
    """Give a reason without the names of its nodes and tensors."""
    words = reason.split("'")
    return "…".join(words[::2]) if len(words) > 2 else reason


def _require_same_interface(model: onnx.ModelProto, small: onnx.ModelProto) -> None:
    before, after = (
        [(each.name, each.shape, each.dtype) for each in model_inputs(proto)]
        for proto in (model, small)
    )
    if before != after:
        raise _WrongError(f"the inputs {before} became {after}")
    if list(model.graph.output) != list(small.graph.output):
        raise _WrongError("the outputs are declared otherwise")
    if list(model.opset_import) != list(small.opset_import):
        raise _WrongError("the opsets are others")
    kept = {entry.key: entry.value for entry in small.metadata_props}
    lost = [entry.key for entry in model.metadata_props if kept.get(entry.key) != entry.value]
    if lost:
        raise _WrongError(f"the metadata {lost} are lost")


def _output_error(
    found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]]
) -> tuple[float, float]:
    """Mean over the float outputs of ‖found − wanted‖² / ‖wanted − mean‖², and its standard error."""
    errors, variances = [], []
    for a, b in zip(found, wanted, strict=True):
        spread = float(np.square(b - b.mean(0)).sum()) if b.dtype.kind == "f" else 0.0
        if spread > 0:
            missed = np.square(a.astype(np.float64) - b).reshape(len(b), -1).sum(1) / spread
            errors.append(float(missed.sum()))
            variances.append(len(missed) * float(missed.var()))
    if not errors:
        return 0.0, 0.0
    return float(np.mean(errors)), float(np.sqrt(np.sum(variances))) / len(errors)


# The page ------------------------------------------------------------------------------------


def _section(rows: Sequence[Row]) -> list[str]:
    cases = [row for row in rows if row.family == "backend cases"]
    networks = [row for row in rows if row.family != "backend cases"]
    names = {row.name for row in networks if row.maker.endswith("exporter")}
    return [
        "`python -m tools.real_graphs`: graphs as exporters write them; MACs ÷ 1.3, "
        "or ÷ 1.05 where that is out of",
        f"reach, on {SAMPLES} random inputs, 512 patches a layer. {machine_line()}.",
        "",
        f"- **{len(networks)} graphs of networks ({len(names)} architectures, old and new exporter), "
        f"{sum(bool(row.wrong) for row in networks)} of them wrong; {len(cases)} backend cases, "
        f"{sum(bool(row.wrong) for row in cases)} wrong.**",
        "- Every result loads, keeps its inputs, outputs, opsets and metadata, and runs at batches 1 and 3 "
        "and at twice the size where the",
        "  original is free there.",
        "- Exact: largest difference of an output, relative to its largest value, where every layer is "
        "replaced by branches that equal it.",
        f"- Error: squared output error relative to the variance, on {UNSEEN} unseen inputs; stated: as the "
        "conversion predicted it. More than",
        f"  {SURPRISE:g} times as much, and above {HARMLESS:g}, by more than two standard errors, counts as "
        "wrong. Weights are random, with singular values that "
        "fall as those of trained ones do.",
        "- Jumps: outputs are chosen by comparisons or TopK, so that errors are listed but not judged.",
        "",
        "| network | made by | opset | layers | converted | MACs ÷ | exact | stated | error | "
        "kept, and why |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in networks),
        "",
        "### Backend cases of onnx",
        "",
        "Conv, ConvTranspose, Gemm and MatMul cases, as they come (their weights are mostly inputs) and with "
        "the weights bound.",
        "",
        f"- Converted: {sum(row.converted > 0 for row in cases)}; replaced exactly: "
        f"{sum(row.exact is not None for row in cases)}, differing by "
        f"{max((row.exact for row in cases if row.exact is not None), default=0):.1e} at most.",
        "- Left alone, and why:",
        "",
        "| reason | cases |",
        "|---|---|",
        *(
            f"| {reason} | {count} |"
            for reason, count in Counter(
                _kind(row.left_alone) for row in cases if row.left_alone
            ).most_common()
        ),
    ]


def _line(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    why = "; ".join(f"{count}: {reason}" for reason, count in row.kept.items())
    jumps = "" if row.judged else " (jumps)"
    return (
        f"| {row.name} | {row.maker} | {row.opset} | {row.layers} | {row.converted} | "
        f"{row.macs:.2f} | {number(row.exact, '.0e')} | {number(row.stated, '.2g')} | "
        f"{number(row.error, '.2g')}{jumps} | {row.wrong or row.left_alone or why} |"
    )


if __name__ == "__main__":
    typer.run(main)
