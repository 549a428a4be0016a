"""What a layer may become: its candidates, their effects against the network and the fits, its probes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest

from converter import prediction as module
from converter.branches import branches_of
from converter.config import SolverSettings
from converter.errors import SolverError
from converter.prediction import PROBED, ROUND_OFF, Probe, _family, predict, task_of, wants_patches
from converter.schemes import KEEP, SCHEMES, Candidate, Form, cost_of
from converter.solver.effects import Sketch
from converter.work import key_of
from tests.converter.recorded_layer import (
    CHANNELS,
    IMAGES,
    ROWS,
    SHARE,
    Recorded,
    answers,
    fitted,
    replaced,
    rows_of,
)


def families(candidates: tuple[Candidate, ...]) -> Mapping[str, list[Candidate]]:
    """Candidates by their scheme and support, ascending in rank."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda each: each.form):
        found[f"{candidate.form.family} {candidate.form.support}"].append(candidate)
    return found


def form_of(probe: Probe) -> Form:
    return probe.form


def sketches_of(recorded: Recorded) -> dict[tuple[str, int], list[tuple[Form, Sketch]]]:
    """All sketches of a layer, by scheme and support."""
    made: dict[tuple[str, int], list[tuple[Form, Sketch]]] = defaultdict(list)

    class Listing(module._Probing):
        def offer(self, form: Form, sketch: Sketch) -> None:
            made[form.scheme, form.support].append((form, sketch))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_Probing", Listing)
        predict(recorded.task())
    return made


def before_relu(model: onnx.ModelProto) -> onnx.ModelProto:
    linear = onnx.ModelProto()
    linear.CopyFrom(model)
    (relu,) = (node for node in linear.graph.node if node.op_type == "Relu")
    relu.op_type = "Identity"
    return linear


def test_the_layer_itself_comes_first_and_does_nothing(recorded: Recorded) -> None:
    first, *others = recorded.candidates()
    assert first == Candidate(KEEP, 0.0, *cost_of(recorded.geometry, KEEP))
    assert KEEP not in [candidate.form for candidate in others]


def test_candidates_cost_less_than_the_layer_and_what_their_form_costs(recorded: Recorded) -> None:
    first, *others = recorded.candidates()
    assert len({candidate.form for candidate in others}) == len(others)
    for candidate in others:
        assert (candidate.macs, candidate.params) == cost_of(recorded.geometry, candidate.form)
        assert candidate.params < first.params
        assert candidate.effect > 0
        assert candidate.ms is None


def test_every_scheme_is_offered_alone_and_beside_a_sparse_branch(recorded: Recorded) -> None:
    found = {candidate.form.family for candidate in recorded.candidates()}
    beside = {f"sparse + {name}" for name in ("channel", "spatial", "tucker")}
    factorised = {"channel", "spatial", "depthwise", "depthwise ×2", "tucker"}
    assert found == {"keep", "sparse", *factorised, *beside}


def test_effects_fall_with_the_rank(recorded: Recorded) -> None:
    for family, candidates in families(recorded.candidates()).items():
        if "tucker" in family:
            continue  # two ranks, of which each may fall
        effects = [candidate.effect for candidate in candidates]
        assert all(after <= before for before, after in pairwise(effects)), family
    tucker = families(recorded.candidates())["tucker 0"]
    for small in tucker:
        for large in tucker:
            if all(a < b for a, b in zip(small.form.ranks, large.form.ranks, strict=True)):
                assert large.effect < small.effect


