"""Families that plans do without where int8 follows; the clocks are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import pytest

from converter.errors import ModelError
from converter.latency import Timing
from converter.pace import Paced
from converter.preparation import Prepared
from converter.progress import SILENT
from converter.quantization import families as module
from converter.quantization import integers
from converter.quantization.families import ALL, slow_in_int8, without
from converter.quantization.integers import Arithmetic
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
    found = slow_in_int8(prepared, timed, SILENT)
    assert found.families == (ONE, SEVERAL)
    (note,) = found.notes
    assert "plans do without depthwise and depthwise ×2: in int8 at batch 1" in note
    assert "one with them took 2.50 times as long as one without" in note
    assert {ONE, SEVERAL} <= forms_of(timed)
    assert forms_of(without(timed, found.families)) == forms_of(timed) - {ONE, SEVERAL}


def test_several_filters_may_go_alone(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """One filter has to cost clearly more to go too."""
    timed = preferring(paced(prepared, 1e-6), SEVERAL, by=3.0)
    timed = preferring(timed, ONE, by=1.5)
    assert len(module._plans(timed.candidates)) == 3
    clock(monkeypatch, {(): 9, (SEVERAL,): 1, (ONE, SEVERAL): 1})
    assert slow_in_int8(prepared, timed, SILENT).families == (SEVERAL,)


def test_speed_that_is_not_worth_its_error_changes_nothing(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=100.0)
    clock(monkeypatch, {(): 5, (SEVERAL,): 5, (ONE, SEVERAL): 2.5})
    assert slow_in_int8(prepared, timed, SILENT) == ALL


def test_plans_are_timed_in_integers_and_at_no_more_multiply_accumulates(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    seen = clock(monkeypatch, {(): 5, (SEVERAL,): 5, (ONE, SEVERAL): 5})
    slow_in_int8(prepared, timed, SILENT)
    plans = module._plans(timed.candidates)
    assert len(plans) >= 2
    assert len(seen) == 2 * len(plans), "in two pairs of types"
    for model in seen.values():
        assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert not any(node.op_type == "QuantizeLinear" for node in prepared.original.graph.node)
    assert all(plan.totals["macs"] <= plans[()].totals["macs"] for plan in plans.values())
    for left_out, plan in plans.items():
        assert {each.form.family for each in plan.chosen.values()}.isdisjoint(left_out)


def test_families_that_a_plan_has_no_use_for_are_not_timed(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = without(paced(prepared, 1e-6), (ONE, SEVERAL))
    seen = clock(monkeypatch, {})
    assert slow_in_int8(prepared, timed, SILENT) == ALL
    assert not seen


def test_what_budgets_cannot_do_without_stays(prepared: Prepared) -> None:
    """Where nothing else is offered, cheap plans are made of filters alone."""
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    alone = without(timed, tuple(forms_of(timed) - {"keep", ONE, SEVERAL}))
    assert list(module._plans(alone.candidates)) in ([()], [(), (SEVERAL,)])


@pytest.mark.parametrize("refused", ["u8 × s8", "s8 × s8"])
def test_types_that_onnxruntime_refuses_are_left_to_the_others(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    seen = clock(monkeypatch, {(): 5, (SEVERAL,): 5, (ONE, SEVERAL): 2})
    monkeypatch.setattr(module, "in_int8", refusing(refused))
    assert slow_in_int8(prepared, timed, SILENT).families == (ONE, SEVERAL)
    assert not any(name.endswith(refused) for name in seen)


def test_a_model_that_onnxruntime_refuses_in_all_types_is_planned_as_it_is(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    monkeypatch.setattr(module, "in_int8", refusing(*module.TYPES))
    found = slow_in_int8(prepared, timed, SILENT)
    assert found.families == ()
    assert found.notes == ("plans were not timed in int8: no kernel",)


def refusing(*types: str) -> Callable[..., onnx.ModelProto]:
    def in_int8(model: onnx.ModelProto, ranges: Any, arithmetic: Arithmetic) -> onnx.ModelProto:
        if arithmetic.name in types:
            raise ModelError("no kernel")
        return integers.in_int8(model, ranges, arithmetic)

    return in_int8


def test_real_plans_are_timed(prepared: Prepared) -> None:
    """Whatever this machine says, it names families, and tells why."""
    timed = preferring(paced(prepared, 1e-6), ONE, SEVERAL, by=1.2)
    found = slow_in_int8(prepared, timed, SILENT)
    assert found.families in ((), *module.DOUBTFUL)
    assert len(found.notes) == bool(found.families)
