"""Milliseconds of layers: whose each node is, what is read off, and what is measured only once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from converter.config import Runtime, Target
from converter.planner import milliseconds
from converter.planner.measurements import Measurements
from converter.planner.milliseconds import LatencyModel, Point, measure_layers
from converter.schemes.form import KEEP, Form
from passes.base import run_passes
from passes.exchange import import_graph
from passes.layers import Layer, find_layers
from passes.normalise import InferShapes
from passes.split import Branches, Factor

TARGET = Target(Runtime(threads=1), batch=2)
SIZE = 24
FEEDS = {"x": np.ones((2, 16, SIZE, SIZE), np.float32)}
WIDE = 64


def network(*, blocks: int = 2) -> onnx.ModelProto:
    """Conv, then residual blocks that are alike, then a Gemm: all that attribution has to tell apart."""
    generator = np.random.default_rng(0)
    weights = []

    def weight(name: str, *shape: int) -> str:
        values = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(source: str, name: str, channels: int) -> onnx.NodeProto:
        inputs = [source, weight(f"{name}.w", WIDE, channels, 3, 3), weight(f"{name}.b", WIDE)]
        return helper.make_node("Conv", inputs, [name], name=f"node/{name}", pads=[1, 1, 1, 1])

    nodes = [conv("x", "stem", 16), helper.make_node("Relu", ["stem"], ["r0"])]
    for index in range(blocks):
        nodes += [
            conv(f"r{index}", f"first{index}", WIDE),
            helper.make_node("Relu", [f"first{index}"], [f"inner{index}"]),
            conv(f"inner{index}", f"second{index}", WIDE),
            helper.make_node("Add", [f"second{index}", f"r{index}"], [f"sum{index}"]),
            helper.make_node("Relu", [f"sum{index}"], [f"r{index + 1}"]),
        ]
    last = f"r{blocks}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", weight("head.w", 32, WIDE)], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 16, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 32])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    graph = import_graph(model)
    run_passes(graph, [InferShapes()])
    return find_layers(graph)


def replace(layer: Layer, form: Form) -> Branches:
    assert layer.weight is not None
    outputs, channels, *kernel = layer.weight.shape

    def weight(*shape: int) -> NDArray[np.float32]:
        return np.full(shape, 0.01, np.float32)

    support = sparse = None
    factors: tuple[Factor, ...] = ()
    if form.support:
        support = np.arange(form.support, dtype=np.int64) * 2
        sparse = weight(outputs, form.support, *kernel)
    if form.ranks:
        (rank,) = form.ranks
        down = Factor(weight(rank, channels, *kernel), tuple(range(len(kernel))))
        factors = (down, Factor(weight(outputs, rank, *[1] * len(kernel))))
    return Branches(support, sparse, factors, weight(outputs, 1)[:, 0])


def channel(layer: Layer, rank: int, support: int = 0) -> Point:
    assert layer.weight is not None
    outputs, columns = len(layer.weight), layer.weight[0].size
    return Form("channel", (rank,), support), float(rank * (columns + outputs))


def points_of(layers: tuple[Layer, ...], *ranks: int) -> dict[str, list[Point]]:
    return {layer.name: [channel(layer, rank) for rank in ranks] for layer in layers}


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milliseconds, "_RUN_SECONDS", 0.03)
    monkeypatch.setattr(milliseconds, "_ALONE_SECONDS", 0.03)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each model that is profiled, in order; the chain of idle nodes is not listed."""
    found = []
    profiled = milliseconds._profiled

    def counted(model: onnx.ModelProto, *others: object) -> milliseconds._Profile:
        if model.graph.name != "idle":
            found.append(len(model.graph.node))
        return profiled(model, *others)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(milliseconds, "_profiled", counted)
    return found


def measure(
    model: onnx.ModelProto,
    folder: Path,
    points: dict[str, list[Point]],
    *,
    alone: bool = False,
) -> LatencyModel:
    cache = Measurements(folder)
    return measure_layers(
        model, layers_of(model), points, replace, FEEDS, TARGET, cache, alone=alone
    )


