"""One layer from its recordings to branches: what is predicted, and that fits hold in the graph."""

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
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter import fitting as module
from converter.calibration.gather import Inputs, Sample
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings
from converter.errors import SolverError
from converter.fitting import (
    PROBED,
    ROUND_OFF,
    Probe,
    Task,
    _family,
    branches_of,
    branches_of_form,
    fit,
    geometry_of,
    predict,
    problem_of,
    task_of,
    wants_patches,
)
from converter.runtime import model_inputs
from converter.schemes import KEEP, SCHEMES, Candidate, Form, Geometry, cost_of
from converter.solver.effects import Sketch
from converter.solver.problem import METRIC_FLOOR
from converter.solver.solution import Solution
from converter.work import key_of
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Split

Floats = NDArray[np.float32]

IMAGES, SIDE = 48, 5
ROWS, CHANNELS = 12, 10
SOLVER = SolverSettings()
SHARE = 8.0
TEXT = f"""<ir_version: 8, opset_import: ["": 17]>
one (float[batch, {CHANNELS}, {SIDE}, {SIDE}] x) => (float[batch, {ROWS}, {SIDE}, {SIDE}] y) {{
    [conv] response = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    [relu] y = Relu(response)
}}"""


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A small layer, and everything that was recorded of it."""

    model: onnx.ModelProto
    images: Floats
    layer: Layer
    geometry: Geometry
    sample: Sample
    inputs: Inputs
    metric: NDArray[np.float64]

    def task(self, solver: SolverSettings = SOLVER) -> Task:
        known = self.layer, self.geometry, self.sample, self.metric
        return task_of(*known, self.inputs, solver, SHARE)

    def candidates(self, solver: SolverSettings = SOLVER) -> tuple[Candidate, ...]:
        return predict(self.task(solver)).candidates


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    # a spectrum that falls, over channels that correlate, as in trained networks
    weight = (
        rng.normal(size=(ROWS, CHANNELS, 3, 3)) * np.exp(-np.arange(CHANNELS) / 4)[:, None, None]
    )
    for name, array in (("w", weight), ("b", 0.3 * rng.normal(size=ROWS))):
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    mixing = rng.normal(size=(CHANNELS, CHANNELS)) / 3 + np.eye(CHANNELS)
    images = np.einsum("dc,ncij->ndij", mixing, rng.normal(size=(IMAGES, CHANNELS, SIDE, SIDE)))
    images = images.astype(np.float32)
    graph = import_graph(model)
    run_passes(graph, normalising())
    (layer,) = find_layers(graph)
    original = export_model(graph, model)
    file = tmp_path_factory.mktemp("fitting") / "images.npy"
    np.save(file, images)
    data = open_calibration_set(file, model_inputs(original), Preprocessing())
    recorder = Recorder(data, CalibrationSettings(batch=16), Runtime(threads=1))
    sample = recorder.originals(original, [layer])[layer.name]
    factor = rng.normal(size=(ROWS, ROWS))
    return Recorded(
        model=original,
        images=images,
        layer=layer,
        geometry=geometry_of(layer, (SIDE, SIDE), sample.out_shape),
        sample=sample,
        inputs=recorder.inputs(original, layer, sample),
        metric=factor @ factor.T / ROWS,
    )


def families(candidates: tuple[Candidate, ...]) -> Mapping[str, list[Candidate]]:
    """Candidates by their scheme and support, ascending in rank."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda each: each.form):
        found[f"{candidate.form.family} {candidate.form.support}"].append(candidate)
    return found


# ---- what a layer may become


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
    assert probe.effect == min(each.effect for each in small)
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


# ---- fits


def answers(model: onnx.ModelProto, images: Floats) -> Floats:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": images})[0])


def fitted(
    recorded: Recorded, form: Form, solver: SolverSettings = SOLVER, *, trade: bool = False
) -> Solution:
    layer, geometry, sample = recorded.layer, recorded.geometry, recorded.sample
    return fit(layer, geometry, sample, recorded.inputs, recorded.metric, form, solver, trade=trade)


def replaced(recorded: Recorded, branches: Branches) -> onnx.ModelProto:
    graph = import_graph(recorded.model)
    run_passes(graph, [Split(recorded.layer, branches)])
    return export_model(graph, recorded.model)


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


def rows_of(images: Floats) -> NDArray[np.float64]:
    return images.transpose(0, 2, 3, 1).reshape(-1, ROWS).astype(np.float64)


