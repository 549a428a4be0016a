"""What is known of a model before any budget: the same here and in an executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter.calibration.opening import open_calibration_set
from converter.config import (
    Budget,
    CalibrationSettings,
    Preprocessing,
    Runtime,
    SolverSettings,
    Target,
)
from converter.errors import ConfigError, ModelError
from converter.model_file import save_model
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT
from converter.runtime import model_inputs
from converter.schemes import KEEP, cost_of

TEXT = """<ir_version: 8, opset_import: ["": 17]>
tiny (float[batch, 3, 8, 8] image) => (float[batch, 10] logits) {
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
    [bn1] n1 = BatchNormalization(c1, scale, shift, mean, variance)
    [relu1] r1 = Relu(n1)
    [grouped] g = Conv<group = 12, pads = [1, 1, 1, 1]>(r1, wg)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(g, w2, b2)
    [sum] s = Add(c2, r1)
    [relu2] r2 = Relu(s)
    [pool] p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r2)
    [flat] f = Flatten(p)
    [classifier] logits = Gemm<transB = 1>(f, w3, b3)
}"""
SHAPES = {
    "w1": (12, 3, 3, 3), "b1": (12,), "wg": (12, 1, 3, 3),
    "w2": (12, 12, 3, 3), "b2": (12,), "w3": (10, 192), "b3": (10,),
    "scale": (12,), "shift": (12,), "mean": (12,),
}  # fmt: skip
CONVERTIBLE = ["conv1", "conv2", "classifier"]

FRAMES = """<ir_version: 8, opset_import: ["": 17]>
frames (float[batch, 3, 8, 8] image) => (float[batch, 32, 8] y) {
    quarters = Constant<value_ints = [-1, 3, 4, 4]>()
    q = Reshape(image, quarters)
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(q, w1)
    [relu1] r1 = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(r1, w2)
    [relu2] r2 = Relu(c2)
    windows = Constant<value_ints = [-1, 8, 12]>()
    v = Reshape(r2, windows)
    [window] m = MatMul(v, w3)
    tokens = Constant<value_ints = [-1, 10]>()
    t = Reshape(m, tokens)
    [token] g = Gemm(t, w4)
    samples = Constant<value_ints = [-1, 32, 8]>()
    y = Reshape(g, samples)
}"""
"""Quarters of an image, windows and tokens in place of whole samples."""
OF_FRAMES = {"w1": (12, 3, 3, 3), "w2": (12, 12, 3, 3), "w3": (12, 10), "w4": (10, 8)}


def tiny(text: str = TEXT) -> onnx.ModelProto:
    model = with_weights(text, SHAPES)
    variance = np.random.default_rng(1).uniform(0.5, 2, size=12).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(variance, "variance"))
    return model


def with_weights(text: str, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.float64]] = {
        name: rng.normal(size=shape) * (1.5 / np.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()
    )
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """Prepare the tiny model, or another one of the same input."""
    file = tmp_path_factory.mktemp("preparation") / "images.npy"
    rng = np.random.default_rng(1)
    np.save(file, rng.normal(size=(48, 3, 8, 8)).astype(np.float32))

    def run(
        model: onnx.ModelProto | None = None,
        executor: Executor | None = None,
        clock: Clock | None = None,
        batch: int | None = None,
    ) -> Prepared:
        source, path = model or tiny(), file.parent / "tiny.onnx"
        save_model(source, path)
        return prepare(
            path,
            open_calibration_set(file, model_inputs(source), Preprocessing()),
            calibration=CalibrationSettings(batch=16, patches=512),
            solver=SolverSettings(),
            runtime=Runtime(threads=1),
            progress=SILENT,
            clock=clock or Clock(),
            batch=batch,
            executor=executor,
        )

    return run


def test_another_batch_than_the_models_own_is_refused_before_anything_is_recorded(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.preparation.Recorder", None)
    model = tiny()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with pytest.raises(ConfigError, match="takes batches of 4 only, and 8 was asked for"):
        prepared(model, batch=8)


def test_a_free_batch_that_takes_one_image_only_is_refused_in_words(
    prepared: Callable[..., Prepared],
) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[n,3,8,8] x) => (float[1,144] y) <int64[2] flat = {1, 144}> {
        c = Conv (x, w) y = Reshape (c, flat)
    }"""
    with pytest.raises(ModelError, match="free batch and does not run on two images at once"):
        prepared(with_weights(text, {"w": (4, 3, 3, 3)}))


