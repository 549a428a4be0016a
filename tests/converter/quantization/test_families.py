"""Families that plans do without where int8 follows; the clocks are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
import pytest

from converter.latency import Timing
from converter.pace import Paced
from converter.preparation import Prepared
from converter.progress import SILENT
from converter.quantization import families as module
from converter.quantization.families import suited_to_int8
from tests.converter.two_layers import paced

ONE, SEVERAL = "depthwise", "depthwise ×2"


def forms_of(timed: Paced) -> set[str]:
    return {one.form.family for each in timed.candidates.values() for one in each}


def preferring(timed: Paced, *families: str, by: float) -> Paced:
    """Divide the effect of forms, so that plans take them."""
    candidates = {
        name: tuple(
            dataclasses.replace(one, effect=one.effect / by) if one.form.family in families else one
            for one in each
        )
        for name, each in timed.candidates.items()
    }
    return dataclasses.replace(timed, candidates=candidates)


def clock(
    monkeypatch: pytest.MonkeyPatch, milliseconds: Mapping[tuple[str, ...], float]
) -> dict[str, onnx.ModelProto]:
    """Give made-up times by what a plan does without; the models that were timed."""
    seen: dict[str, onnx.ModelProto] = {}

    def measure(models: Mapping[str, onnx.ModelProto], *_: object, **__: object) -> object:
        seen.update(models)
        found = {}
        for name in models:
            left_out, _, types = name.removeprefix("without ").partition(", ")
            ms = milliseconds[() if left_out == "nothing" else tuple(left_out.split(" and "))]
            ms *= 1.0 if types == "u8 × s8" else 1.5  # the faster types count
            found[name] = Timing(ms, ms, ms, 1, (ms,) * 12, 1, "cpu", 1, True, True)
        return found

    monkeypatch.setattr(module, "measure_latency", measure)
    return seen


def test_families_that_int8_slows_down_are_left_out_and_named(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    clock(monkeypatch, {(): 5, (SEVERAL,): 4.8, (ONE, SEVERAL): 2})
    found = suited_to_int8(prepared, timed, SILENT)
    assert {ONE, SEVERAL} <= forms_of(timed)
    assert forms_of(found) == forms_of(timed) - {ONE, SEVERAL}
    assert "plans do without depthwise and depthwise ×2: in int8 at batch 1" in found.model.notes[0]
    assert "one with them took 2.50 times as long as one without" in found.model.notes[0]


def test_several_filters_may_go_alone(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = preferring(paced(prepared, 1e-6), SEVERAL, by=4.0)
    clock(monkeypatch, {(): 9, (SEVERAL,): 1, (ONE, SEVERAL): 1})
    found = suited_to_int8(prepared, timed, SILENT)
    assert forms_of(found) == forms_of(timed) - {SEVERAL}


def test_speed_that_is_not_worth_its_error_changes_nothing(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=100.0)
    clock(monkeypatch, {(): 5, (SEVERAL,): 5, (ONE, SEVERAL): 2.5})
    assert suited_to_int8(prepared, timed, SILENT) is timed


def test_plans_are_timed_in_integers_and_at_no_more_multiply_accumulates(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    seen = clock(monkeypatch, {(): 5, (SEVERAL,): 5, (ONE, SEVERAL): 5})
    suited_to_int8(prepared, timed, SILENT)
    plans = module._plans(timed.candidates)
    assert len(plans) >= 2
    assert len(seen) == 2 * len(plans), "in two pairs of types"
    for model in seen.values():
        assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert not any(node.op_type == "QuantizeLinear" for node in prepared.original.graph.node)
    assert all(plan.totals["macs"] <= plans[()].totals["macs"] for plan in plans.values())
    for left_out, plan in plans.items():
        assert {each.form.family for each in plan.chosen.values()}.isdisjoint(left_out)


def test_plans_that_use_no_such_family_are_not_timed(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    without = module._without(timed.candidates, (ONE, SEVERAL))
    timed = dataclasses.replace(timed, candidates=without)
    seen = clock(monkeypatch, {})
    assert suited_to_int8(prepared, timed, SILENT) is timed
    assert not seen


def test_real_plans_are_timed(prepared: Prepared) -> None:
    """Whatever this machine says, what comes back can be planned with."""
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    feeds = {"x": next(iter(prepared.sample.values()))}
    found = suited_to_int8(prepared, dataclasses.replace(timed, feeds=feeds), SILENT)
    assert all(each[0].form.scheme == "keep" for each in found.candidates.values())
