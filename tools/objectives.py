"""Compare what fits leave of each layer's objective, on patches that none of them saw.

    python -m tools.objectives --model ../shared/models/resnet20_cifar10.onnx \
        --calib ../shared/data/cifar10/calib --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

For every layer and every budget, all fits get the same original patches and the same number of weights. A
fifth of the images is kept from them; what is printed is the error after the activation on these. Two tables:

- `--table solvers`: ADMM (`channel`, which it may trade for S) against data-metric SVD, without the output
  metric (the objective of the paper) and with it.
- `--table beside`: the schemes alone, and `spatial` with S beside it, in the output metric.

Each run replaces its own section of docs/objectives.md, that of its table and model, and keeps the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track

from converter.branches import branches_of
from converter.calibration.gather import Inputs, Sample
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.config import CalibrationSettings, Runtime, preprocessing_from_options
from converter.errors import ConfigError
from converter.fitting import problem_of
from converter.geometry import geometry_of
from converter.model_file import load_model
from converter.output_file import write_text_atomically
from converter.preparation import normalised
from converter.runtime import model_inputs
from converter.schemes import SCHEMES, Effort, Form, Geometry
from converter.sensitivity import output_metrics
from converter.solver.factorize import data_svd
from converter.solver.problem import Problem
from converter.solver.prox import activate
from converter.solver.solution import Solution
from passes.exchange import export_model
from passes.layers import Layer, find_layers
from passes.split import Factor

ROOT = Path(__file__).resolve().parent.parent
TITLE = "# What fits leave of a layer's objective, on unseen patches"
SOLVER_SHARES = (1 / 2, 1 / 4, 1 / 8)
BESIDE_SHARES = (1 / 2, 1 / 4)
BESIDE_SUPPORTS = (1 / 16, 1 / 8)
"""Channels of S beside `spatial`, as fractions of all."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table, and whether what it asks about has the lower error."""

    line: str
    lower: bool


class Table(str, Enum):
    """What is compared."""

    SOLVERS = "solvers"
    BESIDE = "beside"


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """One layer with what was recorded of it in the original."""

    layer: Layer
    geometry: Geometry
    sample: Sample
    inputs: Inputs
    metric: NDArray[np.float64]

    def problems(
        self, metric: NDArray[np.float64] | None, *, whole: bool = False
    ) -> tuple[Problem, Problem]:
        """Give the problem on four fifths of the images, which fits may see, and on the others."""
        problem = problem_of(
            self.layer, self.sample, self.inputs, metric, device="cpu", whole=whole
        )
        image = torch.arange(len(problem.features)) // self.sample.positions.shape[1]
        return _rows(problem, image % 5 != 4), _rows(problem, image % 5 == 4)

    def error(self, unknown: Problem, form: Form, solution: Solution) -> float:
        """Relative squared error after the activation, from the weights that would be deployed."""
        weight = _dense(self.geometry, form, solution)
        if unknown.basis is not None:  # the weight lies in the row space of the basis
            weight = torch.linalg.lstsq(
                unknown.basis.T.double(), weight.T.double()
            ).solution.T.float()
        response = unknown.features @ weight.T + solution.bias
        if unknown.offset is not None:
            response = response + unknown.offset
        wanted = activate(unknown.activation, unknown.target)
        missed = activate(unknown.activation, response) - wanted
        metric = torch.eye(len(weight)).double() if unknown.metric is None else unknown.metric
        return float(_energy(missed, metric) / _energy(wanted - wanted.mean(0), metric))