@pytest.mark.parametrize("alone", [False, True])
def test_less_work_reads_as_less_time(tmp_path: Path, alone: bool) -> None:
    model = network(blocks=1)
    layers = layers_of(model)
    found = measure(model, tmp_path, points_of(layers, 4, 32), alone=alone)
    assert not [note for note in found.notes if "does not show" in note]
    large = layers[1]
    kept = found.layer_ms(large.name, KEEP, 0.0)
    small = found.layer_ms(large.name, *channel(large, 4))
    assert kept is not None
    assert small is not None
    assert 0 < small < 0.6 * kept  # a tenth of the work, with room for a busy machine
    parts = [found.layer_ms(layer.name, KEEP, 0.0) or 0.0 for layer in layers]
    assert found.original_ms == pytest.approx(found.rest_ms + sum(parts))
    assert found.layer_ms(large.name, Form("spatial", (8,)), 1e6) is None
    assert found.layer_ms("no such layer", KEEP, 0.0) is None


def test_a_second_plan_runs_the_original_alone(tmp_path: Path, sessions: list[int]) -> None:
    model = network(blocks=1)
    points = points_of(layers_of(model), 8, 16)
    first = measure(model, tmp_path, points)
    assert len(sessions) == 3
    sessions.clear()
    second = measure(model, tmp_path, points)
    assert sessions == [len(model.graph.node)]
    assert {name: sorted(each) for name, each in second.curves.items()} == {
        name: sorted(each) for name, each in first.curves.items()
    }


def test_layers_that_are_alike_share_their_measurements(
    tmp_path: Path, sessions: list[int]
) -> None:
    model = network(blocks=3)
    layers = layers_of(model)
    blocks = tuple(layer for layer in layers if layer.name.startswith("node/second"))
    found = measure(model, tmp_path, points_of(blocks, 4, 8, 16))
    # the first two alike feed a Conv and an Add, the last one a pooling
    assert len(sessions) == 1 + 3
    alike = [found.curves[layer.name]["channel"] for layer in blocks[:2]]
    np.testing.assert_array_equal(alike[0], alike[1])
    sessions.clear()
    larger = network(blocks=4)
    more = [layer for layer in layers_of(larger) if layer.name.startswith("node/second")]
    measure(larger, tmp_path, points_of(tuple(more), 4, 8, 16))
    assert len(sessions) == 1


def test_alone_only_the_original_is_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(blocks=1)
    points = points_of(layers_of(model), 8)
    measure(model, tmp_path, points, alone=True)
    timed = []
    measure_latency = milliseconds.measure_latency
    monkeypatch.setattr(
        milliseconds,
        "measure_latency",
        lambda models, *args, **options: (
            timed.append(list(models)) or measure_latency(models, *args, **options)
        ),
    )
    measure(model, tmp_path, points, alone=True)
    assert timed == [["original"]]


@pytest.mark.parametrize("support", [0, 6, 16])
def test_every_node_of_the_optimised_graph_is_counted_once(support: int) -> None:
    model = network()
    layers = layers_of(model)
    forms = {layer.name: channel(layer, 6, min(support, 8))[0] for layer in layers}
    changed = milliseconds._with_forms(model, layers, forms, replace)
    profile = milliseconds._profiled(changed, FEEDS, TARGET.runtime, 0.01)
    times = milliseconds._by_layer(profile, layers, 0.0)
    assert set(times) == {layer.name for layer in layers}
    assert {node.name for node in profile.graph.node} == set(profile.nodes)
    free = [
        node
        for node in profile.graph.node
        if milliseconds._Owners(layers).of_node(node) is None
        and node.op_type not in ("ReorderInput", "ReorderOutput")
    ]
    assert {node.op_type for node in free} == {"GlobalAveragePool", "Flatten"}
    rest = profile.total(0.0) - sum(times.values())
    assert rest >= sum(profile.nodes[node.name] for node in free) - 1e-9
    assert rest < 0.5 * profile.total(0.0)


