"""Every scheme over many geometries: its cost, its ranks, and its branches as they run in a graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from converter.branches import branches_of_form
from converter.geometry import geometry_of, weight_of
from converter.planner.cost import ModelCost, count_cost, tensor_shapes
from converter.schemes import KEEP, SCHEMES, Form, Geometry, cost_of, families_of
from converter.schemes.base import LONG_PATCH
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Split

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One layer: the shape of its weight, the rest of its input's shape, its attributes.

    Each sample has `fold` inputs of it, which a Reshape folds into the batch.
    """

    op: str
    shape: tuple[int, ...]
    size: tuple[int, ...]
    attributes: str = ""
    bias: bool = True
    fold: int = 1


CASES = {
    "3x3": Case("Conv", (24, 16, 3, 3), (8, 9), "<pads = [1, 1, 1, 1]>"),
    "3x3 valid": Case("Conv", (24, 16, 3, 3), (8, 9)),
    "3x3 stride 2": Case("Conv", (24, 16, 3, 3), (9, 8), "<pads = [1, 1, 1, 1], strides = [2, 2]>"),
    "3x3 dilated": Case(
        "Conv", (12, 8, 3, 3), (9, 8), "<pads = [2, 1, 0, 1], strides = [1, 2], dilations = [2, 1]>"
    ),
    "3x3 same": Case(
        "Conv", (12, 8, 3, 3), (9, 8), '<auto_pad = "SAME_UPPER", strides = [2, 1]>', bias=False
    ),
    "5x5": Case("Conv", (16, 20, 5, 5), (7, 6), "<pads = [2, 2, 2, 2]>", bias=False),
    "7x3": Case("Conv", (16, 10, 7, 3), (9, 6), "<pads = [3, 1, 3, 1], strides = [1, 2]>"),
    "1x7": Case("Conv", (16, 12, 1, 7), (4, 9), "<pads = [0, 3, 0, 3]>"),
    "1x1": Case("Conv", (32, 24, 1, 1), (5, 4)),
    "1x1 stride 2": Case("Conv", (32, 24, 1, 1), (5, 4), "<strides = [2, 2]>"),
    "large": Case("Conv", (144, 128, 3, 3), (4, 4), "<pads = [1, 1, 1, 1]>"),
    "1-D": Case("Conv", (16, 12, 5), (11,), "<pads = [2, 2], strides = [2]>"),
    "3-D": Case("Conv", (12, 8, 3, 3, 2), (4, 5, 4), "<pads = [1, 1, 0, 1, 1, 1]>"),
    "Gemm": Case("Gemm", (40, 64), (), "<transB = 1>"),
    "Gemm without bias": Case("Gemm", (40, 64), (), "<transB = 1>", bias=False),
    "MatMul": Case("MatMul", (24, 32), (5,), bias=False),
    "3x3 of frames": Case("Conv", (24, 16, 3, 3), (9, 8), "<strides = [2, 1]>", fold=4),
    "Gemm of tokens": Case("Gemm", (40, 64), (), "<transB = 1>", fold=6),
    "MatMul of windows": Case("MatMul", (24, 32), (5,), bias=False, fold=3),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EACH_SCHEME = pytest.mark.parametrize("name", SCHEMES)


def model_of(case: Case) -> onnx.ModelProto:
    """A model of one layer and a ReLU, with random weights."""
    inputs = "z, w, b" if case.bias else "z, w"
    given = ", ".join(["batch", *map(str, feed_of(case)["x"].shape[1:])])
    folded = ", ".join(map(str, (-1, *dims_of(case))))
    answered = ", ".join(f"y{axis}" for axis in range(len(case.size) + 2))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (float[{given}] x) => (float[{answered}] y)
        {{
            shape = Constant <value_ints = [{folded}]> ()
            z = Reshape (x, shape)
            [layer] response = {case.op} {case.attributes} ({inputs})
            [relu] y = Relu(response)
        }}"""
    )
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=case.shape)}
    if case.op == "MatMul":
        arrays["w"] = arrays["w"].T
    if case.bias:
        arrays["b"] = rng.normal(size=case.shape[:1])
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
        for name, array in arrays.items()
    )
    onnx.checker.check_model(model)
    return model


def dims_of(case: Case) -> tuple[int, ...]:
    """The layer's input, less its first axis."""
    return (case.shape[1], *case.size) if case.op == "Conv" else (*case.size, case.shape[1])


def feed_of(case: Case, batch: int = 2) -> dict[str, Floats]:
    frames = () if case.fold == 1 else (case.fold,)
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(batch, *frames, *dims_of(case))).astype(np.float32)}