def test_effects_between_anchors_are_read_off_along_rays(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many filters for each channel, and any number of channels."""
    wide = dataclasses.replace(recorded.geometry, channels=64, outputs=64)
    scheme = SCHEMES["depthwise"]
    anchors = scheme.anchors(wide)
    between = sorted(set(scheme.ranks(wide)) - set(anchors))
    effects = {(first, second): 1 / first + 10 * (second // first) for first, second in anchors}
    monkeypatch.setattr(
        type(scheme), "sketches", lambda *given: [Sketch(effects[each], None) for each in given[3]]
    )
    evidence: Any = None  # not looked at
    offered: list[Form] = []
    forms = _family(scheme, 0, evidence, wide, lambda form, _: offered.append(form))
    found = {form.ranks: effect for form, effect in forms}
    assert [form.ranks for form in offered] == anchors
    assert {each: found[each] for each in anchors} == pytest.approx(effects)
    last = {second // first: first for first, second in anchors}
    inside = [each for each in between if each[0] < last[each[1] // each[0]]]
    assert {second // first for first, second in inside} == {1, 2}
    for first, second in inside:
        filters = second // first
        below = max(one for one, other in anchors if other == filters * one and one < first)
        above = min(one for one, other in anchors if other == filters * one and one > first)
        share = (first - below) / (above - below)
        ends = np.log([effects[below, filters * below], effects[above, filters * above]])
        assert np.log(found[first, second]) == pytest.approx(ends @ [1 - share, share])
    assert set(found) == set(anchors) | set(inside)


def test_no_plan_turns_on_round_off(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was replaced already: some forms are exact, and none of them is better."""
    channel, right = type(SCHEMES["channel"]), type(SCHEMES["channel"]).sketches

    def exact(*given: Any) -> list[Sketch]:
        sketches: list[Sketch] = right(*given)
        return [
            dataclasses.replace(each, effect=1e-15 / (1 + rank))
            for rank, each in enumerate(sketches)
        ]

    monkeypatch.setattr(channel, "sketches", exact)
    found = families(recorded.candidates())["channel 0"]
    assert len(found) > 2
    assert {each.effect for each in found} == {ROUND_OFF}
    task = recorded.task(SolverSettings(schemes=("channel",)))
    assert not predict(dataclasses.replace(task, patch=None)).probes  # nor is one tried


def test_each_sketch_does_in_the_network_what_was_predicted(recorded: Recorded) -> None:
    """Before the activation and but for one level, which allows for few unseen images."""
    unseen = np.arange(IMAGES) % 8 == 7
    wanted = answers(before_relu(recorded.model), recorded.images)
    levels = []
    families = sketches_of(recorded)
    assert {form.family for each in families.values() for form, _ in each} == {
        each.form.family for each in recorded.candidates()[1:]
    }
    for (name, support), sketches in families.items():
        judged = slice(None) if (name, support) == ("channel", 0) else unseen
        form, sketch = sketches[len(sketches) // 2]
        assert sketch.solution is not None
        branches = branches_of(recorded.geometry, form, sketch.solution())
        found = answers(before_relu(replaced(recorded, branches)), recorded.images[judged])
        errors = rows_of(found - wanted[judged])
        effect = float(np.einsum("ni,ij,nj->", errors, recorded.metric, errors)) / len(errors)
        if (name, support) == ("channel", 0):
            assert effect == pytest.approx(sketch.effect, rel=1e-4)
        else:
            levels.append(effect / sketch.effect)
    np.testing.assert_allclose(levels, levels[0], rtol=2e-3)


def test_probes_are_the_cheapest_forms_of_about_some_effects(recorded: Recorded) -> None:
    prediction = predict(recorded.task())
    macs = {form: cost_of(recorded.geometry, form)[0] for form in map(form_of, prediction.probes)}
    assert len(macs) == len(prediction.probes) > 1
    effects = {
        form: sketch.effect
        for sketches in sketches_of(recorded).values()
        for form, sketch in sketches
        if cost_of(recorded.geometry, form)[1] <= 0.5 * ROWS * CHANNELS * 9
    }
    for level in (multiple * SHARE for multiple in PROBED):
        near = [form for form, effect in effects.items() if level / 10 <= effect <= level]
        if near:
            best = min(near, key=lambda form: cost_of(recorded.geometry, form)[0])
        else:
            best = min(effects, key=lambda form: abs(np.log(effects[form] / level)))
        assert best in macs


def test_where_every_form_loses_more_the_one_that_loses_least_is_tried(recorded: Recorded) -> None:
    task = dataclasses.replace(recorded.task(), share=1e-8)
    (probe,) = predict(task).probes  # the same for all levels
    small = [each for each in recorded.candidates() if each.params <= 0.5 * ROWS * CHANNELS * 9]
    # computed twice, by sums that threads take in another order
    assert probe.effect == pytest.approx(min(each.effect for each in small), rel=1e-12)
    assert probe.form in [each.form for each in recorded.candidates()]


def test_effects_of_the_closed_form_are_what_a_truncation_leaves(recorded: Recorded) -> None:
    (channel,) = [c for c in recorded.candidates() if c.form == Form("channel", (4,))]
    values = np.linalg.eigvals(recorded.metric @ recorded.sample.covariance).real
    assert channel.effect == pytest.approx(np.sort(values)[:-4].sum(), rel=1e-6)


def test_predicted_effects_are_close_to_those_of_the_fits(recorded: Recorded) -> None:
    """One linear step against a whole fit through the ReLU, on the same unseen patches."""
    unseen = np.arange(IMAGES) % 8 == 7
    wanted = answers(recorded.model, recorded.images[unseen])
    forms = (
        Form("spatial", (6,)),
        Form("depthwise", (8, 8)),
        Form("depthwise", (8, 16)),
        Form("channel", (6,)),
    )
    offered = [each for each in recorded.candidates() if each.form in forms]
    assert len(offered) == len(forms)
    for candidate in offered:
        branches = branches_of(recorded.geometry, candidate.form, fitted(recorded, candidate.form))
        found = answers(replaced(recorded, branches), recorded.images[unseen])
        errors = rows_of(found - wanted)
        effect = float(np.einsum("ni,ij,nj->", errors, recorded.metric, errors)) / len(errors)
        # the ReLU hides about half of the error
        assert 0.2 * candidate.effect < effect < 1.2 * candidate.effect


def test_only_the_schemes_that_are_asked_for_are_offered(recorded: Recorded) -> None:
    found = recorded.candidates(SolverSettings(schemes=("spatial",)))
    assert {c.form.scheme for c in found} == {"keep", "spatial"}


def test_without_patches_only_the_closed_form_is_offered(recorded: Recorded) -> None:
    solver = SolverSettings(schemes=("channel", "spatial"))
    known = recorded.layer, recorded.geometry, recorded.sample, recorded.metric
    found = predict(task_of(*known, None, solver, SHARE)).candidates
    assert {c.form.family for c in found} == {"keep", "channel"}


def test_few_images_leave_no_patch_unseen_and_those_of_the_fit_judge(recorded: Recorded) -> None:
    task = dataclasses.replace(recorded.task(), unseen=np.zeros((0, CHANNELS * 9), np.float32))
    found = predict(task).candidates
    assert [c.form for c in found] == [c.form for c in recorded.candidates()]
    for each in found[1:]:
        assert each.effect > 0
    by_rank = [c.effect for c in found if c.form.family == "spatial"]
    assert by_rank == sorted(by_rank, reverse=True)


def test_patches_are_wanted_where_a_scheme_looks_at_them(recorded: Recorded) -> None:
    long = dataclasses.replace(recorded.geometry, channels=4096)
    wide = dataclasses.replace(recorded.geometry, channels=256)
    assert wants_patches(recorded.geometry, ("channel",))  # for S beside it
    assert not wants_patches(wide, ("channel",))
    assert wants_patches(wide, ("spatial",))
    assert not wants_patches(long, tuple(SCHEMES))


def test_a_task_that_is_not_finite_names_the_layer(recorded: Recorded) -> None:
    task = recorded.task()
    assert task.gram is not None
    bad = dataclasses.replace(task, gram=np.full_like(task.gram, np.nan))
    with pytest.raises(SolverError, match=r"layer conv: .*not finite"):
        predict(bad)


def test_a_task_can_be_sent_and_gives_the_same_elsewhere(recorded: Recorded) -> None:
    task = recorded.task(SolverSettings(schemes=("channel", "spatial")))
    prediction = predict(task)
    sent = pickle.loads(pickle.dumps(task))  # noqa: S301  # its own bytes
    # the key takes in every candidate, and every number of the probes
    assert key_of("predict", predict(sent)) == key_of("predict", prediction)
    here = prediction.candidates
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        there = executor.submit(predict, task).result(timeout=120).candidates
    assert [c.form for c in there] == [c.form for c in here]
    # another number of threads may add up in another order
    np.testing.assert_allclose([c.effect for c in there], [c.effect for c in here], rtol=1e-4)
