"""The quantized graph: integer weights for each channel, the same interface, what stays in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import QuantType

from converter.config import Runtime
from converter.errors import ModelError
from converter.planner.cost import count_cost
from converter.quantization.integers import (
    ARITHMETICS,
    Arithmetic,
    in_int8,
    layer_groups,
    quantizable_tensors,
    ready_for_int8,
)
from converter.quantization.ranges import Ranges
from converter.runtime import open_session, run
from passes.expose import expose

Network = Callable[..., onnx.ModelProto]
RUNTIME = Runtime(threads=1)
PATH = Path("model.onnx")


def made(
    model: onnx.ModelProto,
    images: NDArray[np.float32],
    arithmetic: Arithmetic = ARITHMETICS[0],
    left: tuple[str, ...] = (),
) -> onnx.ModelProto:
    ready = ready_for_int8(model, PATH)
    names = [name for name in quantizable_tensors(ready) if name != "image"]
    session = open_session(expose(ready, names), RUNTIME)
    ranges = Ranges([*names, "image"])
    found = run(session, names, {"image": images})
    ranges.add({**dict(zip(names, found, strict=True)), "image": images})
    return in_int8(ready, ranges.by("min-max"), arithmetic, left)


def stored(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def answers(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    # unoptimised: computed in float between the two roundings, so that no product saturates
    return run(open_session(model, RUNTIME, optimise=False), None, {"image": images})[0]


@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda each: each.name)
def test_answers_are_near_and_the_model_is_whole(
    network: Network, images: NDArray[np.float32], arithmetic: Arithmetic
) -> None:
    model = network()
    before = model.SerializeToString()
    small = made(model, images, arithmetic)
    assert model.SerializeToString() == before
    onnx.checker.check_model(small, full_check=True)
    assert list(small.graph.input) == list(model.graph.input)
    assert list(small.graph.output) == list(model.graph.output)
    wanted = answers(model, images)
    error = np.square(answers(small, images) - wanted).sum()
    # some ten roundings to 256 (weights: 128) levels each; measured 0.0003 to 0.002
    assert error < 0.01 * np.square(wanted - wanted.mean(0)).sum()
    assert answers(small, images[:1]).shape == (1, 5)


def test_weights_have_a_scale_for_each_channel_and_biases_are_wide(
    network: Network, images: NDArray[np.float32]
) -> None:
    model = network()
    weights = stored(made(model, images))
    float_weight = numpy_helper.to_array(model.graph.initializer[0])
    assert weights["w1_quantized"].dtype == np.int8
    assert weights["w1_scale"].shape == (12,)
    assert weights["b1_quantized"].dtype == np.int32
    scale = weights["w1_scale"].astype(np.float64)[:, None, None, None]
    back = weights["w1_quantized"] * scale
    assert np.abs(back - float_weight).max() <= scale.max() / 2 * 1.001
    assert (np.abs(back - float_weight) <= scale / 2 * 1.001).all()


def test_reduced_weights_have_seven_bits(network: Network, images: NDArray[np.float32]) -> None:
    whole, reduced = (
        stored(made(network(), images, each))["w1_quantized"] for each in ARITHMETICS[:2]
    )
    assert int(np.abs(whole).max()) == 127
    assert int(np.abs(reduced).max()) in (63, 64)


def test_what_is_left_stays_in_float(network: Network, images: NDArray[np.float32]) -> None:
    names = stored(made(network(), images, left=("first", "sum")))
    assert {"w1", "b1", "w2_quantized"} <= names.keys()
    assert "w1_quantized" not in names


def test_cost_is_what_it_was(network: Network, images: NDArray[np.float32]) -> None:
    model = network()
    before, after = count_cost(model), count_cost(made(model, images))
    assert (before.macs, before.params) == (after.macs, after.params)
    assert [each.params for each in before.layers] == [each.params for each in after.layers]


def test_an_old_opset_is_raised(network: Network, images: NDArray[np.float32]) -> None:
    small = made(network(opset=11), images)
    onnx.checker.check_model(small, full_check=True)
    assert next(each.version for each in small.opset_import if not each.domain) == 13
    assert answers(small, images).shape == (60, 5)


def test_an_opset_that_cannot_be_raised_is_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> onnx.ModelProto:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(ModelError, match=r"model\.onnx has opset 11.*no adapter.*export"):
        ready_for_int8(network(opset=11), PATH)


def test_a_refusal_of_the_quantizer_is_one_sentence(
    network: Network, images: NDArray[np.float32]
) -> None:
    ready = ready_for_int8(network(), PATH)
    ranges = Ranges(["image"])
    ranges.add({"image": images})
    with pytest.raises(ModelError, match="onnxruntime's quantizer refuses the model"):
        in_int8(ready, ranges.by("min-max"), ARITHMETICS[0])


def test_groups_keep_what_follows_a_layer(network: Network) -> None:
    groups = layer_groups(ready_for_int8(network(), PATH), 9)
    assert [names[0] for names in groups] == ["first", "left", "down", "up", "last"]
    assert groups[0] == ("first", "relu1")
    assert groups[3][:2] == ("up", "sum")


@given(st.integers(1, 9))
def test_groups_hold_every_node_once(most: int) -> None:
    nodes = [onnx.helper.make_node("Conv", ["x"], ["y"], name=f"conv{at}") for at in range(7)]
    nodes.insert(0, onnx.helper.make_node("Relu", ["x"], ["y"], name="early"))
    nodes.append(onnx.helper.make_node("Unknown", ["x"], ["y"], name="odd"))
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    groups = layer_groups(model, most)
    assert len(groups) == min(most, 7)
    assert [name for names in groups for name in names] == [node.name for node in nodes[:-1]]


def test_every_node_has_a_name_of_its_own(network: Network) -> None:
    model = network()
    for node in model.graph.node:
        node.name = "same"
    names = [node.name for node in ready_for_int8(model, PATH).graph.node]
    assert len(set(names)) == len(names)
    assert "" not in names


def test_arithmetics_are_named_apart() -> None:
    assert len({each.name for each in ARITHMETICS}) == len(ARITHMETICS)
    assert {each.activation for each in ARITHMETICS} == {QuantType.QUInt8, QuantType.QInt8}