def main(
    model: Annotated[Path, typer.Option(help="An ONNX model.")],
    calib: Annotated[Path, typer.Option(help="A folder of images.")],
    table: Annotated[Table, typer.Option(help="What to compare.")] = Table.SOLVERS,
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer by name; again for more. All without.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    mean: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    std: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    images: Annotated[int, typer.Option(help="Images, of which a fifth is kept back.")] = 800,
    patches: Annotated[int, typer.Option(help="Patches for each layer.")] = 8192,
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "objectives.md",
) -> None:
    """Print and write the errors on unseen patches, layer by layer and budget by budget."""
    source = load_model(model)
    graph, _ = normalised(source, model)
    layers = _named([each for each in find_layers(graph) if each.reason is None], layer, model)
    original = export_model(graph, source)
    options = preprocessing_from_options(preset=preset, mean=mean, std=std)
    data = open_calibration_set(calib, model_inputs(source), options, images=images)
    recorder = Recorder(data, CalibrationSettings(patches=patches), Runtime())
    samples = recorder.originals(original, layers)
    channel_axis = {each.response: 1 if each.op == "Conv" else -1 for each in layers}
    metrics = output_metrics(original, channel_axis, data).metric

    rows: list[Row] = []
    for each in track(layers, "fit layers"):
        sample = samples[each.name]
        recorded = Recorded(
            layer=each,
            # weights are compared, which no size of the input changes
            geometry=geometry_of(each, sample.out_shape, sample.out_shape),
            sample=sample,
            inputs=recorder.inputs(original, each, sample),
            metric=metrics[each.response],
        )
        rows += _solver_rows(recorded) if table is Table.SOLVERS else _beside_rows(recorded)
    title, question, *head = _SOLVERS if table is Table.SOLVERS else _BESIDE
    command = (
        f"Written by `python -m tools.objectives --table {table.value} --model {model.name} "
        f"--images {images} --patches {patches} …`."
    )
    answer = f"{question} in {sum(row.lower for row in rows)} of {len(rows)} cases."
    body = "\n".join([command, "", answer, "", *head, *(row.line for row in rows)])
    print(body)
    page = out.read_text(encoding="utf-8") if out.exists() else ""
    write_text_atomically(out, _with_section(page, f"{title}: {model.stem}", body))


