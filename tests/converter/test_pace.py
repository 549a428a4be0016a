"""Plans that are tried, and results that are never slower; most clocks here are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from converter import pace as module
from converter.branches import branches_of_form
from converter.config import Budget, Runtime, Target
from converter.errors import ConfigError
from converter.latency import READINGS, Timing
from converter.pace import Paced, never_slower, pace, plan, read_plans
from converter.planner.choice import Choice, frontier
from converter.planner.measurements import Measurements
from converter.planner.milliseconds.model import LatencyModel
from converter.preparation import Prepared
from converter.progress import SILENT
from converter.realisation import rewritten
from converter.schemes import KEEP, Candidate, Form
from passes.split import Branches
from tests.converter.two_layers import FIRST, SECOND, paced


def clock(monkeypatch: pytest.MonkeyPatch, ratios: list[float]) -> list[int]:
    """Give made-up speed-ups, one for each timing, the last one again and again; count the timings."""
    asked: list[int] = []

    def time_against(_original: object, models: dict[str, object], *_: object) -> object:
        ratio = ratios[min(len(asked), len(ratios) - 1)]
        asked.append(len(models))
        return {
            name: Timing(ms, ms, ms, 1, (ms,), 1, "cpu", 1, spinning=True, settled=True)
            for name, ms in (("original", 1.0), *((name, 1 / ratio) for name in models))
        }

    monkeypatch.setattr(module, "time_against", time_against)
    return asked


def test_without_milliseconds_the_budget_in_macs_is_met(prepared: Prepared) -> None:
    choice = plan(prepared, None, Budget(macs=2))
    rest = prepared.cost.macs - sum(each[0].macs for each in prepared.candidates.values())
    assert rest + choice.totals["macs"] <= prepared.cost.macs / 2


def test_a_plan_that_misses_its_speedup_is_made_again_with_a_tighter_limit(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    asked = clock(monkeypatch, [1.5, 2.1])
    choice = plan(prepared, timed, Budget(speedup=2))
    assert len(asked) == 2
    assert timed.added_up(choice.chosen) >= 2 * 2 / 1.5


def test_a_plan_may_have_to_be_faster_than_asked(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    clock(monkeypatch, [2.5])
    choice = plan(prepared, timed, Budget(speedup=2), more=1.2)
    assert timed.added_up(choice.chosen) >= 2 * 1.2


def test_a_plan_that_meets_its_speedup_is_tried_once(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clock(monkeypatch, [2.1])
    plan(prepared, paced(prepared, 1e-6), Budget(speedup=2))
    assert len(asked) == 1


def test_of_plans_that_are_fast_enough_the_one_of_least_effect_is_taken(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    asked = clock(monkeypatch, [4.0, 2.1])
    choice = plan(prepared, timed, Budget(speedup=2))
    assert len(asked) == 2
    assert timed.added_up(choice.chosen) < 2


# Budgets that are not in time -------------------------------------------------------------------------

SMALL, SLOW = Form("channel", (1,)), Form("spatial", (1,))
"""Made-up forms of the first layer, both of half its MACs."""


def offered(prepared: Prepared, small: tuple[float, float], slow: tuple[float, float]) -> Paced:
    """One layer of 1 ms as it is; effect and ms of two forms of half the MACs, the second of least effect."""
    timed = paced(prepared, 0.0)
    kept = dataclasses.replace(timed.candidates[FIRST][0], ms=1.0)
    half = dataclasses.replace(kept, macs=kept.macs / 2, params=kept.params / 2)
    forms = [
        dataclasses.replace(half, form=form, effect=effect, ms=ms)
        for form, (effect, ms) in ((SMALL, small), (SLOW, slow))
    ]
    second = dataclasses.replace(timed.candidates[SECOND][0], ms=0.0)
    curves = {FIRST: {KEEP.family: (np.array([kept.macs]), np.array([1.0]))}}
    return dataclasses.replace(
        timed,
        model=LatencyModel(0.0, curves, ()),
        candidates={FIRST: (kept, *forms), SECOND: (second,)},
    )


def half_of(prepared: Prepared) -> Budget:
    """A budget that one of these forms meets, and the layer as it is does not."""
    macs = prepared.candidates[FIRST][0].macs
    return Budget(macs=prepared.cost.macs / (prepared.cost.macs - macs / 2))


def test_a_plan_as_fast_as_its_macs_let_hope_is_tried_once(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = half_of(prepared)
    assert budget.macs is not None
    asked = clock(monkeypatch, [budget.macs])
    timed = offered(prepared, (0.011, 0.5), (0.010, 0.9))
    assert plan(prepared, timed, budget).chosen[FIRST].form == SLOW
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("effect", "ms", "taken"),
    [
        # 1.05 times the outputs' error for 0.95 of the time is about even; a little more is not worth it
        (0.0111, 0.94, SLOW),
        (0.0110, 0.93, SMALL),
        (0.0124, 0.5, SMALL),
        # and beyond 1.25 times the effect nothing is
        (0.0126, 0.1, SLOW),
    ],
)
def test_speed_that_was_not_asked_for_is_bought_where_it_costs_less_than_it_is_worth(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, effect: float, ms: float, taken: Form
) -> None:
    clock(monkeypatch, [1.0, 1.05])
    timed = offered(prepared, (effect, ms), (0.010, 0.99))
    assert plan(prepared, timed, half_of(prepared)).chosen[FIRST].form == taken


def test_a_plan_that_reads_slower_gives_way_to_one_that_is_not_up_to_a_half_more_effect(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by what it gains alone the faster form is not worth its effect
    clock(monkeypatch, [0.95, 1.02])
    timed = offered(prepared, (0.0149, 0.94), (0.010, 1.0))
    assert plan(prepared, timed, half_of(prepared)).chosen[FIRST].form == SMALL
    clock(monkeypatch, [1.0, 1.02])
    assert plan(prepared, timed, half_of(prepared)).chosen[FIRST].form == SLOW


def test_of_plans_that_are_not_as_fast_as_hoped_the_fastest_reading_counts(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was promised to be faster and is not stays away."""
    asked = clock(monkeypatch, [1.05, 1.04])
    timed = offered(prepared, (0.011, 0.5), (0.010, 0.9))
    assert plan(prepared, timed, half_of(prepared)).chosen[FIRST].form == SLOW
    assert len(asked) == 2