FORMS = pytest.mark.parametrize(
    "form",
    [
        Form("channel", (4,)),
        Form("channel", (3,), 2),
        Form("spatial", (5,)),
        Form("spatial", (4,), 1),
        Form("tucker", (4, 5)),
        Form("tucker", (3, 4), 2),
        Form("depthwise", (8, 8)),
        Form("depthwise", (4, 8)),
        Form("sparse", (), 4),
    ],
    ids=str,
)


@FORMS
def test_what_a_fit_reports_is_what_its_branches_do(recorded: Recorded, form: Form) -> None:
    solution = fitted(recorded, form)
    branches = branches_of(recorded.geometry, form, solution)
    found = answers(replaced(recorded, branches), recorded.images)
    wanted = answers(recorded.model, recorded.images)
    unseen = np.arange(IMAGES) % 8 == 7
    omega = recorded.metric / np.mean(np.diag(recorded.metric)) + METRIC_FLOOR * np.eye(ROWS)
    missed, spread = rows_of((found - wanted)[unseen]), rows_of(wanted[~unseen])
    spread -= spread.mean(0)
    error = np.einsum("ni,ij,nj->", missed, omega, missed) / len(missed)
    whole = np.einsum("ni,ij,nj->", spread, omega, spread) / len(spread)
    # float32 through all of it
    assert solution.unseen == pytest.approx(error / whole, rel=1e-2)
    assert solution.unseen < 0.9


@FORMS
def test_a_fit_keeps_to_its_form(recorded: Recorded, form: Form) -> None:
    solution = fitted(recorded, form)
    weights = sum(each.numel() for each in (*solution.factors, solution.sparse))
    assert weights <= cost_of(recorded.geometry, form)[1] - ROWS
    if form.scheme in ("spatial", "tucker", "depthwise"):
        assert solution.ranks == form.ranks
        assert len(solution.support) == form.support


def test_channel_keeps_its_rank_where_nothing_is_to_be_traded(recorded: Recorded) -> None:
    solution = fitted(recorded, Form("channel", (4,)))
    assert (solution.ranks, len(solution.support), solution.history) == ((4,), 0, ())
    assert fitted(recorded, Form("channel", (4,)), trade=True).history


@pytest.mark.parametrize("name", ["svd", "data-svd"])
def test_baselines_are_of_low_rank_alone(recorded: Recorded, name: str) -> None:
    solver = SolverSettings(name=name)  # type: ignore[arg-type]  # both are names of solvers
    solution = fitted(recorded, Form("channel", (4,)), solver)
    assert solution.ranks == (4,)
    assert len(solution.support) == 0


def test_a_fit_that_fails_names_the_layer(recorded: Recorded) -> None:
    features = np.full_like(recorded.inputs.features, np.inf)
    bad = dataclasses.replace(recorded, inputs=Inputs(features, None))
    for form in (Form("channel", (4,)), Form("spatial", (4,))):
        with pytest.raises(SolverError, match=r"layer conv: .*not finite"):
            fitted(bad, form)


def test_long_patches_are_looked_at_through_the_layer_itself_unless_whole(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.fitting.FULL_PATCH_LIMIT", 64)
    arguments = (recorded.layer, recorded.sample, recorded.inputs, recorded.metric, "cpu")
    few, whole = problem_of(*arguments), problem_of(*arguments, whole=True)
    assert few.basis is few.weight
    assert len(few.eligible) == 0
    assert few.features.shape == (len(recorded.inputs.features), ROWS)
    assert whole.basis is None
    assert whole.features.shape == recorded.inputs.features.shape
    for form in (Form("channel", (4,)), Form("spatial", (4,))):
        assert fitted(recorded, form).unseen < 0.9
    # S is not sought there
    assert fitted(recorded, Form("channel", (4,)), trade=True).history == ()


# ---- branches


@FORMS
def test_branches_of_a_form_have_its_shapes_and_no_bias(recorded: Recorded, form: Form) -> None:
    branches = branches_of_form(recorded.geometry, form)
    assert branches.ranks == form.ranks
    assert branches.kept == form.support
    assert branches.bias is not None
    assert not branches.bias.any()
    assert np.isfinite(answers(replaced(recorded, branches), recorded.images)).all()
    again = branches_of_form(recorded.geometry, form)
    for one, other in zip(branches.factors, again.factors, strict=True):
        assert np.array_equal(one.weight, other.weight)


def test_a_solution_without_l_is_one_branch(recorded: Recorded) -> None:
    solution = fitted(recorded, Form("sparse", (), 4))
    branches = branches_of(recorded.geometry, Form("sparse", (), 4), solution)
    assert branches.factors == ()
    assert branches.kept == 4
    assert branches.sparse is not None
    assert branches.sparse.shape == (ROWS, 4, 3, 3)
