from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.reorder_sums import ReorderSums
from passes.split import Branches, Split

Run = Callable[..., dict[str, np.ndarray]]
Exact = Callable[..., Branches]

FEEDS = {"x": np.random.default_rng(5).normal(size=(1, 3, 8, 8)).astype(np.float32)}
WEIGHTS = {
    "v": (32, 3, 3, 3),
    "a": (32, 32, 1, 1),
    "b": (32, 32, 1, 1),
    "c": (32, 32, 1, 1),
    "d": (32, 32, 1, 1),
    "u": (4, 32, 1, 1),
}


def build(body: str) -> onnx.ModelProto:
    """Model that computes y from i, the activation of a Conv, and some of the weights above."""
    text = f"g (float x) => (float y) {{ h = Conv(x, v) i = Relu(h) {body} y = Conv(z, u) }}"
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        onnx.parser.parse_graph(text).node,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 6, 6))],
        [
            numpy_helper.from_array((rng.normal(size=shape) / 8).astype(np.float32), name)
            for name, shape in WEIGHTS.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def reordered(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    graph = import_graph(model)
    result = ReorderSums()(graph)
    changed = export_model(graph, model)
    onnx.checker.check_model(changed, full_check=True)
    return changed, result


def left_over(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Count the Adds and Relus that onnxruntime keeps."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return Counter(node.op_type for node in nodes if node.op_type in ("Add", "Sum", "Relu"))


CONVS = "p = Conv(i, a) q = Conv(i, b) "
MORE = "r = Conv(i, c) s = Conv(i, d) "
REORDERED = {
    "identity": CONVS + "t = Add(p, q) w = Add(t, i) z = Relu(w)",
    "identity first": CONVS + "t = Add(p, q) w = Add(i, t) z = Relu(w)",
    "Sum": CONVS + "t = Add(p, q) w = Sum(t, i) z = Relu(w)",
    "two split layers": CONVS + MORE + "t = Add(p, q) e = Add(r, s) w = Add(t, e) z = Relu(w)",
    "one block after another": CONVS
    + "t = Add(p, q) w = Add(t, i) m = Relu(w) "
    + "r = Conv(m, c) s = Conv(m, d) e = Add(r, s) f = Add(e, m) z = Relu(f)",
}


@pytest.mark.parametrize("body", REORDERED.values(), ids=REORDERED.keys())
def test_every_add_finds_a_conv(run: Run, tmp_path: Path, body: str) -> None:
    model = build(body)
    changed, result = reordered(model)
    assert result.modified
    assert len(changed.graph.node) == len(model.graph.node)
    # A handful of float32 numbers summed in another order.
    np.testing.assert_allclose(run(changed, FEEDS)["y"], run(model, FEEDS)["y"], rtol=0, atol=1e-5)
    names = [name for node in changed.graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert "t" not in names
    assert not reordered(changed)[1].modified
    if platform.machine().lower() in ("x86_64", "amd64"):  # what it fuses was read off there
        assert left_over(model, tmp_path)
        assert not left_over(changed, tmp_path)


KEPT = {
    "a sum of two Convs": CONVS + "t = Add(p, q) z = Relu(t)",
    "a Conv as shortcut": CONVS + "r = Conv(i, c) t = Add(p, q) w = Add(t, r) z = Relu(w)",
    "the inner sum is seen": CONVS + "t = Add(p, q) w = Add(t, i) o = Relu(t) z = Add(w, o)",
    "a Conv is seen": CONVS + "t = Add(p, q) w = Add(t, i) o = Relu(p) z = Add(w, o)",
    "no Conv in it": "o = Relu(i) t = Add(o, i) w = Add(t, i) z = Relu(w)",
    "twice the same": "p = Conv(i, a) t = Add(p, p) w = Add(t, i) z = Relu(w)",
    "twice the sum": CONVS + "t = Add(p, q) w = Add(t, t) z = Relu(w)",
}


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT.keys())
def test_other_sums_stay(body: str) -> None:
    model = build(body)
    changed, result = reordered(model)
    assert not result.modified
    assert changed.SerializeToString() == model.SerializeToString()


def test_a_shortcut_that_cannot_enter_a_conv_is_told() -> None:
    model = build(CONVS + "o = Neg(i) t = Add(p, q) w = Add(t, o) z = Relu(w)")
    changed, result = reordered(model)
    assert changed.SerializeToString() == model.SerializeToString()
    assert [(skip.node, skip.why) for skip in result.skips] == [
        ("w", "'o' is not in the layout that a Conv could add")
    ]


def test_an_output_between_the_adds_stays() -> None:
    model = build(REORDERED["identity"])
    model.graph.output.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, (1, 32, 6, 6)))
    assert not reordered(model)[1].modified


def test_a_split_residual_network_fuses_as_the_original_did(
    run: Run, exact: Exact, shared: Path, tmp_path: Path
) -> None:
    model = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    graph = import_graph(model)
    run_passes(graph, normalising())

    def half(layer: Layer) -> Branches:
        return exact(layer, "parts")

    for layer in find_layers(graph)[:-1]:
        Split(layer, half(layer))(graph)
    plain = export_model(graph, model)
    result = ReorderSums()(graph)
    # Pads stand in the way from the second stage on.
    assert (len(result.changes), len(result.skips)) == (3, 6)
    changed = export_model(graph, model)
    feeds = {"input": np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)}
    wanted = run(model, feeds)["logits"]
    # Nineteen layers, each to float32 round-off.
    assert np.abs(run(changed, feeds)["logits"] - wanted).max() <= 1e-4 * np.ptp(wanted)
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert left_over(plain, tmp_path) == {"Add": 9, "Relu": 9}
        assert left_over(changed, tmp_path) == {"Add": 6, "Relu": 6}  # as in the original
