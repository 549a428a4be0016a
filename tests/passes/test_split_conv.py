from __future__ import annotations

import platform
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from passes.exchange import export_model, import_graph
from passes.layers import find_layers
from passes.split import Branches, Factor, Split
from tests.passes.splitting import (
    WAYS,
    Exact,
    Run,
    assert_same,
    build,
    chain,
    names,
    ops,
    optimised,
    random,
    split,
)

SCHEMES = ["channel", "spatial", "depthwise", "tucker"]

KERNEL = ((0, 3), (1, 5))
"""Axes and lengths of a kernel for factors of any kind."""


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_conv_is_replaced_exactly(run: Run, exact: Exact, data: st.DataObject) -> None:
    small = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    kernel = data.draw(small | st.sampled_from([[1, 7], [7, 1], [5, 5], [5]]), label="kernel")
    axes = len(kernel)

    def each(strategy: st.SearchStrategy[int], count: int, label: str) -> list[int]:
        return data.draw(st.lists(strategy, min_size=count, max_size=count), label=label)

    attributes = [f"strides = {each(st.integers(1, 3), axes, 'strides')}"]
    padding = data.draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID", "none"]))
    if padding == "pads":
        attributes.append(f"pads = {each(st.integers(0, 2), 2 * axes, 'pads')}")
    elif padding != "none":
        attributes.append(f'auto_pad = "{padding}"')
    if not padding.startswith("SAME"):  # onnxruntime has no dilation with SAME padding
        attributes.append(f"dilations = {each(st.integers(1, 2), axes, 'dilations')}")
    if data.draw(st.booleans(), label="kernel_shape"):
        attributes.append(f"kernel_shape = {kernel}")
    outputs, channels = each(st.integers(1, 9), 2, "outputs, channels")
    arrays = {"w": random(outputs, channels, *kernel)}
    operands = "x, w"
    if data.draw(st.booleans(), label="bias"):
        operands, arrays["b"] = "x, w, b", random(outputs, seed=2)
    sides = [13 if length > 3 else 7 for length in kernel]  # room for a dilated kernel
    model = build(
        f"h = Conv<{', '.join(attributes)}>({operands}) y = Relu(h)",
        arrays,
        x=(2, channels, *sides),
        opset=data.draw(st.sampled_from([7, 11, 17]), label="opset"),
        ir=data.draw(st.sampled_from([3, 8]), label="ir"),
    )
    way = data.draw(st.sampled_from(WAYS), label="way")
    scheme = data.draw(st.sampled_from(SCHEMES), label="scheme")
    select = data.draw(st.sampled_from(["gather", "conv"]), label="select")
    changed, _ = split(model, lambda layer: replace(exact(layer, way, scheme), select=select))
    assert_same(run, model, changed)
    selects = way in ("parts", "overlap") and channels > 1
    assert ("Gather" in ops(changed)) == (selects and select == "gather")
    assert ("h/select" in names(changed)) == (selects and select == "conv")
    assert changed.graph.node[-2].output == ["h"]
    assert changed.graph.output == model.graph.output


@pytest.mark.parametrize(
    "axes",
    [
        ((), (0, 1), ()),
        ((0,), (1,), ()),
        ((1,), (0,), ()),
        ((), (1,), (0,)),
        ((0,), (), (1,)),
        ((), (), (1, 0)),
        ((), (0,), (), (1,)),
    ],
)
@pytest.mark.parametrize("padding", ["pads = [0, 2, 3, 1], dilations = [2, 1]", "SAME_LOWER"])
def test_any_factor_may_take_over_any_axis(
    run: Run, axes: tuple[tuple[int, ...], ...], padding: str
) -> None:
    if padding.startswith("SAME"):
        padding = f'auto_pad = "{padding}"'
    widths = [5, *range(3, 2 + len(axes)), 4]
    factors = chain(
        *(
            random(
                widths[i + 1], widths[i], *(side if axis in own else 1 for axis, side in KERNEL)
            ).astype(np.float64)
            for i, own in enumerate(axes)
        ),
        axes=axes,
    )
    product = factors[0].weight
    for factor in factors[1:]:
        # The kernels broadcast: along each axis all but one of them have length 1.
        product = (factor.weight[:, :, None] * product[None]).sum(1)
    model = build(
        f"h = Conv<strides = [3, 2], {padding}>(x, w, b) y = Relu(h)",
        {"w": product.astype(np.float32), "b": random(4)},
        x=(2, 5, 14, 13),
    )
    changed, _ = split(model, lambda layer: Branches(factors=factors, bias=layer.bias))
    assert_same(run, model, changed)
    assert ops(changed) == [*["Conv"] * len(axes), "Relu"]