def test_every_convertible_layer_has_candidates(prepared: Callable[..., Prepared]) -> None:
    found = prepared()
    assert [layer.name for layer in found.layers] == ["conv1", "grouped", "conv2", "classifier"]
    assert [layer.name for layer in found.convertible] == CONVERTIBLE
    for known in (found.candidates, found.geometries, found.metrics, found.samples):
        assert list(known) == CONVERTIBLE
    for name, candidates in found.candidates.items():
        geometry = found.geometries[name]
        assert candidates[0].form == KEEP
        assert len(candidates) > 5
        for candidate in candidates:
            assert (candidate.macs, candidate.params) == cost_of(geometry, candidate.form)
            assert np.isfinite(candidate.effect)
        sides = [(8, 8)] * 2 if name != "classifier" else [()] * 2
        assert [geometry.in_shape, geometry.out_shape] == sides
        assert found.metrics[name].shape == (geometry.outputs, geometry.outputs)


def test_a_shortcut_is_seen_though_the_file_has_no_shapes(
    prepared: Callable[..., Prepared],
) -> None:
    found = prepared()
    assert not found.original.graph.value_info
    layer = next(each for each in found.layers if each.name == "conv2")
    assert (layer.shortcut, layer.sum, str(layer.activation)) == ("r1", "s", "relu")
    assert (found.samples["conv2"].target < 0).any()  # before the activation, shortcut and all


def test_costs_of_kept_layers_are_those_that_were_counted(
    prepared: Callable[..., Prepared],
) -> None:
    found = prepared()
    counted = {layer.name: layer for layer in found.cost.layers}
    for name, candidates in found.candidates.items():
        assert candidates[0].macs == counted[name].macs
        assert candidates[0].params == counted[name].params


@pytest.mark.parametrize("batch", ["batch", "4"])
def test_costs_are_those_that_were_counted_where_images_are_folded_into_the_batch(
    prepared: Callable[..., Prepared], batch: str
) -> None:
    found = prepared(with_weights(FRAMES.replace("batch", batch), OF_FRAMES))
    folds = {name: geometry.fold for name, geometry in found.geometries.items()}
    assert folds == {"conv1": 4, "conv2": 4, "window": 4, "token": 32}
    kept = {name: candidates[0].macs for name, candidates in found.candidates.items()}
    assert kept == {layer.name: layer.macs for layer in found.cost.layers}


def test_a_sample_of_a_fixed_batch_may_lie_along_any_axis(
    prepared: Callable[..., Prepared],
) -> None:
    """Three rows for each sample, and four samples: the first axis is no whole number of batches."""
    found = prepared(
        with_weights(
            """<ir_version: 8, opset_import: ["": 17]>
            turned (float[4, 3, 8, 8] image) => (float[3, 4, 16] y) {
                rows = Constant<value_ints = [4, 3, 64]>()
                r = Reshape(image, rows)
                t = Transpose<perm = [1, 0, 2]>(r)
                [only] y = MatMul(t, w)
            }""",
            {"w": (64, 16)},
        )
    )
    assert found.geometries["only"].positions == 3
    assert found.candidates["only"][0].macs == found.cost.macs


def test_layers_that_have_not_the_same_for_each_image_are_left_as_they_are(
    prepared: Callable[..., Prepared],
) -> None:
    """A mean over the batch, and as many rows as there are numbers above zero."""
    found = prepared(
        with_weights(
            """<ir_version: 8, opset_import: ["": 17]>
            uneven (float[batch, 3, 8, 8] image) => (float[batch, 12] y, float m, float s) {
                [even] c = Conv(image, w1)
                p = GlobalAveragePool(c)
                y = Flatten(p)
                mean = ReduceMean<axes = [0]>(y)
                [of_all] g = MatMul(mean, w2)
                m = ReduceMax<keepdims = 0>(g)
                zero = Constant<value_float = 0.0>()
                positive = Greater(image, zero)
                above = NonZero(positive)
                numbers = Cast<to = 1>(above)
                rows = Transpose(numbers)
                [of_some] h = MatMul(rows, w3)
                s = ReduceMax<keepdims = 0>(h)
            }""",
            {"w1": (12, 3, 3, 3), "w2": (12, 8), "w3": (4, 8)},
        )
    )
    assert [layer.name for layer in found.convertible] == ["even"]
    reasons = {layer.name: layer.reason for layer in found.layers}
    assert reasons["of_all"] == reasons["of_some"]
    assert "not the same number of positions for each image" in str(reasons["of_all"])


