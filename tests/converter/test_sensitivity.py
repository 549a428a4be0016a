"""The metric of a linear network in closed form, and what it predicts of another one's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import CalibrationSet
from converter.config import Preprocessing
from converter.differentiable import TorchGraph, UnsupportedOperatorError
from converter.errors import CalibrationError
from converter.progress import Advance
from converter.runtime import model_inputs
from converter.sensitivity import OutputMetrics, output_metrics, output_sources

Floats = NDArray[np.float32]


def build(graph: str, weights: dict[str, Floats] | None = None, opset: int = 17) -> onnx.ModelProto:
    """Model from text whose graph inputs named in `weights` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {graph}')
    for name, values in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    return model


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


Stack = Callable[..., CalibrationSet]


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """Open random samples, or given ones, for a model."""

    def opened(model: onnx.ModelProto, samples: Floats | int = 40, seed: int = 9) -> CalibrationSet:
        inputs = model_inputs(model)
        if isinstance(samples, int):
            samples = normal(seed, samples, *(int(n) for n in inputs[0].shape[1:] if n))
        path = tmp_path / f"samples{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, samples)
        return open_calibration_set(path, inputs, Preprocessing())

    return opened


LINEAR = "g (float[batch,2,4,4] x, float[3,2,3,3] w, float[48,5] u) => (float[batch,5] y) { "
LINEAR += "a = Conv <pads=[1,1,1,1]> (x, w) f = Flatten (a) y = MatMul (f, u) }"
LINEAR_WEIGHTS = {"w": normal(1, 3, 2, 3, 3), "u": normal(2, 48, 5)}


def outputs_of(model: onnx.ModelProto, samples: Floats, name: str = "y") -> NDArray[np.float64]:
    with torch.no_grad():
        outputs, _ = TorchGraph(model, outputs=[name]).forward({"x": torch.tensor(samples)})
    return outputs[name].numpy().astype(np.float64).reshape(len(samples), -1)


def total_variance(rows: NDArray[np.float64]) -> float:
    return float(rows.var(axis=0).sum())


def test_a_linear_network_has_its_metric_in_closed_form(stack: Stack) -> None:
    """Ω = Σ over positions of U_p U_pᵀ / variance, whatever the image."""
    model = build(LINEAR, LINEAR_WEIGHTS)
    samples = normal(3, 400, 2, 4, 4)
    found = output_metrics(
        model, {"a": 1, "y": -1}, stack(model, samples), projections=10, batch=160
    )
    variance = total_variance(outputs_of(model, samples))
    by_position = LINEAR_WEIGHTS["u"].astype(np.float64).reshape(3, 16, 5)
    wanted = np.einsum("npk,mpk->nm", by_position, by_position) / variance
    # 4000 draws of v: an element of the mean of vvᵀ is off by √(2/4000) = 2 % of a diagonal one.
    np.testing.assert_allclose(found.metric["a"], wanted, atol=0.06 * wanted.max())
    np.testing.assert_allclose(found.metric["y"], np.eye(5) / variance, atol=0.08 / variance)
    assert found.metric["a"].dtype == np.float64
    np.testing.assert_array_equal(found.metric["a"], found.metric["a"].T)
    assert (found.outputs, found.images, found.projections, found.left_out) == (("y",), 400, 10, {})


def test_a_softmax_of_what_is_fed_is_no_response() -> None:
    model = build("g (float[n,3] x) => (float[n,3] y) { y = Softmax (x) }")
    assert output_sources(model) == ({"y": "y"}, {})


