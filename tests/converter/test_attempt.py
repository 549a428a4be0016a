"""A plan that was carried out, and layers that were put back."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from converter import attempt as module
from converter.attempt import Attempt, attempt, meet
from converter.calibration.opening import open_calibration_set
from converter.config import (
    Budget,
    CalibrationSettings,
    Preprocessing,
    Runtime,
    SolverSettings,
)
from converter.errors import ConfigError
from converter.model_file import load_model, save_model
from converter.outcome import Latency
from converter.pace import plan
from converter.planner.cost import count_cost
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT
from converter.realisation import rewritten
from converter.runtime import model_inputs

TEXT = """<ir_version: 8, opset_import: ["": 17]>
net (float[n, 3, 8, 8] image) => (float[n, 12, 8, 8] y) {
    [first] a = Conv<pads = [1, 1, 1, 1]>(image, w1)
    b = Relu(a)
    [second] y = Conv<pads = [1, 1, 1, 1]>(b, w2)
}"""
SOLVER = SolverSettings(name="data-svd")
LATENCY = Latency("cpu", 1, 1, 2.0, 1.0, 2.0, 1.9, 2.1, 1.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in (("w1", (12, 3, 3, 3)), ("w2", (12, 12, 3, 3))):
        weight = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    folder = tmp_path_factory.mktemp("attempt")
    path, file = folder / "net.onnx", folder / "images.npy"
    save_model(model, path)
    np.save(file, random.normal(size=(32, 3, 8, 8)).astype(np.float32))
    return prepare(
        path,
        open_calibration_set(file, model_inputs(model), Preprocessing()),
        calibration=CalibrationSettings(batch=16, patches=512),
        solver=SOLVER,
        runtime=Runtime(threads=1),
        progress=SILENT,
        clock=Clock(),
    )


def test_without_timing_the_plan_is_the_result(prepared: Prepared) -> None:
    choice, clock = plan(prepared, None, Budget(macs=4)), Clock()
    done = attempt(prepared, None, choice, SOLVER, SILENT, clock, trade=True)
    assert (done.replaced, done.put_back, done.latency, done.notes) == (2, 0, None, ())
    assert all(layer.ms_before is layer.ms_after is None for layer in done.layers)
    assert prepared.cost.macs / done.cost.macs >= 4
    assert done.cost == count_cost(done.model, prepared.sample, label="it")
    assert [stage.name for stage in clock.stages()] == ["fit layers"]


@pytest.mark.parametrize(
    ("readings", "lost", "budget", "asked", "shipped", "note"),
    [
        ([3.1], [0], Budget(speedup=3), [1.0], 0, None),
        ([2.5, 3.2], [0, 0], Budget(speedup=3), [1.0, 1.2], 1, "planned twice"),
        ([2.5, 2.4], [0, 0], Budget(speedup=3), [1.0, 1.2], 0, "2.50 and 2.40"),
        ([2.5, 2.8], [0, 0], Budget(speedup=3), [1.0, 1.2], 1, "is missed"),
        ([2.5, 4.1], [0, 0], Budget(latency_ms=0.5), [1.0, 1.6], 1, "planned twice"),
        ([2.5, None], [0, 0], Budget(speedup=3), [1.0, 1.2], 0, "is missed"),
        ([3.1], [1], Budget(speedup=3), [1.0], 0, None),
        ([1.2], [0], Budget(macs=3), [1.0], 0, None),
        ([1.0, 1.3], [2, 0], Budget(macs=3), [1.0, 1.0], 1, "1.00 and 1.30"),
        ([1.4, 1.3], [1, 0], Budget(params=3), [1.0, 1.0], 1, "planned twice"),
        ([1.2, 1.0], [1, 2], Budget(macs=3), [1.0, 1.0], 0, "planned twice"),
        ([1.2, 1.1], [2, 1], Budget(macs=3), [1.0, 1.0], 1, "planned twice"),
        ([1.0, 2.1], [3, 0], Budget(speedup=2), [1.0, 1.0], 1, "planned twice"),
        ([1.4, 1.3], [1, 0], Budget(macs=3, speedup=1.2), [1.0, 1.0], 1, "planned twice"),
    ],
)
@pytest.mark.parametrize("other", [True, False], ids=["another plan", "the same plan"])
def test_a_plan_that_is_too_slow_is_made_again(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    other: bool,
    readings: list[float | None],
    lost: list[int],
    budget: Budget,
    asked: list[float],
    shipped: int,
    note: str | None,
) -> None:
    plans: list[float] = []
    attempts: list[Attempt] = []
    fitted: Any = object()

    def planned(*_: object, more: float) -> object:
        plans.append(more)
        if readings[len(attempts)] is None:
            raise ConfigError("out of reach")
        return SimpleNamespace(chosen=len(plans) if other else 0)

    def attempted(
        _prepared: Any, _paced: Any, choice: Any, *_: Any, trade: bool, realised: Any
    ) -> Attempt:
        assert trade == (not budget.timed)
        assert realised == (fitted if attempts and not other else None)
        ratio = readings[len(attempts)]
        assert ratio is not None
        latency = Latency("cpu", 1, 1, 2.0, 2.0 / ratio, ratio, ratio - 0.01, ratio + 0.01, 1.0)
        attempts.append(
            Attempt(
                model=prepared.original,
                cost=prepared.cost,
                replaced=int(ratio != 1.0),
                put_back=lost[len(attempts)],
                layers=(),
                passes=(),
                latency=latency,
                notes=(),
                choice=choice,
                realised=fitted,
            )
        )
        return attempts[-1]

    monkeypatch.setattr(module, "plan", planned)
    monkeypatch.setattr(module, "attempt", attempted)
    done = meet(prepared, None, budget, SOLVER, SILENT, Clock())
    assert plans == pytest.approx(asked)
    assert done.latency is attempts[shipped].latency
    assert (note is None) == (not done.notes)
    assert note is None or note in done.notes[0]


@pytest.mark.parametrize(("reads", "attempts"), [(1.2, 2), (0.9, 1)])
def test_a_plan_that_reads_slower_by_now_is_not_carried_out_again(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, reads: float, attempts: int
) -> None:
    done: list[Any] = []

    def attempted(*_: object, **__: object) -> Attempt:
        done.append(0)
        return Attempt(
            model=prepared.original,
            cost=prepared.cost,
            replaced=0,
            put_back=2,
            layers=(),
            passes=(),
            latency=dataclasses.replace(LATENCY, speedup=1.0),
            notes=(),
            choice=plan(prepared, None, Budget(macs=4)),
            realised=SimpleNamespace(),  # type: ignore[arg-type]  # nothing of it is read
        )

    monkeypatch.setattr(
        module, "plan", lambda prepared, _, budget, **__: plan(prepared, None, budget)
    )
    monkeypatch.setattr(module, "attempt", attempted)
    paced: Any = SimpleNamespace(predicted_speedup=lambda _: reads)
    meet(prepared, paced, Budget(macs=4), SOLVER, SILENT, Clock())
    assert len(done) == attempts


def test_a_budget_out_of_reach_is_refused(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, more: float) -> None:
        raise ConfigError(f"{more}")

    monkeypatch.setattr(module, "plan", refused)
    with pytest.raises(ConfigError):
        meet(prepared, None, Budget(speedup=3), SOLVER, SILENT, Clock())


@pytest.mark.parametrize("kept", [["first"], ["first", "second"], []])
def test_layers_that_do_not_pay_are_put_back(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    def never_slower(
        _prepared: object, _paced: object, _chosen: object, branches: Any, _model: object
    ) -> object:
        left = {name: branches[name] for name in kept}
        return rewritten(prepared, left) if left else None, left, LATENCY

    monkeypatch.setattr(module, "never_slower", never_slower)
    choice = plan(prepared, None, Budget(macs=4))
    choice.chosen["first"] = dataclasses.replace(choice.chosen["first"], ms=0.5)
    # one layer takes 2 ms as it is; the time of the other does not show
    before = {"first": 2.0, "second": 0.0}
    candidates = {
        name: (dataclasses.replace(each[0], ms=before[name]), *each[1:])
        for name, each in prepared.candidates.items()
    }
    paced: Any = SimpleNamespace(candidates=candidates)  # all that is looked into
    done = attempt(prepared, paced, choice, SOLVER, SILENT, Clock(), trade=False)
    assert (done.replaced, done.put_back) == (len(kept), 2 - len(kept))
    again = attempt(
        *(prepared, paced, choice, SOLVER, SILENT, Clock()), trade=False, realised=done.realised
    )
    assert again.realised is done.realised
    assert again.model == done.model
    assert done.latency is LATENCY
    by_name = {layer.name: layer for layer in done.layers}
    for name in ("first", "second"):
        assert (by_name[name].scheme == "kept") == (name not in kept)
    assert by_name["first"].ms_before == 2.0
    assert by_name["first"].ms_after == (0.5 if "first" in kept else 2.0)
    assert by_name["second"].ms_before is by_name["second"].ms_after is None
    assert done.choice is choice
    assert (done.model == load_model(prepared.path)) == (not kept)
    note = {0: "written as it is", 1: "1 layers were put back", 2: None}[len(kept)]
    assert [note in each for each in done.notes] == [True] * len(done.notes)
    assert len(done.notes) == (note is not None)
    assert sum(layer.macs_after for layer in done.layers) == done.cost.macs
