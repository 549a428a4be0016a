"""What selects the channels of S faster, a Gather or a 1×1 Conv with a one-hot weight? Time both.

    python -m tools.selection [--network vgg16_cifar --network resnet20] [--batch 1 --batch 32]

Every Conv of more than one tap becomes `sparse + spatial` with random weights, once with either way to select
an eighth and a quarter of its channels, and once without S; the three take turns. A Gather is not in
onnxruntime's blocked layout, so that what it reads is reordered first; the Conv stays in it and multiplies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from converter.branches import branches_of_form
from converter.config import Runtime
from converter.geometry import geometry_of
from converter.latency import Timing, measure_latency, speedup
from converter.model_file import load_model
from converter.planner.cost import tensor_shapes
from converter.preparation import normalised_model
from converter.schemes.form import Form, Geometry
from models import NETWORKS, build, export_onnx, initialise
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import import_with_shapes
from passes.split import Split

__all__ = ["main"]

SECONDS, ROUNDS = 3.0, 24
SHARES = (8, 4)
"""Of the channels, one in so many is selected."""
BLOCK = 16
"""Ranks are a multiple of it, as in plans."""


def main(
    network: Annotated[list[str] | None, typer.Option(help="As `python -m models list`.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once.")] = None,
    threads: Annotated[int, typer.Option(help="0 takes all cores.")] = 0,
) -> None:
    """Time S beside L with either way to select its channels."""
    columns = ("network", "batch", "channels", "without S", "Gather", "1×1 Conv", "Gather faster")
    table = Table(*columns, box=None)  # narrow enough for 80 columns
    for name in network or ("vgg16_cifar", "resnet20"):
        side = NETWORKS[name].size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.onnx"
            net = build(name)
            initialise(net, 0, size=side)
            export_onnx(net, path, size=side)
            model = normalised_model(load_model(path), path)
        for images in batch or (1, 32):
            feeds = _images(model, images)
            for share in SHARES:
                times = _times(model, share, feeds, Runtime(threads=threads))
                ratio = speedup(times["conv"], times["gather"])
                table.add_row(
                    name, str(images), f"1/{share}",
                    *(f"{times[each].median_ms:.3g} ms" for each in ("without", "gather", "conv")),
                    f"{ratio.ratio:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
                )  # fmt: skip
    Console().print(table)


def _images(model: onnx.ModelProto, count: int) -> dict[str, NDArray[np.float32]]:
    (given,) = model.graph.input
    shape = [count, *(each.dim_value for each in given.type.tensor_type.shape.dim[1:])]
    return {given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def _times(
    model: onnx.ModelProto, share: int, feeds: dict[str, NDArray[np.float32]], runtime: Runtime
) -> Mapping[str, Timing]:
    """Time the network with S selected by either, and without S, in turns."""
    layers = [
        layer
        for layer in find_layers(import_with_shapes(model))
        if layer.reason is None and layer.weight is not None and layer.weight[0, 0].size > 1
        if layer.weight.shape[1] // share > 0
    ]
    sample = {name: feed[:1] for name, feed in feeds.items()}
    named = [name for layer in layers for name in (layer.input, layer.response)]
    shapes = tensor_shapes(model, sample, named)
    geometries = {
        layer.name: geometry_of(layer, shapes[layer.input][2:], shapes[layer.response][2:])
        for layer in layers
    }
    networks = {
        "without": _network(model, layers, geometries, 0, "gather"),
        "gather": _network(model, layers, geometries, share, "gather"),
        "conv": _network(model, layers, geometries, share, "conv"),
    }
    return measure_latency(networks, feeds, runtime, seconds=SECONDS, rounds=ROUNDS)


def _network(
    model: onnx.ModelProto,
    layers: list[Layer],
    geometries: Mapping[str, Geometry],
    share: int,
    select: Literal["gather", "conv"],
) -> onnx.ModelProto:
    """Write each layer as L of a quarter of its outputs, with S of a share of its channels beside it."""
    graph = import_graph(model)
    for layer in layers:
        geometry = geometries[layer.name]
        rank = max(BLOCK, geometry.outputs // 4 // BLOCK * BLOCK)
        form = Form("spatial", (rank,), geometry.channels // share if share else 0)
        branches = replace(branches_of_form(geometry, form), select=select)
        run_passes(graph, [Split(layer, branches)])
    return export_model(graph, model)


if __name__ == "__main__":
    typer.run(main)
