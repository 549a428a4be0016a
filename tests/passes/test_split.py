from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from passes.base import PassError
from passes.exchange import import_graph
from passes.layers import find_layers
from passes.split import Branches, Factor, Split
from tests.passes.splitting import Exact, Run, assert_same, build, chain, random, split


def test_new_names_are_new_to_subgraphs_too(run: Run, exact: Exact) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}, bool c = {1}> {
            h = MatMul(x, w)
            y = If(c) <then_branch = t () => (float[2, 2] p) { p = Relu(h) },
                       else_branch = e () => (float[2, 2] q) { q = Neg(h) }>
        }"""
    )
    then = model.graph.node[1].attribute[0].g
    then.node[0].name = "h/up"
    then.node[0].output[0] = then.output[0].name = "h/down/weight"
    onnx.checker.check_model(model, full_check=True)
    changed, _ = split(model, lambda layer: exact(layer, "low rank"))
    assert [node.name for node in changed.graph.node] == ["h/down", "h/up_1", ""]
    assert "h/down/weight_1" in [tensor.name for tensor in changed.graph.initializer]
    assert_same(run, model, changed)


def test_layers_are_split_one_after_another(run: Run, exact: Exact) -> None:
    arrays = {"v": random(5, 3, 3, 3), "w": random(4, 5, 1, 1, seed=2), "b": random(5)}
    model = build("h = Conv(x, v, b) i = Relu(h) y = Conv(i, w)", arrays, x=(1, 3, 6, 6), ir=3)
    changed, results = split(model, lambda layer: exact(layer, "overlap"))
    assert len(results) == 2
    assert len({node.name for node in changed.graph.node}) == len(changed.graph.node) == 11
    assert_same(run, model, changed)


def test_a_bias_that_others_read_stays_for_them(run: Run, exact: Exact) -> None:
    arrays = {"v": random(4, 3, 1, 1), "b": random(4)}
    model = build("h = Conv(x, v, b) r = ReduceMax(b) y = Add(h, r)", arrays, x=(1, 3, 4, 4))
    changed, _ = split(model, lambda layer: exact(layer, "low rank"))
    assert {"b", "h/bias"} <= {tensor.name for tensor in changed.graph.initializer}
    assert_same(run, model, changed)


def test_losing_an_input_is_said(exact: Exact) -> None:
    model = build(
        "y = Conv(x, w, b)", {"w": random(4, 3, 1, 1), "b": random(4)}, x=(1, 3, 4, 4), ir=3
    )
    model.ir_version = 8  # the old habit of listing weights, under rules that let callers set them
    changed, results = split(model, lambda layer: exact(layer, "low rank"))
    assert [value.name for value in changed.graph.input] == ["x"]
    assert results[0].changes[0].what.endswith("; the model no longer has the input w, b")


def test_denormal_weights_become_zero() -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 1, 1)}, x=(1, 3, 4, 4))
    tiny = np.full((1, 3, 1, 1), 1e-40)
    tiny[0, 0] = 1e-37  # small, yet normal
    up = np.array([1e-50, -1e-39, 1.0, 0.0]).reshape(4, 1, 1, 1)
    changed, _ = split(model, lambda _: Branches(factors=chain(tiny, up)))
    stored = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    assert stored["y/down/weight"].dtype == np.float32
    np.testing.assert_array_equal(
        stored["y/down/weight"].reshape(-1), np.array([1e-37, 0, 0], np.float32)
    )
    np.testing.assert_array_equal(stored["y/up/weight"].reshape(-1), [0, 0, 1, 0])


def low_rank(*shapes: tuple[int, ...], **others: np.ndarray) -> Branches:
    """Branches with factors of ones; the first has all the kernel."""
    return Branches(factors=chain(*map(np.ones, shapes)), **others)


def test_a_layer_that_cannot_be_converted_is_refused() -> None:
    model = build("y = Conv<group = 3>(x, w)", {"w": random(6, 1, 1, 1)}, x=(1, 3, 4, 4))
    layer = find_layers(import_graph(model))[0]
    with pytest.raises(ValueError, match="layer 'y' cannot be converted: it is a depthwise Conv"):
        Split(layer, Branches(factors=chain(np.ones((1, 1, 1, 1)), np.ones((6, 1, 1, 1)))))


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (low_rank((2, 5, 3, 3), (4, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 1, 1), (4, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 3, 3), (5, 2, 1, 1)), "the factors of shapes"),
        (low_rank((2, 3, 3), (4, 2, 1)), "the factors of shapes"),
        (Branches(np.array([0, 3]), np.ones((4, 2, 3, 3))), "the sparse branch of shape"),
        (Branches(np.array([0, 1]), np.ones((4, 2, 1, 1))), "the sparse branch of shape"),
    ],
)
def test_branches_of_another_layer_are_refused(branches: Branches, message: str) -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 3, 3)}, x=(1, 3, 4, 4))
    layer = find_layers(import_graph(model))[0]
    with pytest.raises(ValueError, match=message):
        Split(layer, branches)


PAIR = chain(np.ones((2, 3)), np.ones((4, 2)))
"""Factors of a matrix (4, 3)."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither branch is given"),
        ({"bias": np.ones(4)}, "neither branch is given"),
        ({"support": np.array([0])}, "needs both its support and its weight"),
        ({"factors": chain(np.ones((2, 3)))}, "a single factor is no low-rank branch"),
        ({"support": np.array([0.0]), "sparse": np.ones((4, 1))}, "not a list of int64"),
        ({"support": np.array([], int), "sparse": np.ones((4, 0))}, "not a list of int64"),
        ({"support": np.array([1, 0]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([1, 1]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([-1, 1]), "sparse": np.ones((4, 2))}, "ascending order"),
        ({"support": np.array([0, 1]), "sparse": np.ones((4, 3))}, "does not fit a support"),
        ({"factors": chain(np.ones((2, 3)), np.ones((4, 3)))}, "do not chain"),
        ({"factors": chain(np.ones((2, 3)), np.ones((4, 2, 1)))}, "do not chain"),
        (
            {"factors": chain(np.ones((2, 3)), np.ones((2, 2)), np.ones((4, 3)))},
            "shapes \\(2, 2\\) and \\(4, 3\\) do not chain",
        ),
        (
            {"factors": chain(np.ones((2, 3, 3)), np.ones((4, 2, 1)), axes=((0,), (0,)))},
            "take over the axes \\[0, 0\\], not each of 1 exactly once",
        ),
        (
            {"factors": chain(np.ones((2, 3, 3, 1)), np.ones((4, 2, 1, 1)), axes=((0,), ()))},
            "take over the axes \\[0\\], not each of 2 exactly once",
        ),
        (
            {"factors": (Factor(np.ones((2, 1, 3)), (0,), 1), Factor(np.ones((4, 2, 1))))},
            "reads each channel alone",
        ),
        (
            {
                "factors": (
                    Factor(np.ones((2, 3, 1))),
                    Factor(np.ones((6, 1, 3)), (0,), 2),
                    Factor(np.ones((4, 6, 1))),
                )
            },
            "do not chain",
        ),
        ({"factors": PAIR, "bias": np.ones(5)}, "differ in their outputs"),
        ({"factors": PAIR, "bias": np.ones((4, 1))}, "not a vector"),
        ({"factors": PAIR, "bias": np.full(4, np.nan)}, "not finite"),
        ({"factors": PAIR, "select": "conv"}, "nothing selects channels by 'conv' here"),
        ({"factors": PAIR, "select": "slice"}, "nothing selects channels by 'slice' here"),
        (
            {"support": np.array([0]), "sparse": np.ones((4, 1, 3)), "factors": PAIR},
            "differ in their kernels",
        ),
    ],
)
def test_branches_that_do_not_fit_together_are_refused(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Branches(**given)


@pytest.mark.parametrize("shape", [(5, 1, 3), (4, 2, 3), (4, 1)])
def test_a_factor_that_is_not_so_many_filters_is_refused(shape: tuple[int, ...]) -> None:
    axes = tuple(range(len(shape) - 2))
    with pytest.raises(ValueError, match="is not 2 filters for each of its channels"):
        Factor(np.ones(shape), axes, 2)


@pytest.mark.parametrize(
    ("weight", "axes", "message"),
    [
        (np.ones(3), (), "is not \\(out, in, \\*kernel\\)"),
        (np.ones((0, 3)), (), "is not \\(out, in, \\*kernel\\)"),
        (np.ones((2, 3)), (0,), "are not some of its 0 spatial axes"),
        (np.ones((2, 3, 3)), (-1,), "are not some of its 1 spatial axes"),
        (np.ones((2, 3, 3)), (0, 0), "are not some of its 1 spatial axes"),
        (np.ones((2, 3, 1, 3)), (0,), "has a kernel along axis 1"),
        (np.full((4, 2), np.nan), (), "not finite"),
        (np.full((4, 2), 1e39), (), "not finite"),
        (np.ones((2, 3), int), (), "not a floating-point array"),
    ],
)
def test_a_factor_with_another_kernel_than_its_axes_is_refused(
    weight: np.ndarray, axes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Factor(weight, axes)


def test_the_size_of_the_branches_is_told() -> None:
    support, sparse = np.array([0, 2]), np.ones((4, 2))
    factors = chain(np.ones((3, 5)), np.ones((2, 3)), np.ones((4, 2)))
    assert Branches(support, sparse, factors).kept == 2
    assert Branches(support, sparse, factors).ranks == (3, 2)
    assert Branches(support, sparse).ranks == ()
    assert Branches(factors=factors).kept == 0


def test_a_graph_without_the_layer_is_refused(exact: Exact) -> None:
    model = build("y = Conv(x, w)", {"w": random(4, 3, 1, 1)}, x=(1, 3, 4, 4))
    graph = import_graph(model)
    layer = find_layers(graph)[0]
    once = Split(layer, exact(layer, "parts"))
    once(graph)
    with pytest.raises(PassError, match="the graph has no Conv 'y' that writes 'y'"):
        once(graph)
