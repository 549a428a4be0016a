"""Balanced factors: the same answers, even channels, and less error in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter import Runtime, Target
from converter.model_file import save_model
from converter.quantization import ranged
from converter.quantization.balance import Pair, balanced, find_pairs, largest_by_channel
from converter.runtime import open_session, run
from passes.expose import expose

Network = Callable[..., onnx.ModelProto]
Array = NDArray[np.float32]
RUNTIME = Runtime(threads=1)


def answers(model: onnx.ModelProto, name: str, images: Array) -> Array:
    outputs = [] if name in {each.name for each in model.graph.output} else [name]
    (found,) = run(open_session(expose(model, outputs), RUNTIME), [name], {"image": images})
    return np.asarray(found)


def uneven(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the channels between the factors "down" and "up" very different; the answers stay."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    scale = np.array([100.0, 1.0, 0.01], np.float32)
    for tensor in changed.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name == "w3":
            tensor.CopyFrom(numpy_helper.from_array(values * scale[:, None, None, None], "w3"))
        if tensor.name == "w4":
            tensor.CopyFrom(numpy_helper.from_array(values / scale[:, None, None], "w4"))
    return changed


def test_pairs_are_factors_with_nothing_between(network: Network) -> None:
    assert find_pairs(network()) == [Pair("down", "up", "d")]


@pytest.mark.parametrize(
    "change",
    ["the response is an output", "it has another reader", "the weight is shared", "groups"],
)
def test_what_cannot_be_scaled_is_no_pair(network: Network, change: str) -> None:
    model = network()
    nodes = {node.name: node for node in model.graph.node}
    if change == "the response is an output":
        value = onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, None)
        model.graph.output.append(value)
    elif change == "it has another reader":
        model.graph.node.append(onnx.helper.make_node("Relu", ["d"], ["other"], name="other"))
    elif change == "the weight is shared":
        model.graph.node.append(onnx.helper.make_node("Relu", ["w3"], ["other"], name="other"))
    else:
        nodes["up"].attribute.append(onnx.helper.make_attribute("group", 3))
    assert find_pairs(model) == []


def test_answers_stay_and_channels_are_even(network: Network, images: Array) -> None:
    model = uneven(network())
    before = model.SerializeToString()
    largest = largest_by_channel({"d": answers(model, "d", part)} for part in np.split(images, 4))
    even = balanced(model, find_pairs(model), largest)
    assert model.SerializeToString() == before
    wanted = answers(model, "scores", images)
    # float32 round-off of four layers
    np.testing.assert_allclose(
        answers(even, "scores", images), wanted, atol=1e-4 * np.abs(wanted).max()
    )
    responses = np.abs(answers(even, "d", images)).max((0, 2, 3))
    weights = {each.name: numpy_helper.to_array(each) for each in even.graph.initializer}
    np.testing.assert_allclose(responses, np.abs(weights["w4"]).max((0, 2, 3)), rtol=1e-4)
    assert largest["d"].max() / largest["d"].min() > 100 * responses.max() / responses.min()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1), st.integers(0, 1), st.integers(0, 3))
def test_gemms_are_balanced_however_their_weights_lie(first: int, second: int, dead: int) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[n, 5] image) => (float[n, 4] scores) {{
            [one] h = Gemm <transB = {first}> (image, a, c)
            [two] scores = Gemm <transB = {second}> (h, b)
        }}"""
    )
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((4, 3))
    a *= np.array([[50.0], [1.0], [0.1]])
    if dead < 3:
        b[:, dead] = 0  # a channel that nothing reads has no scale
    stored = {"a": a if first else a.T, "b": b if second else b.T, "c": rng.standard_normal(3)}
    for name, values in stored.items():
        model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        )
    images = rng.standard_normal((40, 5)).astype(np.float32)
    even = balanced(
        model, find_pairs(model), largest_by_channel([{"h": answers(model, "h", images)}])
    )
    assert even != model
    wanted = answers(model, "scores", images)
    np.testing.assert_allclose(
        answers(even, "scores", images), wanted, atol=1e-5 * np.abs(wanted).max()
    )


def test_uneven_factors_lose_less(
    network: Network,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(uneven(network()), files[0])

    def error() -> float:
        quantized = converter.quantize(
            *(files[0], files[0], files[1], tmp_path / "out.onnx"),
            target=Target(RUNTIME),
            timing=False,
        )
        assert quantized.balanced in (0, 1)
        return min(each.error for each in quantized.trials if not each.left)

    with_balance = error()
    monkeypatch.setattr(ranged, "find_pairs", lambda _: [])
    assert with_balance < 0.5 * error()