def test_one_number_for_each_image_tells_them_apart(stack: Stack) -> None:
    text = LINEAR.replace("(float[batch,5] y)", "(float[batch] z)").replace(
        "y = MatMul (f, u) }", "y = MatMul (f, u) z = ReduceSum <keepdims=0> (y, axis) }"
    )
    one, other = (
        build(source, {**LINEAR_WEIGHTS, "axis": np.array([1])})
        for source in (
            text,
            text.replace("float[batch] z", "float[batch,1] z").replace("=0>", "=1>"),
        )
    )
    samples = normal(3, 40, 2, 4, 4)
    found, wanted = (
        output_metrics(model, {"a": 1}, stack(model, samples)).metric["a"] for model in (one, other)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


CURVED = """
g (float[batch,2,6,6] x, float[4,2,3,3] w, float[3,4,3,3] v, float[6,3] u) => (float[batch,6] y) {
  a = Conv <pads=[1,1,1,1]> (x, w)
  r = Relu (a)
  p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r)
  b = Conv (p, v)
  t = Tanh (b)
  m = GlobalAveragePool (t)
  f = Flatten (m)
  y = Gemm <transB=1> (f, u)
}
"""
CURVED_WEIGHTS = {
    "w": normal(1, 4, 2, 3, 3) / 4,
    "v": normal(2, 3, 4, 3, 3) / 6,
    "u": normal(3, 6, 3),
}


@pytest.mark.parametrize("response", ["a", "b"])
def test_it_predicts_what_small_errors_do_to_the_outputs(response: str, stack: Stack) -> None:
    """tr(ΩC) against noise of covariance C at the response, through the rest of the network."""
    model = build(CURVED, CURVED_WEIGHTS)
    samples = normal(5, 200, 2, 6, 6)
    metric = output_metrics(
        model, {response: 1}, stack(model, samples), projections=20, batch=100
    ).metric[response]
    graph = TorchGraph(model)
    with torch.no_grad():
        clean, tapped = graph.forward({"x": torch.tensor(samples)}, taps=[response])
    value = tapped[response].detach()
    mixing = normal(6, len(metric), len(metric))
    covariance = (mixing.astype(np.float64) @ mixing.T) * 1e-6  # 0.1 % of the response's size
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    names = [node.output[0] for node in rest.graph.node]
    del rest.graph.node[: names.index(response) + 1]
    del rest.graph.input[:]
    rest.graph.input.append(onnx.ValueInfoProto(name=response))
    after = TorchGraph(rest)
    errors = []
    for seed in range(20):
        noise = normal(100 + seed, *value.movedim(1, -1).shape) @ mixing.T * 1e-3
        with torch.no_grad():
            moved, _ = after.forward({response: value + torch.tensor(noise).movedim(-1, 1)})
        errors.append(float((moved["y"] - clean["y"]).square().sum(1).mean()))
    measured = np.mean(errors) / total_variance(clean["y"].numpy().astype(np.float64))
    # Both sides are means over 4000 draws whose squares spread like a few degrees of freedom do:
    # some 2 to 3 % each; 12 % is four times that.
    assert np.trace(metric @ covariance) == pytest.approx(measured, rel=0.12)


def test_batches_and_the_memory_bound_change_nothing_but_rounding(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(CURVED, CURVED_WEIGHTS)
    sizes = []
    forward = TorchGraph.forward

    def spied(self, feeds, taps=()):
        sizes.append(len(feeds["x"]))
        return forward(self, feeds, taps)

    monkeypatch.setattr(TorchGraph, "forward", spied)
    whole = output_metrics(model, {"a": 1}, stack(model, 30), batch=30).metric["a"]
    parts = output_metrics(model, {"a": 1}, stack(model, 30), batch=7).metric["a"]
    assert sizes == [30, 7, 7, 7, 7, 2]
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-9)
    sizes.clear()
    # So much that two images pass 1 MiB: 2 · 300 000 bytes each.
    monkeypatch.setattr(TorchGraph, "activation_bytes", lambda *_: 300_000)
    bound = output_metrics(model, {"a": 1}, stack(model, 5), memory_mib=1).metric["a"]
    assert sizes == [1] * 5
    free = output_metrics(model, {"a": 1}, stack(model, 5), memory_mib=1024).metric["a"]
    np.testing.assert_allclose(bound, free, rtol=1e-5, atol=1e-9)


def test_a_fixed_batch_is_filled_and_the_filling_weighs_nothing(stack: Stack) -> None:
    free = build(LINEAR, LINEAR_WEIGHTS)
    fixed = build(LINEAR.replace("batch", "4"), LINEAR_WEIGHTS)
    samples = normal(4, 10, 2, 4, 4)
    wanted = output_metrics(free, {"a": 1}, stack(free, samples))
    found = output_metrics(fixed, {"a": 1}, stack(fixed, samples))
    assert found.images == 10
    np.testing.assert_allclose(found.metric["a"], wanted.metric["a"], rtol=1e-5)


def test_seeds_and_the_number_of_images(stack: Stack) -> None:
    model = build(LINEAR, LINEAR_WEIGHTS)
    data = stack(model, 40)

    def metric(**how: int) -> NDArray[np.float64]:
        return output_metrics(model, {"a": 1}, data, **how).metric["a"]

    np.testing.assert_array_equal(metric(seed=3), metric(seed=3))
    assert np.abs(metric(seed=3) - metric(seed=4)).max() > 0
    assert output_metrics(model, {"a": 1}, data, images=12).images == 12


def test_a_softmax_is_passed_over(stack: Stack) -> None:
    """Scores so sure that their softmax has no gradient left."""
    with_softmax = LINEAR.replace("y = MatMul (f, u)", "s = MatMul (f, u) y = Softmax (s)")
    weights = {**LINEAR_WEIGHTS, "u": 1000 * LINEAR_WEIGHTS["u"]}
    plain = build(LINEAR, weights)
    sure = build(with_softmax, weights)
    samples = normal(4, 20, 2, 4, 4)
    found = output_metrics(sure, {"a": 1, "s": -1}, stack(sure, samples))
    wanted = output_metrics(plain, {"a": 1, "y": -1}, stack(plain, samples))
    assert found.outputs == ("s",)
    np.testing.assert_allclose(found.metric["a"], wanted.metric["a"], rtol=1e-6)
    np.testing.assert_allclose(found.metric["s"], wanted.metric["y"], rtol=1e-6)


def test_several_outputs_each_count_in_their_own_units(stack: Stack) -> None:
    """One output, and it again a million times as large: the mean of equals is the same."""
    text = (
        "g (float[n,3] x, float[3,4] w) => (float[n,4] y, float[n,4] z, int64[n] c, float[n,4] k) "
    )
    text += "<float big = {1000000}, float none = {0}> { y = MatMul (x, w) z = Mul (y, big) "
    text += "c = ArgMax <axis=1, keepdims=0> (y) k = Mul (y, none) }"
    model = build(text, {"w": normal(1, 3, 4)})
    single = build(
        "g (float[n,3] x, float[3,4] w) => (float[n,4] y) { y = MatMul (x, w) }",
        {"w": normal(1, 3, 4)},
    )
    samples = normal(2, 50, 3)
    found = output_metrics(model, {"y": -1}, stack(model, samples), projections=40)
    variance = total_variance(outputs_of(single, samples))
    np.testing.assert_allclose(found.metric["y"], np.eye(4) / variance, atol=0.1 / variance)
    assert found.outputs == ("y", "z")
    assert found.left_out == {
        "c": "it is not of floating-point type",
        "k": "it does not vary over the images",
    }


def test_a_response_that_reaches_no_output_weighs_nothing(stack: Stack) -> None:
    """One that feeds a class alone, and one that a zero hides."""
    text = "g (float[n,3] x, float[3,4] w) => (float[n,3] y, int64[n] c) "
    text += "{ d = MatMul (x, w) c = ArgMax <axis=1, keepdims=0> (d) y = Relu (x) }"
    model = build(text, {"w": normal(1, 3, 4)})
    found = output_metrics(model, {"d": -1, "y": -1}, stack(model, 20))
    np.testing.assert_array_equal(found.metric["d"], np.zeros((4, 4)))
    assert found.metric["y"].shape == (3, 3)
    assert np.trace(found.metric["y"]) > 0


def test_gradients_far_from_one_keep_their_squares(stack: Stack) -> None:
    """Gradients of 1e-25 and 1e25: their squares leave float32, the metric does not."""
    for factor in (1e-25, 1e25):
        weights = {**LINEAR_WEIGHTS, "u": (LINEAR_WEIGHTS["u"] * factor).astype(np.float32)}
        model = build(LINEAR, weights)
        data = stack(model, 20, seed=1)
        plain = output_metrics(build(LINEAR, LINEAR_WEIGHTS), {"a": 1}, data)
        found = output_metrics(model, {"a": 1}, data)
        np.testing.assert_allclose(found.metric["a"], plain.metric["a"], rtol=1e-4)


def test_what_is_not_finite_is_named(stack: Stack) -> None:
    root = build("g (float[n,3] x) => (float[n,3] y) { a = Relu (x) y = Sqrt (a) }")
    with pytest.raises(CalibrationError, match="gradient at 'a' is not finite"):
        output_metrics(root, {"a": -1}, stack(root, 20))
    lost = build("g (float[n,3] x) => (float[n,3] y) { a = Neg (x) y = Sqrt (a) }")
    with pytest.raises(CalibrationError, match="'y' is not finite on a calibration image"):
        output_metrics(lost, {"a": -1}, stack(lost, 20))


def test_models_and_images_without_an_answer(stack: Stack) -> None:
    classes = build("g (float[n,3] x) => (int64[n] c) { c = ArgMax <axis=1, keepdims=0> (x) }")
    with pytest.raises(UnsupportedOperatorError, match="no output of the model is of floating"):
        output_metrics(classes, {}, stack(classes, 20))
    model = build(LINEAR, LINEAR_WEIGHTS)
    alike = np.repeat(normal(1, 1, 2, 4, 4), 5, axis=0)
    with pytest.raises(CalibrationError, match=r"tells the 5 images apart .*'y': it does not vary"):
        output_metrics(model, {"a": 1}, stack(model, alike))
    mixed = build("g (float[n,3] x) => (float[3] y) { y = ReduceMean <axes=[0], keepdims=0> (x) }")
    with pytest.raises(CalibrationError, match="'y': it has not one row for each image"):
        output_metrics(mixed, {"y": -1}, stack(mixed, 20))
    with pytest.raises(ValueError, match="has no tensor 'nothing'"):
        output_metrics(model, {"nothing": 1}, stack(model, 20))
    for wrong in ({"images": 1}, {"projections": 0}, {"batch": 0}, {"memory_mib": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .* is below"):
            output_metrics(model, {"a": 1}, stack(model, 20), **wrong)


class Noted:
    """A progress that notes what it is told."""

    def __init__(self) -> None:
        self.total = 0
        self.steps: list[int] = []

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        del title
        self.total = total

        def advance(steps: int = 1, note: str = "") -> None:
            del note
            self.steps.append(steps)

        yield advance


def test_progress_counts_images(stack: Stack) -> None:
    model = build(LINEAR, LINEAR_WEIGHTS)
    noted = Noted()
    output_metrics(model, {"a": 1}, stack(model, 20), batch=8, progress=noted)
    assert (noted.total, noted.steps) == (20, [8, 8, 4])


def test_a_trained_network(shared: Path, stack: Stack) -> None:
    """Every response of ResNet-20 has a metric; the last one's is that of the logits themselves."""
    model = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    convs = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    found: OutputMetrics = output_metrics(
        model, {**dict.fromkeys(convs, 1), "logits": -1}, stack(model, 8), batch=4
    )
    for name in convs:
        eigenvalues = np.linalg.eigvalsh(found.metric[name])
        assert eigenvalues[-1] > 0
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
    assert found.metric["logits"].shape == (10, 10)