def test_layers_that_lead_to_no_output_that_is_weighed_count_by_their_own_response(
    prepared: Callable[..., Prepared],
) -> None:
    found = prepared(
        with_weights(
            """<ir_version: 8, opset_import: ["": 17]>
            masked (float[batch, 3, 8, 8] image) => (float[batch, 12] y, int64[batch, 1, 6, 6] mask) {
                [scores] c = Conv(image, w1)
                p = GlobalAveragePool(c)
                y = Flatten(p)
                [map] d = Conv(image, w2)
                mask = ArgMax<axis = 1>(d)
            }""",
            {"w1": (12, 3, 3, 3), "w2": (12, 3, 3, 3)},
        )
    )
    total = float(np.trace(found.samples["map"].covariance))
    np.testing.assert_allclose(found.metrics["map"], np.eye(12) / total)
    assert found.metrics["scores"].any()
    assert any("errors of map reach no output" in note for note in found.notes)
    # so that no form of it is free
    assert min(each.effect for each in found.candidates["map"][1:]) > 1e-6


def test_a_budget_in_macs_is_met_where_images_are_folded_into_the_batch(tmp_path: Path) -> None:
    path, file = tmp_path / "frames.onnx", tmp_path / "images.npy"
    save_model(with_weights(FRAMES, OF_FRAMES), path)
    images = np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)
    np.save(file, images)
    conversion = converter.convert(
        path,
        file,
        tmp_path / "small.onnx",
        Budget(macs=2),
        calibration=CalibrationSettings(batch=16, patches=512),
        solver=SolverSettings(name="data-svd"),
        target=Target(Runtime(threads=1)),
        timing=False,
    )
    assert 2 <= conversion.macs_reduction < 2.5
    saved = sum(layer.macs_before - layer.macs_after for layer in conversion.layers)
    assert saved == conversion.macs_before - conversion.macs_after


def test_a_network_of_one_layer_is_prepared(prepared: Callable[..., Prepared]) -> None:
    found = prepared(
        with_weights(
            """<ir_version: 8, opset_import: ["": 17]>
            one (float[batch, 3, 8, 8] image) => (float[batch, 12, 6, 6] y)
            { [only] y = Conv(image, w) }""",
            {"w": (12, 3, 3, 3)},
        )
    )
    assert found.geometries["only"].in_shape == (8, 8)
    assert found.geometries["only"].out_shape == (6, 6)


def test_an_executor_changes_nothing(prepared: Callable[..., Prepared]) -> None:
    here = prepared()
    with ThreadPoolExecutor(2) as executor:
        there = prepared(executor=executor)
    assert list(there.candidates) == list(here.candidates)
    for name, candidates in here.candidates.items():
        others = there.candidates[name]
        assert [c.form for c in others] == [c.form for c in candidates]
        # threads may add up in another order
        np.testing.assert_allclose(
            [c.effect for c in others], [c.effect for c in candidates], rtol=1e-4
        )


def test_an_error_in_an_executor_comes_through(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(task: object) -> None:
        raise ModelError(f"no forms of {task}")

    monkeypatch.setattr("converter.place.predict", fails)
    for executor in (None, ThreadPoolExecutor(1)):
        with pytest.raises(ModelError, match="no forms of"):
            prepared(executor=executor)
        if executor is not None:
            executor.shutdown()


def test_the_stages_are_timed(prepared: Callable[..., Prepared]) -> None:
    clock = Clock()
    prepared(clock=clock)
    names = [stage.name for stage in clock.stages()]
    assert names == ["normalise", "record the original", "measure effects", "predict forms"]
    assert all(stage.seconds >= 0 for stage in clock.stages())


def test_a_stage_that_comes_again_adds_to_its_time() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.stage("one"):
            pass
    assert [stage.name for stage in clock.stages()] == ["one"]


def test_nothing_to_convert_is_refused_with_the_reason(
    prepared: Callable[..., Prepared],
) -> None:
    none = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        none (float[batch, 3, 8, 8] image) => (float[batch, 3, 8, 8] y) { y = Relu(image) }"""
    )
    with pytest.raises(ModelError, match=r"tiny\.onnx has no Conv, Gemm or MatMul"):
        prepared(none)
    grouped = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        grouped (float[batch, 3, 8, 8] image) => (float[batch, 3, 8, 8] y)
        <float[3, 1, 1, 1] w = {1, 2, 3}> { [only] y = Conv<group = 3>(image, w) }"""
    )
    with pytest.raises(ModelError, match="that can be converted: only: it is a depthwise Conv"):
        prepared(grouped)
