"""Put Twofold beside its peers, at the same budget and on the same images, and write docs/peers.md.

    pip install -e '.[peers]'
    python -m tools.peers [--only vgg16] [--method wanda] [--images 200] [--out docs/peers.md]

The peers run from their own packages: onnxsim's structured pruning (the extra `peers`) and onnxruntime's
static quantization. Plain SVD and plain spatial SVD are computed here. Each row is one model made and
then one `converter.validate` against the original. Rows are kept in the work folder; a run that was
interrupted goes on from there, `--fresh` starts over.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

import converter
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet
from converter.config import Budget, Preprocessing, QuantizationSettings
from converter.model_file import load_model, save_model
from converter.output_file import write_text_atomically
from converter.planner.cost import count_cost
from converter.preparation import normalised
from converter.report.words import interval
from converter.runtime import machine, model_inputs
from converter.validation.findings import Latency
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import find_layers
from passes.reorder_sums import ReorderSums
from passes.split import Branches, Factor, Split
from tools.reference import RESULTS, ROOT, TARGETS, Ask, made_by

__all__ = ["BUDGETS", "METHODS", "Case", "Method", "Row", "main", "page"]

BUDGETS = {
    "ResNet-20": 2.0,
    "AlexNet": 3.0,
    "VGG-16": 4.0,
    "GoogLeNet": 3.0,
}
"""Original multiply-accumulates over those that every method may leave, for each reference model."""

CALIBRATION_BATCH = 100
"""Images that the peers' own calibration runs at once."""

SPARSITY_STEPS = 14
"""Bisections for the sparsity that meets a budget; channel counts do not resolve more."""


@dataclass(frozen=True)
class Case:
    """A reference model, its images and its budget: what every method gets.

    Attributes
    ----------
    name : str
        As the page names the model.
    model : Path
    calib, val : Path
        Folders of images; `val` has one subfolder for each class.
    preprocessing : Preprocessing
    macs : float
        Original multiply-accumulates over converted ones, above 1.
    work : Path
        Folder of the models that are made.
    results : Path
        Folder of what `tools.reference` has made.
    """

    name: str
    model: Path
    calib: Path
    val: Path
    preprocessing: Preprocessing
    macs: float
    work: Path
    results: Path

    def made_by(self, method: str) -> Path:
        """Say where the model that a method makes lies."""
        return self.work / f"{self.model.stem}-{method}-macs{self.macs:g}.onnx"

    def calibration(self) -> CalibrationSet:
        """Open all calibration images."""
        inputs = model_inputs(load_model(self.model), label=str(self.model))
        return open_calibration_set(self.calib, inputs, self.preprocessing)


@dataclass(frozen=True)
class Method:
    """One way to make a model cheaper.

    Attributes
    ----------
    label : str
        As the page names it.
    make : callable
        Takes the case and the path of the model to write; says in a few words with what setting.
    package : str or None, default None
        Package of the extra `peers` that it needs.
    """

    label: str
    make: Callable[[Case, Path], str]
    package: str | None = None


@dataclass(frozen=True)
class Row:
    """One method on one model, measured.

    Attributes
    ----------
    model, method : str
        Name of the model, key of `METHODS`.
    budget : float
        Reduction of the multiply-accumulates that was asked for.
    setting : str
        What the method chose to meet it.
    macs, file : float
        Reductions that were reached: multiply-accumulates, and bytes of the model.
    images : int
        Validation images.
    before, after, error : float
        Top-1 of both models and standard error of their difference, in percent.
    batch_1, batch_32 : sequence of three floats
        Speed-up with both ends of its 95 % interval.
    seconds : float
        From the original to the written model.
    """

    model: str
    method: str
    budget: float
    setting: str
    macs: float
    file: float
    images: int
    before: float
    after: float
    error: float
    batch_1: Sequence[float]
    batch_32: Sequence[float]
    seconds: float