def test_reorders_belong_to_those_who_ask_for_them() -> None:
    layers = [layer for layer in layers_of(network(blocks=1)) if layer.op == "Conv"]
    stem, first, second = layers
    nodes = [
        helper.make_node("Conv", ["x"], ["token0"], name="r0_nchwc"),
        helper.make_node("ReorderOutput", ["token0"], ["r0"], name="ReorderOutput"),
        helper.make_node(
            "Gather", ["r0"], ["node/first0/gather_output"], name="node/first0/gather_output"
        ),
        helper.make_node(
            "ReorderInput", ["node/first0/gather_output"], ["token1"], name="ReorderInput"
        ),
        helper.make_node("Conv", ["token1", "r0"], ["token2"], name="inner0_nchwc"),
        helper.make_node("Conv", ["token2", "r0"], ["token3"], name="sum0_nchwc"),
        helper.make_node("ReorderOutput", ["token3"], ["r1"], name="ReorderOutput_token_4"),
        helper.make_node("GlobalAveragePool", ["r1"], ["pooled"], name="pooled"),
    ]
    graph = helper.make_graph(nodes, "optimised", [], [])
    times = {node.name: float(2**index) for index, node in enumerate(nodes)}
    profile = milliseconds._Profile(graph, times, 1.0)
    # the first reorder is read by two layers, the last one by no layer
    assert milliseconds._by_layer(profile, layers, 0.0) == {
        stem.name: 1.0,
        first.name: 0.5 * 2 + 4 + 8 + 16,
        second.name: 0.5 * 2 + 32,
    }


def test_a_layer_without_a_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_layer = milliseconds._by_layer

    def forgetful(*args: object) -> dict[str, float]:
        times = by_layer(*args)  # type: ignore[arg-type]  # passed on
        return {name: value for name, value in times.items() if name != "node/stem"}

    monkeypatch.setattr(milliseconds, "_by_layer", forgetful)
    found = measure(network(blocks=1), tmp_path, {})
    assert [note for note in found.notes if "the time of node/stem," in note]
    assert found.layer_ms("node/stem", KEEP, 0.0) is None
    assert found.layer_ms("node/first0", KEEP, 0.0) is not None


def test_milliseconds_are_linear_between_and_beyond_points() -> None:
    curves = {
        "a": {
            "keep": (np.array([0.0]), np.array([9.0])),
            "channel": (np.array([10.0, 20.0, 40.0]), np.array([3.0, 5.0, 6.0])),
            "tucker": (np.array([10.0, 20.0]), np.array([5.0, 4.0])),
        }
    }
    model = LatencyModel(1.0, curves, ())
    form = Form("channel", (1,))
    expected = {10.0: 3.0, 15.0: 4.0, 20.0: 5.0, 40.0: 6.0, 60.0: 7.0, 5.0: 2.0, -20.0: 0.0}
    for macs, taken in expected.items():
        assert model.layer_ms("a", form, macs) == pytest.approx(taken)
    assert model.layer_ms("a", KEEP, 123.0) == 9.0
    assert model.original_ms == 10.0
    # two points that noise has turned round do not go on so
    assert model.layer_ms("a", Form("tucker", (1, 1)), 0.0) == 5.0
    assert model.layer_ms("a", Form("tucker", (1, 1)), 100.0) == 4.0


def test_points_of_equal_work_are_averaged() -> None:
    macs, taken = milliseconds._curve([(2.0, 4.0), (1.0, 1.0), (2.0, 6.0)])
    np.testing.assert_array_equal(macs, [1.0, 2.0])
    np.testing.assert_array_equal(taken, [1.0, 5.0])


def test_overhead_and_factor_are_found_in_spite_of_a_disturbed_session() -> None:
    generator = np.random.default_rng(0)
    empty = onnx.GraphProto()
    profiles = []
    for count in (20, 35, 50, 80, 110, 140):
        real = generator.uniform(0.002, 0.05, count)
        nodes = {str(index): value + 0.006 for index, value in enumerate(real)}
        profiles.append(milliseconds._Profile(empty, nodes, 1.1 * float(real.sum())))
    disturbed = milliseconds._Profile(empty, profiles[0].nodes, 4 * profiles[0].wall_ms)
    overhead, factor = milliseconds._fitted([*profiles, disturbed], expected=0.004)
    assert overhead == pytest.approx(0.006, rel=0.1)
    assert factor == pytest.approx(1.1, rel=0.05)


def test_a_busy_machine_is_noted_but_not_for_tiny_models() -> None:
    (note,) = milliseconds._doubts(2.5, 10.0)
    assert "2.5 times" in note
    assert milliseconds._doubts(1.1, 10.0) == ()
    assert milliseconds._doubts(2.5, 0.05) == ()


def test_with_one_session_the_chain_is_believed() -> None:
    profile = milliseconds._Profile(onnx.GraphProto(), {"a": 1.004, "b": 2.004}, 6.0)
    overhead, factor = milliseconds._fitted([profile], expected=0.004)
    assert overhead == 0.004
    assert factor == pytest.approx(2.0)
