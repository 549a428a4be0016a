"""Compare what ADMM and data-metric SVD leave of each layer's objective, on patches that neither saw.

    python -m tools.objectives --model ../shared/models/resnet20_cifar10.onnx \
        --calib ../shared/data/cifar10/calib --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

For every layer and every budget, both get the same original patches and the same allowance. A fifth of
the images is kept from both; the error after the activation on these is printed, without the output
metric (the objective of the paper) and with it. Writes docs/objectives.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track

from converter.calibration.record import Recorder
from converter.calibration.sets import open_calibration_set
from converter.config import CalibrationSettings, Runtime, preprocessing_from_options
from converter.fitting import allowance_of, problem_of
from converter.model_file import load_model, write_text_atomically
from converter.runtime import model_inputs
from converter.sensitivity import output_metrics
from converter.solver.admm import Admm
from converter.solver.factorize import data_svd
from converter.solver.problem import Problem
from converter.solver.prox import activate
from converter.solver.solution import Solution
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import find_layers
from passes.normalise import normalising

ROOT = Path(__file__).resolve().parent.parent
SHARES = (1 / 2, 1 / 4, 1 / 8)


def main(
    model: Annotated[Path, typer.Option(help="An ONNX model.")],
    calib: Annotated[Path, typer.Option(help="A folder of images.")],
    preset: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    mean: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    std: Annotated[str | None, typer.Option(help="As in twofold convert.")] = None,
    images: Annotated[int, typer.Option(help="Images, of which a fifth is kept back.")] = 800,
    patches: Annotated[int, typer.Option(help="Patches for each layer.")] = 8192,
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs" / "objectives.md",
) -> None:
    """Print and write the errors on unseen patches, layer by layer and budget by budget."""
    source = load_model(model)
    graph = import_graph(source)
    run_passes(graph, [*normalising(), FoldBatchNorm()])
    original = export_model(graph, source)
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    options = preprocessing_from_options(preset=preset, mean=mean, std=std)
    data = open_calibration_set(calib, model_inputs(source), options, images=images)
    recorder = Recorder(data, CalibrationSettings(patches=patches), Runtime())
    samples = recorder.originals(original, layers)
    channel_axis = {layer.response: 1 if layer.op == "Conv" else -1 for layer in layers}
    metrics = output_metrics(original, channel_axis, data).metric
    rows: list[tuple[str, float, str, float, float, str]] = []
    for layer in track(layers, "fit layers"):
        sample = samples[layer.name]
        inputs = recorder.inputs(original, layer, sample)
        image = torch.arange(len(inputs.features)) // sample.positions.shape[1]
        for label, metric in (("paper's", None), ("output", metrics[layer.response])):
            whole = problem_of(layer, sample, inputs, metric, "cpu")
            known, unknown = _rows(whole, image % 5 != 4), _rows(whole, image % 5 == 4)
            for share in SHARES:
                rank = int(share * whole.weight.numel() / sum(whole.weight.shape))
                allowance = allowance_of(layer, rank)
                most = allowance.rank_beside(0, min(whole.weight.shape))
                if not most:
                    continue
                linear, ours = data_svd(known, most), Admm().solve(known, allowance)
                found = f"r {ours.rank}, s {len(ours.support)}"
                errors = [_error(unknown, solution) for solution in (linear, ours)]
                rows.append((layer.name, share, label, errors[0], errors[1], found))
    page = _page(model, images, patches, rows)
    write_text_atomically(out, page)
    print(page)


def _rows(problem: Problem, chosen: torch.Tensor) -> Problem:
    return dataclasses.replace(
        problem,
        features=problem.features[chosen],
        target=problem.target[chosen],
        offset=None if problem.offset is None else problem.offset[chosen],
        unseen=problem.unseen[chosen],
    )


def _error(problem: Problem, solution: Solution) -> float:
    """Relative squared error after the activation, from the deployed weights."""
    dense = solution.weight(problem.channels)
    if problem.basis is None:
        on_features = dense
    else:  # the weights lie in the row space of the basis
        on_features = torch.linalg.lstsq(
            problem.basis.T.double(), dense.T.double()
        ).solution.T.float()
    response = problem.features @ on_features.T + solution.bias
    if problem.offset is not None:
        response = response + problem.offset
    wanted = activate(problem.activation, problem.target)
    missed = activate(problem.activation, response) - wanted
    metric = np.eye(missed.shape[1]) if problem.metric is None else problem.metric.numpy()
    weights = torch.from_numpy(metric)
    spread = wanted - wanted.mean(0)
    return float(_energy(missed, weights) / _energy(spread, weights))


def _energy(rows: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return ((rows.double() @ metric) * rows.double()).sum()


def _page(
    model: Path, images: int, patches: int, rows: list[tuple[str, float, str, float, float, str]]
) -> str:
    lower = sum(ours <= linear for _, _, _, linear, ours, _ in rows)
    lines = [
        "# ADMM against data-metric SVD, on unseen patches",
        "",
        f"Written by `python -m tools.objectives --model {model.name} --images {images} "
        f"--patches {patches} …`:",
        f"{images} images, up to {patches:,}",
        "patches for each layer, a fifth of the images kept from both. The error is that after the",
        "activation, relative and squared, in the paper's objective and in the metric of the output.",
        "",
        f"ADMM is at or below data-metric SVD in {lower} of {len(rows)} cases.",
        "",
        "| layer | share of the cost | objective | data-metric SVD | ADMM | chosen |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {share:g} | {label} | {linear:.5f} | {ours:.5f} | {found} |"
        for name, share, label, linear, ours, found in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
