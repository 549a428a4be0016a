"""Convert random graphs, check every result, and write a section of docs/reliability.md.

    python -m tools.fuzz [--graphs 2000] [--seed 0]

Hypothesis draws the graphs (`tools.random_graphs`) in blocks that each have a seed of their own, so that an
interrupted run goes on and a failure can be drawn again. Of each graph it is checked that the passes, and all
layers replaced by branches that equal them (four schemes in turns, four ways), leave every output what it
was to round-off, under onnxruntime with and without its own optimiser. Some of the graphs are converted
whole and examined as in `tools.real_graphs`, but for its error: weights of full rank have no small ones. The
smallest graph that fails is kept beside the figures.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import typer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import integers
from numpy.typing import NDArray

from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.reorder_sums import ReorderSums
from tools.exact import in_rotation, split_all
from tools.random_graphs import random_graphs
from tools.real_graphs import Row, examine
from tools.reliability import FIGURES, load_figures, machine_line, save_figures, write_section

__all__ = ["Tally", "check_surgery", "main", "try_graphs"]

BLOCK = 100
CONVERTED_EVERY = 50
WAYS = ("low rank", "sparse", "parts", "overlap")
ROUND_OFF = 2e-4
"""Of the largest value of an output: sums of some hundred float32 numbers in other orders, through up to a
dozen layers, with branches that cancel each other."""


class Tally(Counter[str]):
    """How many graphs there were, and what became of them."""


def main(
    graphs: Annotated[int, typer.Option(min=1, help="How many.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first block.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Forget what earlier runs found.")] = False,
) -> None:
    """Try all of them; exit code 1 where one fails."""
    found = load_figures("fuzz", fresh=fresh)
    for start in range(0, graphs, BLOCK):
        key = f"{seed + start // BLOCK}"
        if key in found:
            continue
        started = time.monotonic()
        tally = try_graphs(BLOCK, int(key), failing=FIGURES / f"fuzz-{key}.onnx")
        found[key] = {**tally, "seconds": round(time.monotonic() - started, 1)}
        save_figures("fuzz", found)
        print(f"block {key}: {found[key]}", flush=True)
    total: Counter[str] = Counter()
    for each in found.values():
        total.update(each)
    write_section("Random graphs", _section(total, seed))


def try_graphs(
    count: int, seeded: int, *, convert: bool = True, failing: Path | None = None
) -> Tally:
    """Draw graphs from a seed and check them all; the first failure is shrunk, kept and raised.

    Parameters
    ----------
    count : int
    seeded : int
    convert : bool, default True
        Whether some are converted whole: those whose turn is 0.
    failing : Path or None, default None
        Where the smallest graph that fails goes.
    """
    tally = Tally()

    @seed(seeded)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(random_graphs(), integers(0, CONVERTED_EVERY - 1))
    def check(model: onnx.ModelProto, turn: int) -> None:
        tally["graphs"] += 1
        try:
            tally["layers"] += check_surgery(model, turn)
            if convert and turn == 0:
                tally[_examined(model)] += 1
        except Exception:  # whatever it is, the graph that did it is kept before it goes on
            if failing is not None:
                failing.parent.mkdir(parents=True, exist_ok=True)
                onnx.save(model, failing)
            raise

    check()
    return tally


def check_surgery(model: onnx.ModelProto, turn: int) -> int:
    """Replace all layers of a model by branches that equal them; return how many.

    Parameters
    ----------
    model : onnx.ModelProto
    turn : int
        Chooses the way and the first scheme.

    Raises
    ------
    AssertionError
        Where an output is another afterwards.
    """
    onnx.checker.check_model(model, full_check=True)
    feeds = _feeds(model)
    wanted = answers(model, feeds, optimise=False)
    changed, layers = split_all(model, in_rotation(WAYS[turn % len(WAYS)], turn))
    graph = import_graph(changed)
    run_passes(graph, [ReorderSums()])
    for each in (changed, export_model(graph, changed)):
        onnx.checker.check_model(each, full_check=True)
        assert each.graph.output == model.graph.output
        for optimise in (False, True):
            _require_equal(answers(each, feeds, optimise=optimise), wanted)
    return len(layers)


def _feeds(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    given = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name not in given:
            sides = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
            feeds[value.name] = random.normal(size=sides).astype(np.float32)
    return feeds


def answers(
    model: onnx.ModelProto, feeds: dict[str, NDArray[np.float32]], *, optimise: bool
) -> list[NDArray[np.float32]]:
    """Run a model on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(each) for each in session.run(None, feeds)]


def _require_equal(found: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape, f"output {number} has {one.shape}, not {other.shape}"
        difference = float(np.abs(one - other).max(initial=0))
        most = ROUND_OFF * max(float(np.abs(other).max(initial=0)), 1e-3)
        assert difference <= most, f"output {number} is off by {difference:.2g}, above {most:.2g}"


def _examined(model: onnx.ModelProto) -> str:
    """Convert a model whole; say what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        opset = model.opset_import[0].version
        row = Row("random", "random", "hypothesis", opset, judged=False)
        examine(row, path)
    assert row.wrong is None, row.wrong
    return "left alone" if row.left_alone else "converted"


def _section(total: Counter[str], seeded: int) -> list[str]:
    figures: dict[str, Any] = dict(total)
    return [
        f"`python -m tools.fuzz --graphs {figures['graphs']} --seed {seeded}`: graphs that hypothesis draws. "
        f"{machine_line()}.",
        "",
        f"- **{figures['graphs']:,} graphs with {figures['layers']:,} layers that were replaced exactly: 0 "
        "wrong results, 0 tracebacks**, each under onnxruntime with and",
        "  without its optimiser, before and after sums are reordered.",
        f"- {figures.get('converted', 0)} of them were converted whole and examined like the real "
        "graphs, but for their error; "
        f"{figures.get('left alone', 0)} more were left alone with a reason.",
        f"- {figures['seconds']:,.0f} seconds.",
    ]


if __name__ == "__main__":
    typer.run(main)