def main(
    shared: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT.parent
    / "shared",
    work: Annotated[Path, typer.Option(help="Where models and rows go.")] = ROOT
    / "references"
    / "peers",
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "peers.md",
    only: Annotated[list[str] | None, typer.Option(help="Names of models, as vgg16.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    images: Annotated[int | None, typer.Option(help="Validation images; all by default.")] = None,
    seconds: Annotated[float, typer.Option(help="Timed seconds a model and batch size.")] = 2.0,
    fresh: Annotated[bool, typer.Option(help="Forget the rows of earlier runs.")] = False,
) -> None:
    """Run the methods on the reference models, each at its budget, and write the table."""
    names = _methods(method)
    cases = _cases(shared, work, only)
    work.mkdir(parents=True, exist_ok=True)
    store = work / "rows.json"
    rows: dict[str, Any] = {} if fresh or not store.exists() else json.loads(store.read_text())
    # a page never mixes rows of a quick look at a few images with those of all images
    extent = f"{'all' if images is None else images} images"
    for case in cases:
        for name in names:
            key = f"{case.model.stem} {name} {case.macs:g} {extent}"
            if key in rows and case.made_by(name).exists():
                continue
            print(f"== {key}", flush=True)
            rows[key] = asdict(_measure(case, name, images, seconds))
            write_text_atomically(store, json.dumps(rows, indent=1) + "\n")
            write_text_atomically(out, page(_rows(rows, extent)))
    write_text_atomically(out, page(_rows(rows, extent)))
    print(f"wrote {out}")


def _methods(chosen: Sequence[str] | None) -> list[str]:
    """Keys of the methods to run, in the order of the table."""
    unknown = sorted(set(chosen or ()) - METHODS.keys())
    if unknown:
        sys.exit(f"there is no method {unknown[0]}; choose of {', '.join(METHODS)}")
    wanted = set(chosen or METHODS)
    names = [name for name in METHODS if name in wanted]
    for name in names:
        package = METHODS[name].package
        if package is not None and find_spec(package) is None:
            sys.exit(
                f"the method {name} needs {package}: pip install -e '.[peers]', "
                "or choose others with --method"
            )
    return names


def _cases(shared: Path, work: Path, only: Sequence[str] | None) -> list[Case]:
    images = shared / "data" / "cifar10"
    cases = [
        Case(
            name=target.name,
            model=shared / "models" / target.file,
            calib=images / "calib",
            val=images / "val",
            preprocessing=target.preprocessing(),
            macs=BUDGETS[target.name],
            work=work,
            results=RESULTS,
        )
        for target in TARGETS
        if not only or any(name in target.file for name in only)
    ]
    found = [case for case in cases if case.model.exists()]
    if not found:
        sys.exit(f"no such reference model lies in {shared / 'models'}; name --shared")
    return found


def _measure(case: Case, name: str, images: int | None, seconds: float) -> Row:
    made = case.made_by(name)
    started = time.monotonic()
    setting = METHODS[name].make(case, made)
    took = time.monotonic() - started
    if name == "twofold":
        took = _twofold_seconds(case) or took
    compared = converter.validate(
        case.model,
        made,
        case.val,
        preprocessing=case.preprocessing,
        labels=True,
        images=images,
        seconds=seconds,
    )
    if compared.accuracy is None:
        sys.exit(f"{case.val} has no class folders that fit {case.model}; name another --shared")
    batch_1, batch_32 = (_speed(latency) for latency in compared.latencies)
    return Row(
        model=case.name,
        method=name,
        budget=case.macs,
        setting=setting,
        macs=compared.macs_reduction or math.inf,
        file=compared.bytes_reduction or math.inf,
        images=compared.accuracy.images,
        before=100 * compared.accuracy.original,
        after=100 * compared.accuracy.converted,
        error=compared.accuracy.standard_error_points,
        batch_1=batch_1,
        batch_32=batch_32,
        seconds=took,
    )


def _speed(latency: Latency) -> tuple[float, float, float]:
    if latency.speedup is None:
        sys.exit(f"batch {latency.batch} was not timed: {latency.skipped}")
    return latency.speedup.ratio, latency.speedup.low, latency.speedup.high


# ---- Twofold


def _twofold(case: Case, out: Path) -> str:
    """Convert; where `tools.reference` has made the very same model, take that."""
    small, report, _ = _result(case)
    if small.exists() and report.exists():
        shutil.copyfile(small, out)
        schemes = [layer["scheme"] for layer in json.loads(report.read_text())["layers"]]
    else:
        converted = converter.convert(
            case.model, case.calib, out, Budget(macs=case.macs), preprocessing=case.preprocessing
        )
        schemes = [layer.scheme for layer in converted.layers]
    return f"{sum(each != 'kept' for each in schemes)} of {len(schemes)} layers replaced"


def _twofold_seconds(case: Case) -> float | None:
    """Seconds that `tools.reference` took for the model; None where it was made here."""
    small, report, _ = _result(case)
    if not (small.exists() and report.exists()):
        return None
    return float(sum(stage["seconds"] for stage in json.loads(report.read_text())["stages"]))


def _result(case: Case) -> tuple[Path, Path, Path]:
    return made_by(case.model, Ask(("--macs", f"{case.macs:g}")), case.results)


# ---- plain SVD at even shares


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer as two factors at full rank, the largest singular values first."""

    first: Factor
    second: Factor

    @property
    def rank(self) -> int:
        return len(self.first.weight)

    def cut(self, rank: int, bias: NDArray[np.float32] | None) -> Branches:
        first = Factor(self.first.weight[:rank], self.first.axes)
        second = Factor(self.second.weight[:, :rank], self.second.axes)
        return Branches(factors=(first, second), bias=bias)


def _channel_pair(weight: NDArray[np.float32]) -> _Pair:
    """Factorise the (N, C·kh·kw) matrix: a Conv to few channels, and a 1×1 Conv behind it."""
    outputs, channels, *kernel = weight.shape
    second, first = _svd(weight.reshape(outputs, -1))
    return _Pair(
        Factor(first.reshape(-1, channels, *kernel), tuple(range(len(kernel)))),
        Factor(second.reshape(outputs, -1, *[1] * len(kernel)), ()),
    )


def _spatial_pair(weight: NDArray[np.float32]) -> _Pair:
    """Factorise the (C·kh, N·kw) matrix: a kh×1 Conv, and a 1×kw Conv behind it."""
    if weight.ndim == 2:
        return _channel_pair(weight)
    outputs, channels, height, width = weight.shape
    first, second = _svd(weight.transpose(1, 2, 0, 3).reshape(channels * height, -1))
    return _Pair(
        Factor(first.T.reshape(-1, channels, height, 1), (0,)),
        Factor(second.reshape(-1, outputs, 1, width).transpose(1, 0, 2, 3), (1,)),
    )


def _svd(matrix: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return left and right factors, (m, r) and (r, n), that share the singular values evenly."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values)
    return left * root, root[:, None] * right


def _svd_at_even_shares(
    factorise: Callable[[NDArray[np.float32]], _Pair],
) -> Callable[[Case, Path], str]:
    """Make the method that cuts all layers but the first and the last to the same share of MACs."""

    def make(case: Case, out: Path) -> str:
        original = _with_ranks(case.model, {}, {})
        pairs = _pairs(original, factorise)
        macs = {layer.name: float(layer.macs or 0) for layer in count_cost(original).layers}
        # both Convs grow with the rank in proportion, so rank 1 tells the cost of all
        unit = _macs_below(_with_ranks(case.model, pairs, dict.fromkeys(pairs, 1)), pairs)
        allowed = sum(macs.values()) / case.macs - sum(
            macs[name] for name in macs.keys() - pairs.keys()
        )

        def ranks_at(share: float) -> dict[str, int]:
            return {
                name: min(max(int(share * macs[name] / unit[name]), 1), pair.rank)
                for name, pair in pairs.items()
            }

        share = _largest(lambda s: sum(unit[n] * r for n, r in ranks_at(s).items()) <= allowed)
        save_model(_with_ranks(case.model, pairs, ranks_at(share)), out)
        return f"{100 * share:.1f} % of each layer"

    return make


def _pairs(
    model: onnx.ModelProto, factorise: Callable[[NDArray[np.float32]], _Pair]
) -> dict[str, _Pair]:
    """Factorise all convertible layers but the first and the last, which such tools keep."""
    layers = [layer for layer in find_layers(import_graph(model)) if layer.reason is None]
    return {
        layer.name: factorise(np.asarray(layer.weight, dtype=np.float32)) for layer in layers[1:-1]
    }


def _with_ranks(
    path: Path, pairs: Mapping[str, _Pair], ranks: Mapping[str, int]
) -> onnx.ModelProto:
    """Write the model with its layers cut to these ranks, by the passes that Twofold uses."""
    source = load_model(path)
    graph, _ = normalised(source, path)
    splits = [
        Split(layer, pairs[layer.name].cut(ranks[layer.name], layer.bias))
        for layer in find_layers(graph)
        if layer.name in pairs
    ]
    run_passes(graph, [*splits, ReorderSums()])
    return export_model(graph, source)


def _macs_below(model: onnx.ModelProto, names: Mapping[str, Any]) -> dict[str, float]:
    """Sum the multiply-accumulates of the nodes that each layer was split into."""
    costs = count_cost(model).layers
    return {
        name: float(sum(cost.macs or 0 for cost in costs if cost.name.startswith(f"{name}/")))
        for name in names
    }


def _largest(holds: Callable[[float], bool]) -> float:
    """Bisect for the largest number from 0 to 1 where `holds` is still true; 0 where it never is."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# ---- onnxsim


def _pruning(case: Case, out: Path) -> str:
    from onnxsim import apply_structured_pruning

    model = load_model(case.model)
    sparsity = _sparsity(model, case.macs, lambda s: apply_structured_pruning(model, sparsity=s))
    save_model(apply_structured_pruning(model, sparsity=sparsity), out)
    return f"sparsity {sparsity:.4f}"


def _wanda(case: Case, out: Path) -> str:
    from onnxsim import apply_structured_wanda_pruning

    model = load_model(case.model)
    feeds = [batch.feeds for batch in case.calibration().batches(CALIBRATION_BATCH)]

    def prune(sparsity: float, seen: Sequence[Mapping[str, NDArray[Any]]]) -> onnx.ModelProto:
        pruned: onnx.ModelProto = apply_structured_wanda_pruning(
            model, calibration_data=seen, sparsity=sparsity
        )
        return pruned

    # what is calibrated decides which channels go, not how many: one batch will do for the search
    sparsity = _sparsity(model, case.macs, lambda s: prune(s, feeds[:1]))
    save_model(prune(sparsity, feeds), out)
    return f"sparsity {sparsity:.4f}"


def _sparsity(
    model: onnx.ModelProto, wanted: float, prune: Callable[[float], onnx.ModelProto]
) -> float:
    """Bisect for the sparsity whose multiply-accumulates come nearest to the budget."""
    before = count_cost(model).macs
    low, high = 0.0, 1.0
    tried: dict[float, float] = {}
    for _ in range(SPARSITY_STEPS):
        middle = (low + high) / 2
        reduction = before / count_cost(prune(middle)).macs
        tried[middle] = abs(math.log(reduction / wanted))
        low, high = (middle, high) if reduction < wanted else (low, middle)
    return min(tried, key=tried.__getitem__)


# ---- onnxruntime's static quantization


class _Reader:
    """All calibration images, in the form that onnxruntime asks for."""

    def __init__(self, images: CalibrationSet) -> None:
        self._batches = images.batches(CALIBRATION_BATCH)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else batch.feeds


def _int8(case: Case, out: Path) -> str:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from converter.quantization.integers import ARITHMETICS

    plain = ARITHMETICS[0]  # the product that x86 has an instruction for
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        quant_pre_process(str(case.model), str(prepared))
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(case.calibration()),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=plain.activation,
            weight_type=plain.weight,
            calibrate_method=CalibrationMethod.MinMax,
        )
        save_model(load_model(quantized), out)
    return f"QDQ, {plain.name} per channel, MinMax"


def _stacked(case: Case, out: Path) -> str:
    converted = converter.convert(
        case.model,
        case.calib,
        out,
        Budget(macs=case.macs),
        preprocessing=case.preprocessing,
        quantization=QuantizationSettings(),
    )
    found = converted.quantization
    assert found is not None, "it was asked for"
    if not found["shipped"]:
        return f"left in float: {'; '.join(found['notes'])}"
    left = sum(len(each["layers"]) for each in found["left"])
    return f"{found['types']}, {found['ranges']}, {left} of {found['layers']} layers in float"


METHODS = {
    "twofold": Method("Twofold", _twofold),
    "svd": Method("plain SVD", _svd_at_even_shares(_channel_pair)),
    "spatial-svd": Method("plain spatial SVD", _svd_at_even_shares(_spatial_pair)),
    "pruning": Method("onnxsim `apply_structured_pruning`", _pruning, package="onnxsim"),
    "wanda": Method("onnxsim `apply_structured_wanda_pruning`", _wanda, package="onnxsim"),
    "int8": Method("onnxruntime `quantize_static` int8", _int8),
    "stacked": Method("Twofold with `--int8`", _stacked),
}
"""What stands side by side, in the order of the table."""


# ---- the page

INTRODUCTION = """\
# Twofold beside its peers

Written by `python -m tools.peers`, after `pip install -e '.[peers]'`. Every method gets the same model,
the same budget of multiply-accumulates (MACs) and the same 2,000 unlabelled calibration images; nothing
is retrained. Each result is compared with the original by `converter.validate`.

- Machine: {processor}, {cores} cores; {packages}.
- Top-1 on the validation images, with the standard error of the paired difference. Speed-up: the
  median ratio of interleaved runs, with its 95 % interval. Seconds: from the original to the written
  model, with the search for the setting.
- Plain SVD (a Conv to few channels, then 1×1) and plain spatial SVD (kh×1, then 1×kw) look at the weights
  alone. Shares are even: all layers but the first and the last are cut to the same share of their MACs,
  the largest that meets the budget; ranks are not rounded to what a processor likes.
- Spatial SVD is what AIMET does. It is computed here, since AIMET's maintainers no longer work on
  compression ([their words of August 2025](https://github.com/qualcomm/aimet/issues/4011)). AIMET also
  searches the shares by accuracy on labelled images, so this is its factorisation, not all of it.
- onnxsim removes whole channels, at one sparsity for all layers, bisected for the MACs nearest to the
  budget. MACs far from it are the nearest there are: onnxsim leaves what it cannot prove safe to cut
  (in 0.8.1 its Wanda pruning leaves every layer before a MaxPool). Wanda's scores come from all images.
- `quantize_static` (after `quant_pre_process`) keeps all MACs and makes each of them cheaper. So no budget
  applies to it, and it can follow on the others: Twofold's `--int8` converts to forms that suit 8 bits and
  then quantizes, with types, ranges and layers in float chosen by measured error.
"""


def _rows(stored: Mapping[str, Mapping[str, Any]], extent: str) -> list[Row]:
    return [Row(**row) for key, row in stored.items() if key.endswith(f" {extent}")]


def page(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown page, in the order of `TARGETS` and `METHODS`.

    Parameters
    ----------
    rows : sequence of Row
        All on the same validation images.
    """
    here = machine()
    packages = f"onnxruntime {here['versions']['onnxruntime']}"
    if find_spec("onnxsim") is not None:
        packages += f", onnxsim {version('onnxsim')}"
    models, methods = [target.name for target in TARGETS], list(METHODS)
    introduction = INTRODUCTION.format(
        processor=here["processor"], cores=here["usable_cores"], packages=packages
    )
    lines = [
        introduction,
        "| model, budget | method | MACs ÷ | file ÷ | images | top-1 before | after | change | "
        "speed-up, batch 1 | batch 32 | seconds | setting |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (models.index(row.model), methods.index(row.method))):
        lines.append(
            f"| {row.model}, MACs ÷ {row.budget:g} | {METHODS[row.method].label} | {row.macs:.2f} | "
            f"{row.file:.2f} | {row.images:,} | {row.before:.2f} % | {row.after:.2f} % | "
            f"{row.after - row.before:+.2f} ± {row.error:.2f} | {interval(*row.batch_1)} | "
            f"{interval(*row.batch_32)} | {row.seconds:.0f} | {row.setting} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