_SOLVERS = [
    "ADMM against data-metric SVD",
    "ADMM is at or below data-metric SVD",
    "A fifth of the images is kept from both. The error is that after the activation, relative and",
    "squared, in the paper's objective and in the metric of the output.",
    "",
    "| layer | share of the weights | objective | data-metric SVD | ADMM | chosen |",
    "|---|---|---|---|---|---|",
]
_BESIDE = [
    "S beside spatial",
    "`spatial` with S beside it is below `spatial` alone",
    "Fits in the metric of data and output, through the activation, all of the same number of weights,",
    "with ranks as they come (not rounded to blocks). A fifth of the images is kept from them. The error",
    "is that after the activation, relative and squared, in the metric of the output. C: input channels.",
    "",
    "| layer | shape | share of the weights | channel | tucker | spatial | depthwise | depthwise, 2 filters "
    "| S C/16 + spatial | S C/8 + spatial |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def _named(layers: list[Layer], names: Sequence[str] | None, model: Path) -> list[Layer]:
    if not names:
        return layers
    unknown = sorted(set(names) - {layer.name for layer in layers})
    if unknown:
        raise ConfigError(
            f"{model} has no layer {unknown[0]} that can be converted; `twofold inspect` lists them"
        )
    return [layer for layer in layers if layer.name in names]


def _solver_rows(recorded: Recorded) -> Iterator[Row]:
    geometry, channel = recorded.geometry, SCHEMES["channel"]
    weights = geometry.outputs * geometry.columns
    for label, metric in (("paper's", None), ("output", recorded.metric)):
        known, unknown = recorded.problems(metric)
        for share in SOLVER_SHARES:
            affordable = [
                ranks
                for ranks in channel.ranks(geometry)
                if channel.cost(geometry, ranks)[1] <= share * weights
            ]
            if not affordable:
                continue
            form = Form("channel", affordable[-1])
            linear = data_svd(known, form.ranks[0])
            ours = channel.fit(known, geometry, form, Effort())
            errors = [recorded.error(unknown, form, solution) for solution in (linear, ours)]
            yield Row(
                f"| {recorded.layer.name} | {share:g} | {label} | {errors[0]:.5f} "
                f"| {errors[1]:.5f} | r {ours.rank}, s {len(ours.support)} |",
                lower=errors[1] <= errors[0],
            )


def _beside_rows(recorded: Recorded) -> Iterator[Row]:
    geometry = recorded.geometry
    if not SCHEMES["spatial"].ranks(geometry):
        return
    known, unknown = recorded.problems(recorded.metric, whole=True)
    supports = [max(1, round(share * geometry.channels)) for share in BESIDE_SUPPORTS]
    families = [("channel", 0), ("tucker", 0), ("spatial", 0), ("depthwise", 1), ("depthwise", 2)]
    families += [("spatial", support) for support in supports]
    shape = "×".join(map(str, (geometry.outputs, geometry.channels, *geometry.kernel)))
    for share in BESIDE_SHARES:
        cells, errors = [], []
        for scheme, beside in families:
            form = _form(geometry, scheme, beside, share)
            if form is None:
                cells.append("–")
                errors.append(math.inf)
                continue
            solution = SCHEMES[scheme].fit(known, geometry, form, Effort(trade=False))
            errors.append(recorded.error(unknown, form, solution))
            cells.append(f"{errors[-1]:.5f} (r {'×'.join(map(str, form.ranks))})")
        yield Row(
            f"| {recorded.layer.name} | {shape} | {share:g} | {' | '.join(cells)} |",
            lower=min(errors[5:]) < errors[2],
        )


def _form(geometry: Geometry, scheme: str, beside: int, share: float) -> Form | None:
    """Largest form whose weights are at most a share of the layer's; None if none.

    `beside` is the channels of S; of "depthwise", which S does not stand beside, the filters of a channel.
    """
    outputs, channels, taps = geometry.outputs, geometry.channels, geometry.taps
    if scheme == "depthwise":
        if not SCHEMES[scheme].ranks(geometry):
            return None
        each = SCHEMES[scheme].cost(geometry, (1, beside))[1]
        rank = int(share * outputs * geometry.columns / each)
        return Form(scheme, (rank, rank * beside)) if rank > 0 else None
    support = beside
    left = share * outputs * geometry.columns - support * outputs * taps
    if scheme != "tucker":
        rank = int(left / SCHEMES[scheme].cost(geometry, (1,))[1])
        return Form(scheme, (rank,), support) if rank > 0 else None
    # r₁ = x C and r₂ = x N, with x from C² x + C N k x² + N² x = what is left
    twice, linear = 2 * channels * outputs * taps, channels**2 + outputs**2
    ratio = (math.sqrt(linear**2 + 2 * twice * max(left, 0.0)) - linear) / twice
    first = int(ratio * channels)
    if first < 1:
        return None
    second = min(int((left - channels * first) / (first * taps + outputs)), outputs)
    return Form(scheme, (first, second), support) if second > 0 else None


def _dense(geometry: Geometry, form: Form, solution: Solution) -> torch.Tensor:
    """S + L as one weight (N, D), from the factors as they stand in a graph."""
    branches = branches_of(geometry, form, solution)
    total = np.zeros((geometry.outputs, geometry.channels, *geometry.kernel), np.float32)
    if branches.factors:
        first, *others = branches.factors
        total += functools.reduce(_followed, others, first.weight)
    if branches.support is not None and branches.sparse is not None:
        total[:, branches.support] += branches.sparse
    return torch.from_numpy(total.reshape(geometry.outputs, -1))


def _followed(first: NDArray[np.floating], then: Factor) -> NDArray[np.floating]:
    """Weight of a Conv and a factor behind it, which have no axis in common."""
    if then.filters:
        return np.tile(first, (then.filters, *[1] * (first.ndim - 1))) * then.weight
    together: NDArray[np.floating] = np.einsum("nr...,rc...->nc...", then.weight, first)
    return together


def _rows(problem: Problem, chosen: torch.Tensor) -> Problem:
    return dataclasses.replace(
        problem,
        features=problem.features[chosen],
        target=problem.target[chosen],
        offset=None if problem.offset is None else problem.offset[chosen],
        unseen=problem.unseen[chosen],
    )


def _energy(rows: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return ((rows.double() @ metric) * rows.double()).sum()


def _with_section(page: str, heading: str, body: str) -> str:
    """Put a section into a page, in the place of the one of the same heading, else at the end."""
    _, *parts = page.split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    sections[heading] = f"\n{body.strip()}\n"
    kept = [f"## {title}\n\n{text.strip()}\n" for title, text in sections.items()]
    return "\n".join([f"{TITLE}\n", *kept])


if __name__ == "__main__":
    typer.run(main)