def layer_of(case: Case) -> tuple[Layer, Geometry]:
    model = model_of(case)
    graph = import_graph(model)
    run_passes(graph, normalising())
    (layer,) = find_layers(graph)
    assert layer.reason is None
    shapes = tensor_shapes(model, feed_of(case), ["z", "response"])
    where = slice(2, None) if case.op == "Conv" else slice(1, -1)
    return layer, geometry_of(layer, shapes["z"][where], shapes["response"][where], case.fold)


def converted(case: Case, layer: Layer, branches: Branches) -> onnx.ModelProto:
    model = model_of(case)
    graph = import_graph(model)
    run_passes(graph, [*normalising(), Split(layer, branches)])
    return export_model(graph, model)


def counted(case: Case, model: onnx.ModelProto) -> tuple[float, float]:
    cost: ModelCost = count_cost(model, feed_of(case, batch=1))
    assert not cost.uncounted
    return float(cost.macs), float(cost.params)


def answers(model: onnx.ModelProto, feed: dict[str, Floats]) -> Floats:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    (found,) = session.run(None, feed)
    return np.asarray(found)


def forms_of(geometry: Geometry, name: str) -> list[Form]:
    """The least and the largest rank, and one between, of each family of the scheme."""
    forms = []
    for scheme, support in families_of(geometry, (name,), beside=True):
        ranks = list(scheme.ranks(geometry))
        forms += [Form(name, ranks[at], support) for at in (0, len(ranks) // 2, -1) if ranks]
    return sorted(set(forms))


# ---- cost


@EACH_CASE
def test_the_cost_of_the_layer_is_that_of_its_graph(case: Case) -> None:
    _, geometry = layer_of(case)
    assert cost_of(geometry, KEEP) == counted(case, model_of(case))


@EACH_SCHEME
@EACH_CASE
def test_the_cost_of_a_form_is_that_of_its_graph(case: Case, name: str) -> None:
    layer, geometry = layer_of(case)
    for form in forms_of(geometry, name):
        branches = branches_of_form(geometry, form)
        model = converted(case, layer, branches)
        assert cost_of(geometry, form) == counted(case, model), form
        assert branches.ranks == form.ranks
        assert branches.kept == form.support
        original = answers(model_of(case), feed_of(case))
        assert answers(model, feed_of(case)).shape == original.shape


@EACH_SCHEME
@EACH_CASE
def test_ranks_save_weights_and_anchors_are_some_of_them(case: Case, name: str) -> None:
    _, geometry = layer_of(case)
    scheme = SCHEMES[name]
    ranks, anchors = list(scheme.ranks(geometry)), list(scheme.anchors(geometry))
    assert len(set(ranks)) == len(ranks)
    assert set(anchors) <= set(ranks)
    assert bool(anchors) == bool(ranks)
    assert anchors == sorted(anchors)
    for each in ranks:
        assert scheme.cost(geometry, each)[1] < geometry.outputs * geometry.columns
        assert all(rank < 16 or rank % 4 == 0 for rank in each)
    if name not in ("tucker", "depthwise") and len(ranks) > 1:  # the range of what is interpolated
        assert ranks == sorted(ranks)
        assert anchors[-1][0] > 0.6 * ranks[-1][0]


@EACH_CASE
def test_schemes_apply_where_their_convs_differ_from_the_layer(case: Case) -> None:
    _, geometry = layer_of(case)
    kernel = geometry.kernel
    assert bool(SCHEMES["spatial"].ranks(geometry)) == (len(kernel) == 2 and min(kernel) > 1)
    assert bool(SCHEMES["tucker"].ranks(geometry)) == (geometry.taps > 1)
    wide = geometry.taps > 1 and geometry.columns <= LONG_PATCH
    assert bool(SCHEMES["depthwise"].ranks(geometry)) == wide
    assert SCHEMES["channel"].ranks(geometry)


def test_depthwise_is_for_patches_that_are_not_long() -> None:
    for channels, offered in ((256, True), (257, False)):
        geometry = Geometry("Conv", 64, channels, (3, 3), (4, 4), (4, 4), bias=True)
        assert bool(SCHEMES["depthwise"].ranks(geometry)) == offered


def test_depthwise_filters_channels_in_blocks_of_which_onnxruntime_has_a_kernel() -> None:
    for channels, most in ((64, 2), (256, 1)):
        geometry = Geometry("Conv", 64, channels, (3, 3), (4, 4), (4, 4), bias=True)
        ranks = SCHEMES["depthwise"].ranks(geometry)
        assert {second // first for first, second in ranks} == set(range(1, most + 1))
        assert all(second % first == 0 for first, second in ranks)
        assert all(first == 8 or first % 16 == 0 for first, _ in ranks)


@EACH_CASE
def test_supports_leave_channels_out(case: Case) -> None:
    _, geometry = layer_of(case)
    families = families_of(geometry, tuple(SCHEMES), beside=True)
    assert all(0 <= support < geometry.channels for _, support in families)
    assert all(support for scheme, support in families if scheme.name == "sparse")
    alone = families_of(geometry, tuple(SCHEMES), beside=False)
    assert [pair for pair in families if pair[0].name == "sparse" or not pair[1]] == alone


def test_ranks_and_supports_of_large_layers_are_whole_blocks() -> None:
    _, geometry = layer_of(CASES["large"])
    for name, scheme in SCHEMES.items():
        for ranks in scheme.ranks(geometry):
            assert all(rank < 16 or rank % 16 == 0 for rank in ranks), name
    for _, support in families_of(geometry, tuple(SCHEMES), beside=True):
        assert support % 16 == 0


# ---- the form in the graph


def full_factors(scheme: str, weight: NDArray[np.float64]) -> tuple[tuple[int, ...], list[Floats]]:
    """Full ranks, and factors of the shapes that a fit gives, whose product is the weight."""
    outputs, channels, *kernel = weight.shape
    if scheme == "tucker":
        core = weight.reshape(outputs, channels, -1).transpose(0, 2, 1)
        exact = [np.eye(channels), core, np.eye(outputs)]
        ranks: tuple[int, ...] = (channels, outputs)
    elif scheme == "depthwise":  # a filter for each tap of each channel
        taps = math.prod(kernel)
        by_tap = weight.reshape(outputs, channels, taps).transpose(0, 2, 1).reshape(outputs, -1)
        exact = [np.eye(channels), np.repeat(np.eye(taps), channels, 0), by_tap]
        ranks = (channels, channels * taps)
    else:
        matrix = weight.reshape(outputs, -1)
        if scheme == "spatial":
            matrix = weight.transpose(0, 3, 1, 2).reshape(outputs * kernel[1], channels * kernel[0])
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        ranks = (len(values),)
        left = left * values
        exact = [right, left.reshape(outputs, kernel[1], -1) if scheme == "spatial" else left]
    return ranks, [np.ascontiguousarray(each, np.float32) for each in exact]


def assert_close(found: Floats, wanted: Floats) -> None:
    """Float32 round-off of a few products."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-4 * np.ptp(wanted)


@EACH_CASE
def test_factors_of_full_rank_are_the_layer(case: Case) -> None:
    layer, geometry = layer_of(case)
    for name in ("channel", "spatial", "depthwise", "tucker"):
        scheme = SCHEMES[name]
        if not scheme.ranks(geometry):
            continue  # it does not apply
        ranks, factors = full_factors(name, weight_of(layer).astype(np.float64))
        assert tuple(each.shape for each in factors) == scheme.shapes(geometry, ranks)
        branches = Branches(factors=scheme.subgraph(geometry, factors), bias=layer.bias)
        found = answers(converted(case, layer, branches), feed_of(case))
        assert_close(found, answers(model_of(case), feed_of(case)))


def test_a_form_that_is_timed_neither_fades_nor_grows() -> None:
    _, geometry = layer_of(CASES["large"])
    for form in (Form("channel", (32,)), Form("spatial", (32,)), Form("tucker", (32, 32))):
        patches = np.random.default_rng(2).normal(size=(500, geometry.columns))
        weight: NDArray[np.float64] | None = None
        for factor in branches_of_form(geometry, form).factors:
            dense = factor.weight.astype(np.float64)
            weight = dense if weight is None else np.einsum("nr...,rc...->nc...", dense, weight)
        assert weight is not None
        size = (patches @ weight.reshape(len(weight), -1).T).std()
        assert 0.3 < size < 10  # each factor has gain 1.5 ** 0.5
