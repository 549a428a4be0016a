"""Predicted effects meet what a layer's error really does to the outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter import corrections as module
from converter.calibration.opening import open_calibration_set
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings
from converter.corrections import correct_effects
from converter.model_file import save_model
from converter.prediction import Probe
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT
from converter.realisation import rewritten
from converter.runtime import model_inputs
from converter.schemes import KEEP, Candidate, Form
from converter.work import Work
from passes.split import Branches, Factor

TEXT = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
two (float[%s, 3, 8, 8] x) => (float[n, 6] y) {
    [first] c = Conv <pads = [1, 1, 1, 1]> (x, a)
    r = Relu (c)
    [second] d = Conv <pads = [1, 1, 1, 1]> (r, b)
    s = Relu (d)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    [last] y = Gemm <transB = 1> (f, w)
}"""
SHAPES = {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "w": (6, 16)}
IMAGES = 40
RUNTIME = Runtime(threads=1)
BRANCHES = Branches(
    factors=(
        Factor(np.ones((2, 3, 1, 1), np.float32)),
        Factor(np.ones((4, 2, 3, 3), np.float32), (0, 1)),
    )
)


def prepared(
    folder: Path,
    *,
    batch: str = "n",
    op: str = "Relu",
    classes: bool = False,
    anchors: bool = False,
    work: Work | None = None,
) -> Prepared:
    random = np.random.default_rng(0)
    text = (TEXT % batch).replace("Relu", op)
    if classes:
        text = text.replace("(float[n, 6] y)", "(int64[n, 1] best)")
        text = text.replace("(f, w)\n", "(f, w)\n best = ArgMax <axis = 1> (y)\n")
    if anchors:
        text = text.replace("[n, 6] y)", "[n, 6] y, float[1, 4] anchors)")
    model = onnx.parser.parse_model(text)
    if anchors:
        model.graph.initializer.append(
            numpy_helper.from_array(np.ones((1, 4), np.float32), "anchors")
        )
    for name, shape in SHAPES.items():
        weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    save_model(model, folder / "two.onnx")
    np.save(folder / "x.npy", random.standard_normal((IMAGES, 3, 8, 8)).astype(np.float32))
    return prepare(
        folder / "two.onnx",
        open_calibration_set(folder / "x.npy", model_inputs(model), Preprocessing()),
        calibration=CalibrationSettings(patches=512, batch=16),
        solver=SolverSettings(),
        runtime=RUNTIME,
        progress=SILENT,
        clock=Clock(),
        work=work,
    )


def correct(given: Prepared) -> dict[str, tuple[Candidate, ...]]:
    """Correct the effects, and give those from before."""
    before = dict(given.candidates)
    correct_effects(given, RUNTIME, SILENT)
    assert not given.probes  # what they hold is not needed any more
    return before


def answers(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float64]:
    session = ort.InferenceSession(model.SerializeToString())
    rows = [session.run(None, {"x": images[at : at + 8]})[0] for at in range(0, len(images), 8)]
    return np.concatenate(rows).astype(np.float64)


@pytest.mark.parametrize(
    ("batch", "op"),
    [("n", "Relu"), ("16", "Relu"), ("n", "com.microsoft.QuickGelu")],
    ids=["free batch", "batch of 16", "a type that nobody knows"],
)
def test_the_form_that_is_measured_has_its_very_error(tmp_path: Path, batch: str, op: str) -> None:
    given = prepared(tmp_path, batch=batch, op=op)
    at = module._chosen(given.candidates, given.probes)["second"]
    before = correct(given)
    models = [given.original, rewritten(given, {"second": at.branches})]
    for model in models:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
        del model.graph.value_info[:]
    right, found = (answers(each, np.load(tmp_path / "x.npy")) for each in models)
    error = np.square(found - right).sum() / np.square(right - right.mean(0)).sum()
    now = {each.form: each.effect for each in given.candidates["second"]}
    assert now[at.form] == pytest.approx(error, rel=1e-3)
    factor = error / (1 - error) / (at.effect / (1 - at.effect))
    assert abs(factor - 1) > 0.05  # else nothing was to be corrected
    for each in before["second"]:
        if 0 < each.effect < 1e-3:
            assert now[each.form] == pytest.approx(factor * each.effect, rel=0.02)
    assert now[KEEP] == 0


def test_layers_differ_and_no_factor_is_without_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prepared(tmp_path)
    errors = iter([1e-12, np.inf, 0.0])
    monkeypatch.setattr(module._Outputs, "error", lambda *_: next(errors))
    before = correct(given)
    # what shows in no output that is compared stays as it was predicted
    for name, factor in (("first", 0.1), ("second", 10.0), ("last", 1.0)):
        for old, new in zip(before[name], given.candidates[name], strict=True):
            assert new.effect == pytest.approx(
                factor * old.effect / (1 + (factor - 1) * old.effect)
                if old.effect < 1
                else old.effect
            )
            assert (new.effect > old.effect) == (factor > 1) or old.effect in (0, new.effect)
            assert dataclasses.replace(new, effect=0.0) == dataclasses.replace(old, effect=0.0)


def test_without_scores_everything_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prepared(tmp_path, classes=True)
    monkeypatch.setattr(module, "Walk", None)
    before = correct(given)
    assert given.candidates == before


def test_an_output_that_no_node_writes_does_not_count(tmp_path: Path) -> None:
    found = []
    for anchors in (False, True):
        given = prepared(tmp_path, anchors=anchors)
        correct(given)
        found.append([each.effect for each in given.candidates["second"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_finished_layers_are_taken_from_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(tmp_path, work=Work(tmp_path / "work"))
    correct(first)
    again = prepared(tmp_path, work=Work(tmp_path / "work"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "Walk", None)
        correct(again)
    assert again.candidates == first.candidates
    # another network behind the same layers, as where Ω could not be measured
    other = dataclasses.replace(prepared(tmp_path, work=Work(tmp_path / "work")), digest="other")
    monkeypatch.setattr(module, "Walk", None)
    with pytest.raises(TypeError):
        correct(other)


def test_of_each_layer_the_probe_is_tried_that_loses_about_as_much_as_in_the_plan() -> None:
    def layer(macs: float, *effects: float) -> list[Candidate]:
        forms = [Form("channel", (rank,)) for rank in range(len(effects), 0, -1)]
        smaller = [
            Candidate(form, effect, macs / (2 + index), 1)
            for index, (form, effect) in enumerate(zip(forms, effects, strict=True))
        ]
        return [Candidate(KEEP, 0.0, macs, 1), *smaller]

    def probes(*effects: float) -> tuple[Probe, ...]:
        return tuple(Probe(KEEP, effect, BRANCHES) for effect in effects)

    large = layer(1e6, 1e-3, 4e-3, 3e-1)
    small = layer(1.0, 1e-5, 5e-3, 9e-1)  # nothing is to be gained by it: the plan keeps it
    offered = {"large": probes(1e-1, 5e-3, 1e-4), "small": probes(1e-1, 3e-3), "none": ()}
    candidates = {"large": large, "small": small, "none": layer(1.0)}
    found = module._chosen(candidates, offered)
    assert {name: each.effect for name, each in found.items()} == {"large": 5e-3, "small": 3e-3}
    assert module._chosen({"kept": [Candidate(KEEP, 0.0, 1.0, 1.0)]}, {"kept": ()}) == {}