def test_a_budget_in_weights_promises_no_speed_but_that_it_is_not_lower(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clock(monkeypatch, [1.0])
    timed = offered(prepared, (0.0101, 0.1), (0.010, 0.9))
    params = prepared.cost.params / (
        prepared.cost.params - prepared.candidates[FIRST][0].params / 2
    )
    assert plan(prepared, timed, Budget(params=params)).chosen[FIRST].form == SLOW
    assert len(asked) == 1


def test_a_plan_that_reads_slower_is_kept_where_faster_ones_lose_far_more(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not pay is put back when it is timed; speed that was not asked for is not bought."""
    timed = paced(prepared, 1e-6)
    clock(monkeypatch, [2.0])
    best = plan(prepared, timed, Budget(macs=1.2))
    asked = clock(monkeypatch, [0.9])
    choice = plan(prepared, timed, Budget(macs=1.2))
    assert 1 <= len(asked) <= module.TRIALS
    assert choice.chosen == best.chosen


def test_what_whole_plans_read_corrects_what_their_layers_add_up_to(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    clock(monkeypatch, [1.5])
    choice = plan(prepared, timed, Budget(macs=3))
    added_up = timed.added_up(choice.chosen)
    assert timed.predicted_speedup(choice.chosen) == pytest.approx(1.5)
    kept = {name: each[0] for name, each in timed.candidates.items()}
    assert timed.predicted_speedup(kept) == 1.0
    # half the way from the original, half the correction, in logarithms
    between = {name: dataclasses.replace(each, ms=0.0) for name, each in kept.items()}
    first = dataclasses.replace(kept[FIRST], ms=timed.model.original_ms / added_up**0.5)
    half = {**between, FIRST: first}
    assert timed.predicted_speedup(half) == pytest.approx(1.5**0.5)
    assert timed.predicted_ms(half) == pytest.approx(timed.model.original_ms / 1.5**0.5)


def test_a_speedup_beyond_the_cheapest_forms_is_refused_with_what_can_be_reached(
    prepared: Prepared,
) -> None:
    with pytest.raises(ConfigError, match=r"--speedup 500"):
        plan(prepared, paced(prepared, 1e-6, rest_ms=1.0), Budget(speedup=500))


def test_a_speedup_just_within_reach_is_tried_without_a_margin(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6, rest_ms=1.0)
    cheapest = {
        name: min(each, key=lambda one: one.macs) for name, each in timed.candidates.items()
    }
    best = timed.added_up(cheapest)
    clock(monkeypatch, [best])
    choice = plan(prepared, timed, Budget(speedup=best / (1 + module.MARGIN / 2)))
    assert timed.added_up(choice.chosen) > best / (1 + module.MARGIN)
    with pytest.raises(ConfigError, match="at best"):
        plan(prepared, timed, Budget(speedup=best * 1.001))


def test_a_latency_is_compared_with_what_the_original_takes(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    clock(monkeypatch, [2.6])  # the original takes 1 ms on this clock
    choice = plan(prepared, timed, Budget(latency_ms=0.4))
    assert timed.added_up(choice.chosen) >= 2.5


def test_a_latency_that_the_original_has_leaves_it_as_it_is(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = paced(prepared, 1e-6)
    clock(monkeypatch, [1.0] * 6)
    choice = plan(prepared, timed, Budget(latency_ms=40))
    assert {each.form for each in choice.chosen.values()} == {KEEP}


def finished(
    prepared: Prepared,
) -> tuple[dict[str, Candidate], dict[str, Branches], onnx.ModelProto]:
    """A plan that replaces both layers, its branches, and the model."""
    chosen = {
        name: next(one for one in each if one.form.scheme == "channel")
        for name, each in prepared.candidates.items()
    }
    branches = {
        name: branches_of_form(prepared.geometries[name], one.form) for name, one in chosen.items()
    }
    return chosen, branches, rewritten(prepared, branches)


def test_a_model_that_is_faster_stays_whole(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    clock(monkeypatch, [1.2])
    kept, left, latency = never_slower(prepared, paced(prepared, 1e-6), chosen, branches, model)
    assert kept is model
    assert set(left) == {FIRST, SECOND}
    assert latency.speedup == 1.2


def test_layers_that_do_not_pay_are_put_back_first(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    slow = dataclasses.replace(chosen[FIRST], ms=(timed.candidates[FIRST][0].ms or 0.0) + 1.0)
    fast = dataclasses.replace(chosen[SECOND], ms=0.0)
    clock(monkeypatch, [*[0.9] * READINGS, 1.1])
    kept, left, _ = never_slower(prepared, timed, {FIRST: slow, SECOND: fast}, branches, model)
    assert set(left) == {SECOND}
    assert kept is not None
    outputs = {name for node in kept.graph.node for name in node.output}
    assert any(name.startswith(f"{SECOND}/") for name in outputs)
    assert not any(name.startswith(f"{FIRST}/") for name in outputs)


@pytest.mark.parametrize(
    ("tried", "ratios"), [(1.4, [0.9, 0.9, 1.3]), (0.95, [0.9, 0.9, 1.3]), (1.4, [0.9])]
)
def test_a_model_whose_plan_was_faster_is_given_time(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tried: float, ratios: list[float]
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    timed.tried.append(module.Tried(chosen, tried))
    clock(monkeypatch, ratios)
    naps: list[float] = []
    monkeypatch.setattr("converter.latency.PAUSE", 15.0)
    monkeypatch.setattr("converter.latency.time.sleep", naps.append)
    _, left, latency = never_slower(prepared, timed, chosen, branches, model)
    # the whole model alone is waited for, and only where the plan gave reason to
    assert sum(naps) == (30.0 if tried > 1.0 else 0.0)
    assert set(left) == ({FIRST, SECOND} if ratios[-1] > 1.0 else set())
    assert latency.speedup == (1.3 if left else 1.0)


def test_where_nothing_pays_the_original_is_what_is_left(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    clock(monkeypatch, [0.8])
    kept, left, latency = never_slower(prepared, paced(prepared, 1e-6), chosen, branches, model)
    assert kept is None
    assert left == {}
    assert latency.speedup == 1.0


def test_a_prediction_that_is_far_off_is_read_into(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    tried = Choice(chosen, effect=0.0, totals={}, gap=0.0)
    # the plan read twice the speed when it was made; the model then reads 3.3, and the plan again 3
    asked = clock(monkeypatch, [2.0, 3.3, 3.0])
    module._tried(prepared, timed, {"plan": tried})
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert len(asked) == 3
    assert latency.off == pytest.approx(3.3 / 2 - 1)
    assert latency.pace == pytest.approx(1.5)
    assert latency.off_at_pace == pytest.approx(3.3 / 3 - 1)
    assert [each.speedup for each in timed.tried] == [2.0]


def test_a_prediction_that_holds_is_not_read_into(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    asked = clock(monkeypatch, [2.0, 2.1])
    module._tried(prepared, timed, {"plan": Choice(chosen, effect=0.0, totals={}, gap=0.0)})
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert len(asked) == 2
    assert latency.pace is None
    assert latency.off_at_pace == latency.off == pytest.approx(0.05)


def test_of_several_plans_the_one_most_like_the_result_is_read_again(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    kept = {name: each[0] for name, each in timed.candidates.items()}
    timed.tried.extend(
        [module.Tried({**kept, FIRST: chosen[FIRST]}, 1.5), module.Tried(chosen, 2.0)]
    )
    timed.tried.append(module.Tried({**kept, SECOND: chosen[SECOND]}, 1.25))
    clock(monkeypatch, [3.3, 3.0])
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert latency.pace == pytest.approx(1.5)


def test_the_last_reading_of_a_plan_is_the_one_that_counts(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    timed.tried.extend([module.Tried(chosen, 5.4), module.Tried(chosen, 9.0)])
    clock(monkeypatch, [5.4])
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert latency.off == pytest.approx(5.4 / 9 - 1)
    assert latency.pace == pytest.approx(5.4 / 9)
    assert latency.off_at_pace == pytest.approx(0.0)


@pytest.mark.parametrize("again", [2.0, 2.15, 1.85])
def test_a_wrong_prediction_at_the_same_pace_stays_one(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, again: float
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    timed.tried.append(module.Tried(chosen, 2.0))
    asked = clock(monkeypatch, [3.3, again])
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert len(asked) == 2
    assert latency.pace is None
    assert latency.off_at_pace == latency.off == pytest.approx(3.3 / 2 - 1)


def test_a_plan_unlike_the_result_tells_nothing_of_the_pace(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, branches, model = finished(prepared)
    timed = paced(prepared, 1e-6)
    kept = {name: each[0] for name, each in timed.candidates.items()}
    timed.tried.append(module.Tried({**kept, FIRST: chosen[FIRST]}, 1.2))
    asked = clock(monkeypatch, [9.9])
    _, _, latency = never_slower(prepared, timed, chosen, branches, model)
    assert len(asked) == 1
    assert latency.pace is None


def test_real_clocks_give_every_offered_candidate_its_milliseconds(
    prepared: Prepared, tmp_path: Path
) -> None:
    timed = pace(prepared, Target(Runtime(threads=1), batch=2), Measurements(tmp_path), SILENT)
    assert timed.feeds["x"].shape == (2, 8, 8, 8)
    for name, each in timed.candidates.items():
        assert each[0].form == KEEP
        assert all(one.ms is not None and one.ms >= 0 for one in each)
        assert {one.form for one in each} <= {one.form for one in prepared.candidates[name]}
        assert Form("channel", (1,)) in {one.form for one in each}
    # a front by the clock may hold nothing but the original, where other work disturbs it
    read_plans(prepared, timed, frontier(timed.candidates, "macs", 4))
    assert timed.tried
    assert all(each.speedup > 0 for each in timed.tried)