@pytest.mark.parametrize("filters", [1, 2])
def test_filters_of_each_channel_read_it_repeated(run: Run, filters: int) -> None:
    model = build(
        "h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b) y = Relu(h)",
        {"w": random(16, 8, 3, 3), "b": random(16, seed=2)},
        x=(1, 8, 7, 7),
    )
    width = 4 * filters
    factors = (
        Factor(random(4, 8, 1, 1)),
        Factor(random(width, 1, 3, 3), (0, 1), filters),
        Factor(random(16, width, 1, 1)),
    )
    changed, results = split(model, lambda layer: Branches(factors=factors, bias=layer.bias))
    repeat = ["Concat"] if filters > 1 else []
    assert ops(changed) == ["Conv", *repeat, "Conv", "Conv", "Relu"]
    _, middle, last = (node for node in changed.graph.node if node.op_type == "Conv")
    attributes = {each.name: helper.get_attribute_value(each) for each in middle.attribute}
    assert (attributes["group"], attributes["strides"]) == (width, [2, 2])
    assert (len(middle.input), len(last.input)) == (2, 3)
    said = " ".join(change.what for result in results for change in result.changes)
    assert f"factors of rank 4×{width}" in said

    # the same layer, whole: a channel of the first factor comes once for each filter, all before any twice
    first, each, last_weight = (factor.weight for factor in factors)
    dense = np.einsum(
        "nq,qhw,qc->nchw",
        last_weight[..., 0, 0],
        each[:, 0],
        np.tile(first[..., 0, 0], (filters, 1)),
    )
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    weight = next(each for each in whole.graph.initializer if each.name == "w")
    weight.CopyFrom(numpy_helper.from_array(dense.astype(np.float32), "w"))
    assert_same(run, whole, changed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pointwise_conv_is_replaced_exactly(
    run: Run, exact: Exact, way: str, scheme: str
) -> None:
    body = "y = Conv<strides = [2, 2]>(x, w, b)"
    model = build(body, {"w": random(6, 5, 1, 1), "b": random(6)}, x=(2, 5, 7, 7))
    changed, _ = split(model, lambda layer: exact(layer, way, scheme))
    assert_same(run, model, changed)


def test_the_nodes_are_those_that_were_promised(exact: Exact) -> None:
    model = build(
        "h = Conv<pads = [1, 1, 1, 1]>(x, w, b) y = Relu(h)",
        {"w": random(6, 4, 3, 3), "b": random(6)},
        x=(1, 4, 5, 5),
    )
    model.graph.node[0].name = "conv1"
    changed, results = split(model, lambda layer: exact(layer, "parts"))
    assert [(node.name, node.op_type, list(node.output)) for node in changed.graph.node] == [
        ("conv1/gather", "Gather", ["conv1/gather_output"]),
        ("conv1/sparse", "Conv", ["conv1/sparse_output"]),
        ("conv1/down", "Conv", ["conv1/down_output"]),
        ("conv1/up", "Conv", ["conv1/up_output"]),
        ("conv1/sum", "Add", ["h"]),
        ("", "Relu", ["y"]),
    ]
    assert [len(node.input) for node in changed.graph.node] == [2, 2, 2, 3, 2, 1]  # bias once
    assert [tensor.name for tensor in changed.graph.initializer] == [
        "conv1/bias",
        "conv1/down/weight",
        "conv1/sparse/weight",
        "conv1/support",
        "conv1/up/weight",
    ]
    assert [(c.node, c.what) for c in results[0].changes] == [
        ("conv1", "Conv became a sparse branch of 2 of 4 channels and factors of rank 6")
    ]


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def test_each_factor_has_the_attributes_of_its_axes(exact: Exact) -> None:
    body = "y = Conv<strides = [2, 3], pads = [1, 2, 3, 4], dilations = [2, 1]>(x, w)"
    model = build(body, {"w": random(6, 4, 3, 5)}, x=(1, 4, 9, 9))
    changed, _ = split(model, lambda layer: exact(layer, "low rank", "spatial"))
    assert names(changed) == ["y/down", "y/up"]
    down, up = (attributes_of(node) for node in changed.graph.node)
    assert (down["kernel_shape"], up["kernel_shape"]) == ([3, 1], [1, 5])
    assert (down["strides"], up["strides"]) == ([2, 1], [1, 3])
    assert (down["pads"], up["pads"]) == ([1, 0, 3, 0], [0, 2, 0, 4])
    assert (down["dilations"], up["dilations"]) == ([2, 1], [1, 1])


def test_three_factors_and_a_selecting_conv_have_their_names(exact: Exact) -> None:
    model = build("y = Conv(x, w, b)", {"w": random(6, 4, 3, 3), "b": random(6)}, x=(1, 4, 5, 5))
    model.graph.node[0].name = "conv1"
    changed, results = split(
        model, lambda layer: replace(exact(layer, "parts", "tucker"), select="conv")
    )
    roles = ["select", "sparse", "in", "core", "out", "sum"]
    assert names(changed) == [f"conv1/{role}" for role in roles]
    assert [len(node.input) for node in changed.graph.node] == [2, 2, 2, 2, 3, 2]  # bias once
    stored = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    one_hot = stored["conv1/select/weight"]
    assert one_hot.shape == (2, 4, 1, 1)
    assert (one_hot.sum(), one_hot.max()) == (2, 1)
    assert [(c.node, c.what) for c in results[0].changes] == [
        ("conv1", "Conv became a sparse branch of 2 of 4 channels and factors of rank 4×6")
    ]


on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="what onnxruntime fuses was read off on x86",
)


