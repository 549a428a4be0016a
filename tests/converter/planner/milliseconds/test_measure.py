"""What measuring gives, and what is measured only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converter.latency import measure_latency
from converter.planner.measurements import Measurements
from converter.planner.milliseconds import alone, in_place
from converter.planner.milliseconds.forms import Point
from converter.planner.milliseconds.measure import measure_layers
from converter.planner.milliseconds.model import LatencyModel
from converter.planner.milliseconds.owners import by_layer
from converter.planner.milliseconds.profiling import Profile, profiled
from converter.schemes.form import KEEP, Form
from tests.converter.planner.milliseconds.residual import (
    FEEDS,
    TARGET,
    channel,
    layers_of,
    network,
    points_of,
    replace,
)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "_RUN_SECONDS", 0.03)
    monkeypatch.setattr(alone, "_ALONE_SECONDS", 0.03)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each model that is profiled, in order; the chain of idle nodes is not listed."""
    found = []

    def counted(model: onnx.ModelProto, *others: Any) -> Profile:
        if model.graph.name != "idle":
            found.append(len(model.graph.node))
        return profiled(model, *others)

    monkeypatch.setattr(in_place, "profiled", counted)
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
    large = layers[1]
    shares = []
    for reading in range(3):  # a busy machine may spoil one, as for a model that seems slower
        found = measure(model, tmp_path / str(reading), points_of(layers, 4, 32), alone=alone)
        assert not [note for note in found.notes if "does not show" in note]
        kept = found.layer_ms(large.name, KEEP, 0.0)
        small = found.layer_ms(large.name, *channel(large, 4))
        assert kept is not None
        assert small is not None
        assert small > 0
        shares.append(small / kept)
        if shares[-1] < 0.6:
            break
    assert shares[-1] < 0.6, shares  # a tenth of the work
    parts = [found.layer_ms(layer.name, KEEP, 0.0) or 0.0 for layer in layers]
    assert found.original_ms == pytest.approx(found.rest_ms + sum(parts))
    assert found.layer_ms(large.name, Form("spatial", (8,)), 1e6) is None
    assert found.layer_ms("no such layer", KEEP, 0.0) is None


def test_alone_weights_that_are_inputs_too_are_not_fed(tmp_path: Path) -> None:
    model = network(blocks=1)
    for tensor in model.graph.initializer:
        kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(kind)
    model.ir_version = 3
    layers = layers_of(model)
    found = measure(model, tmp_path, points_of(layers, 4), alone=True)
    assert set(found.curves) == {layer.name for layer in layers}


@pytest.mark.parametrize(("room", "together"), [(1, 2), (2**40, 5)])
def test_alone_so_many_forms_are_open_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, together: int
) -> None:
    model, opened = network(blocks=1), []

    def counted(models: Any, *given: Any, **settings: Any) -> Any:
        opened.append(len(models))
        return measure_latency(models, *given, **settings)

    monkeypatch.setattr(alone, "_TOGETHER_BYTES", room)
    monkeypatch.setattr(alone, "measure_latency", counted)
    layers = layers_of(model)
    found = measure(model, tmp_path, points_of(layers, 4, 8, 16), alone=True)
    assert max(opened) == together  # one that does nothing, and the layer as it is
    forms = [channel(layers[1], rank) for rank in (4, 8, 16)]
    assert all(found.layer_ms(layers[1].name, *form) is not None for form in forms)


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


def test_forms_measured_at_another_pace_are_told_apart_from_slower_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node takes 1 ms, or 2 where the machine is half as fast; a form has two."""
    pace = 1.0

    def at_pace(model: onnx.ModelProto, *others: Any) -> Profile:
        found = profiled(model, *others)
        return Profile(found.graph, dict.fromkeys(found.nodes, pace), pace * len(found.nodes))

    monkeypatch.setattr(in_place, "profiled", at_pace)
    monkeypatch.setattr(in_place, "profile_overhead", lambda _: 0.0)
    model = network(blocks=1)
    large = layers_of(model)[1]
    early, late = channel(large, 16), channel(large, 32)

    def ratios(now: float, *points: Point) -> list[float]:
        nonlocal pace
        pace = now
        found = measure(model, tmp_path, {large.name: list(points)})
        kept = found.layer_ms(large.name, KEEP, 0.0)
        times = [found.layer_ms(large.name, *each) for each in points]
        assert kept
        return [taken / kept for taken in times if taken]

    assert ratios(1.0, early) == pytest.approx([2.0])
    for now in (2.0, 2.0, 1.0):  # the second of them is at the pace of the plan before
        assert ratios(now, early, late) == pytest.approx([2.0, 2.0])


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
    monkeypatch.setattr(
        alone,
        "measure_latency",
        lambda models, *args, **options: (
            timed.append(list(models)) or measure_latency(models, *args, **options)
        ),
    )
    measure(model, tmp_path, points, alone=True)
    assert timed == [["original"]]


def test_a_layer_without_a_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any) -> dict[str, float]:
        times = by_layer(*args)
        return {name: value for name, value in times.items() if name != "node/stem"}

    monkeypatch.setattr(in_place, "by_layer", forgetful)
    found = measure(network(blocks=1), tmp_path, {})
    assert [note for note in found.notes if "the time of node/stem," in note]
    assert found.layer_ms("node/stem", KEEP, 0.0) is None
    assert found.layer_ms("node/first0", KEEP, 0.0) is not None