@on_x86
@pytest.mark.parametrize(
    ("channels", "outputs", "kept", "rank", "activation"),
    [
        (64, 64, 16, 16, "Relu"),
        (64, 64, 16, 16, "HardSwish"),
        (32, 48, 32, 16, "Relu"),  # all channels: no Gather
        (64, 64, 0, 32, "Relu"),  # no Add at all
        (60, 62, 20, 12, "Relu"),  # multiples of 4
        (30, 44, 6, 6, "Relu"),  # below the block
        (60, 60, 6, 30, "Relu"),  # the 1×1 Conv outside of the blocked layout
        (60, 60, 30, 6, "Relu"),  # S outside of it
        (60, 60, 30, 30, "Relu"),  # both
        (60, 60, 30, 30, "LeakyRelu"),
    ],
)
def test_onnxruntime_fuses_the_sum_and_the_activation_into_a_conv(
    tmp_path: Path, channels: int, outputs: int, kept: int, rank: int, activation: str
) -> None:
    factors = chain(random(rank, channels, 3, 3), random(outputs, rank, 1, 1))
    found = optimised_between_convs(tmp_path, factors, activation, kept)
    assert set(found) <= {"Conv", "FusedConv", "Gather", "ReorderInput", "ReorderOutput"}
    assert found["Conv"] + found["FusedConv"] == (5 if kept else 4)
    assert found["Gather"] == (0 < kept < channels)


@on_x86
@pytest.mark.parametrize(
    ("scheme", "kept", "ranks"),
    [
        ("spatial", 16, (16,)),
        ("spatial", 16, (30,)),  # the last factor outside of the blocked layout
        ("spatial", 30, (16,)),  # S outside of it
        ("spatial", 30, (30,)),  # both
        ("spatial", 0, (30,)),
        ("tucker", 16, (16, 32)),
        ("tucker", 16, (30, 16)),  # the middle factor outside of it: it takes no sum
        ("tucker", 16, (16, 30)),
        ("tucker", 30, (30, 16)),
        ("tucker", 0, (16, 32)),
    ],
)
def test_onnxruntime_fuses_the_sum_behind_any_chain(
    tmp_path: Path, scheme: str, kept: int, ranks: tuple[int, ...]
) -> None:
    if scheme == "spatial":
        weights = (random(*ranks, 64, 3, 1), random(64, *ranks, 1, 3))
        factors = chain(*weights, axes=((0,), (1,)))
    else:
        first, second = ranks
        weights = (random(first, 64, 1, 1), random(second, first, 3, 3), random(64, second, 1, 1))
        factors = chain(*weights, axes=((), (0, 1), ()))
    found = optimised_between_convs(tmp_path, factors, "Relu", kept)
    assert set(found) <= {"Conv", "FusedConv", "Gather", "ReorderInput", "ReorderOutput"}
    assert found["Conv"] + found["FusedConv"] == 2 + len(factors) + (kept > 0)


@on_x86
def test_a_selecting_conv_stays_in_the_blocked_layout(tmp_path: Path) -> None:
    factors = chain(random(16, 64, 3, 3), random(64, 16, 1, 1))
    counts = {
        select: optimised_between_convs(tmp_path, factors, "Relu", 32, select)
        for select in ("gather", "conv")
    }
    assert counts["gather"] == {"Conv": 5, "Gather": 1, "ReorderInput": 1, "ReorderOutput": 2}
    assert counts["conv"] == {"Conv": 6, "ReorderOutput": 1}  # that of the model's output


def optimised_between_convs(
    folder: Path, factors: tuple[Factor, ...], activation: str, kept: int, select: str = "gather"
) -> Counter[str]:
    """Operators that onnxruntime leaves of Conv, split 3×3 Conv, activation, Conv."""
    channels, outputs = factors[0].weight.shape[1], len(factors[-1].weight)
    arrays = {
        "v": random(channels, 3, 3, 3),
        "w": random(outputs, channels, 3, 3),
        "b": random(outputs),
        "u": random(8, outputs, 3, 3),
    }
    body = f"h = Conv(x, v) i = Relu(h) j = Conv(i, w, b) k = {activation}(j) y = Conv(k, u)"
    model = build(body, arrays, x=(1, 3, 16, 16))
    graph = import_graph(model)
    layer = next(layer for layer in find_layers(graph) if layer.output == "j")
    branches = Branches(
        support=np.arange(kept) if kept else None,
        sparse=random(outputs, kept, 3, 3) if kept else None,
        factors=factors,
        bias=layer.bias,
        select=select,
    )
    Split(layer, branches)(graph)
    changed = export_model(graph, model)
    assert {activation, *(["Add"] if kept else [])} <= set(ops(changed))
    return Counter(ops(optimised(changed, folder)))
