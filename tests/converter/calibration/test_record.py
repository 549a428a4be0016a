from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from converter.calibration.gather import Inputs, Sample
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.calibration.sets import Batch, fixed_batch
from converter.config import CalibrationSettings, Preprocessing, Runtime
from converter.errors import CalibrationError
from converter.runtime import model_inputs
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.expose import expose
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import Layer, find_layers
from passes.normalise import normalising
from passes.split import Branches, Factor, Split

ONE_THREAD = Runtime(threads=1)

# Optimised and plain graphs, and the sums of numpy and onnxruntime, differ by float32 round-off:
# some units in the last place of the largest number for the few hundred products of a patch.
CLOSE = 2e-5


class Stacks:
    """A calibration set of arrays in memory."""

    class_names = None

    def __init__(self, announced: int | None = None, **stacks: NDArray[Any]) -> None:
        self.stacks = stacks
        self.count = len(next(iter(stacks.values())))
        self.announced = self.count if announced is None else announced
        self.passes = 0

    def __len__(self) -> int:
        return self.announced

    def batches(self, size: int) -> Iterator[Batch]:
        self.passes += 1
        for start in range(0, self.count, size):
            feeds = {name: stack[start : start + size] for name, stack in self.stacks.items()}
            yield Batch(feeds, None, len(next(iter(feeds.values()))))

    def describe(self) -> str:
        return "arrays of a test"

    def digest(self) -> str:
        return "0"


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parsed(text: str, weights: Mapping[str, NDArray[Any]], opset: int = 17) -> onnx.ModelProto:
    """Model from the text of its graph and its weights, with shapes inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    model.graph.initializer.extend(
        numpy_helper.from_array(weight, name) for name, weight in weights.items()
    )
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    """Layers that can be converted, by the tensor they write."""
    found = find_layers(import_graph(model))
    return {layer.output: layer for layer in found if layer.reason is None}


def tensors_of(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Tensors of a model run plainly: one batch, without the optimiser."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    inner = [name for name in names if name not in feeds]
    session = ort.InferenceSession(
        expose(model, inner).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = dict(zip(inner, session.run(inner, dict(feeds)), strict=True))
    return {name: found[name] if name in found else feeds[name] for name in names}


def with_weight(model: onnx.ModelProto, name: str, weight: NDArray[Any]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(weight, name))
    return changed


def at_positions(op: str, tensor: NDArray[Any], sample: Sample) -> NDArray[Any]:
    """Channels of a whole tensor at the positions of a sample, image by image."""
    images = len(sample.positions)
    last = np.moveaxis(tensor, 1, -1) if op == "Conv" else tensor
    by_image = last.reshape(images, -1, last.shape[-1])
    return np.concatenate(
        [rows[places] for rows, places in zip(by_image, sample.positions, strict=True)]
    )


def answers(layer: Layer, inputs: Inputs) -> NDArray[np.float32]:
    """What the layer makes of the recorded patches, the shortcut included."""
    assert layer.weight is not None
    response = inputs.features @ layer.weight.reshape(len(layer.weight), -1).T
    if layer.bias is not None:
        response = response + layer.bias
    return response if inputs.offset is None else response + inputs.offset


def assert_close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def half(layer: Layer, seed: int = 0) -> Branches:
    """Branches that are far from the layer's weight: a rank of 2."""
    assert layer.weight is not None
    outputs, *patch = layer.weight.shape
    axes = len(patch) - 1
    factors = (
        Factor(0.3 * normal(2, *patch, seed=seed), tuple(range(axes))),
        Factor(0.3 * normal(outputs, 2, *[1] * axes, seed=seed + 1)),
    )
    return Branches(factors=factors, bias=layer.bias)


def split(model: onnx.ModelProto, layer: Layer, seed: int = 0) -> onnx.ModelProto:
    graph = import_graph(model)
    Split(layer, half(layer, seed))(graph)
    return export_model(graph, model)


# Patches -------------------------------------------------------------------------------------


def brute_force_patches(
    image: NDArray[Any],
    out_shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    begins: Sequence[int],
    dilations: Sequence[int],
) -> NDArray[Any]:
    """All patches of one image (C, *spatial), element by element: (P, C, *kernel)."""
    sides = image.shape[1:]
    patches = np.zeros((math.prod(out_shape), len(image), *kernel), image.dtype)
    for row, place in enumerate(product(*map(range, out_shape))):
        for tap in product(*map(range, kernel)):
            source = [
                p * s + t * d - b
                for p, s, t, d, b in zip(place, strides, tap, dilations, begins, strict=True)
            ]
            if all(0 <= at < side for at, side in zip(source, sides, strict=True)):
                patches[(row, slice(None), *tap)] = image[(slice(None), *source)]
    return patches


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))

    def numbers(low: int, high: int, count: int = axes) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    case = {
        "channels": draw(st.integers(1, 3)),
        "sides": numbers(3, 9 if axes < 3 else 6),
        "kernel": numbers(1, 3),
        "strides": numbers(1, 3),
        "dilations": numbers(1, 2),
        "auto_pad": draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])),
        "pads": numbers(0, 2, 2 * axes),
        "seed": draw(st.integers(0, 2**16)),
    }
    padded = case["auto_pad"].startswith("SAME")
    if padded:  # onnxruntime takes no dilations beside it
        case["dilations"] = [1] * axes
    for side, kernel, dilation in zip(
        case["sides"], case["kernel"], case["dilations"], strict=True
    ):
        assume(padded or side >= (kernel - 1) * dilation + 1)
    return case


def conv_model(case: Mapping[str, Any]) -> onnx.ModelProto:
    axes = len(case["kernel"])
    weight = normal(4, case["channels"], *case["kernel"], seed=case["seed"])
    attributes = {name: case[name] for name in ("strides", "dilations", "auto_pad")}
    if case["auto_pad"] == "NOTSET":
        attributes["pads"] = case["pads"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", **attributes)],
        "one",
        [
            helper.make_tensor_value_info(
                "x", TensorProto.FLOAT, ["n", case["channels"], *case["sides"]]
            )
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (axes + 2))],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(normal(4, seed=case["seed"] + 1), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=convolutions())
def test_patches_are_those_of_the_runtime(case: dict[str, Any]) -> None:
    model = conv_model(case)
    layer = layers_of(model)["y"]
    images = normal(3, case["channels"], *case["sides"], seed=case["seed"] + 2)
    # At most 86 positions of an image: all of them for small sides, a part for large ones.
    recorder = Recorder(Stacks(x=images), CalibrationSettings(patches=256, batch=2), ONE_THREAD)

    sample = recorder.originals(model, [layer])["conv"]
    inputs = recorder.inputs(model, layer, sample)

    response = tensors_of(model, {"x": images}, ["y"])["y"]
    assert sample.out_shape == response.shape[2:]
    assert_close(sample.target, at_positions("Conv", response, sample))
    assert_close(answers(layer, inputs), sample.target)
    if case["auto_pad"] in ("NOTSET", "VALID"):
        begins = layer.pads[: len(sample.out_shape)]
        if case["auto_pad"] == "VALID":
            begins = (0,) * len(begins)
        wanted = [
            brute_force_patches(
                image, sample.out_shape, case["kernel"], case["strides"], begins, case["dilations"]
            )[places]
            for image, places in zip(images, sample.positions, strict=True)
        ]
        np.testing.assert_array_equal(
            inputs.features, np.concatenate(wanted).reshape(len(inputs.features), -1)
        )


def test_positions_are_distinct_ascending_and_seeded() -> None:
    model = residual()
    layers = list(layers_of(model).values())
    data = Stacks(x=normal(20, 3, 8, 8))

    def drawn(seed: int) -> dict[str, Sample]:
        options = CalibrationSettings(patches=256, seed=seed)
        return Recorder(data, options, ONE_THREAD).originals(model, layers)

    samples = drawn(0)
    for sample in samples.values():
        assert sample.positions.shape == (20, 13)  # ceil(256 / 20)
        assert sample.positions.dtype == np.int64
        assert (np.diff(sample.positions, axis=1) > 0).all()
        assert 0 <= sample.positions.min() <= sample.positions.max() < 64
    again = drawn(0)
    for name, sample in samples.items():
        np.testing.assert_array_equal(sample.positions, again[name].positions)
        np.testing.assert_array_equal(sample.target, again[name].target)
    first, second = list(samples.values())[:2]
    assert (first.positions != second.positions).any()
    assert (first.positions != next(iter(drawn(1).values())).positions).any()


def test_every_position_is_drawn_about_as_often() -> None:
    model = chain(1)
    layer = layers_of(model)["y0"]
    data = Stacks(x=np.zeros((600, 2, 3, 5), np.float32))
    recorder = Recorder(data, CalibrationSettings(patches=2400), ONE_THREAD)
    positions = recorder.originals(model, [layer])["conv0"].positions
    counts = np.bincount(positions.ravel(), minlength=15)
    # 4 of 15 positions of 600 images: 150 or 200 for parts of 4 and 3 positions, ±5 deviations.
    assert counts.min() > 150 - 5 * math.sqrt(150)
    assert counts.max() < 200 + 5 * math.sqrt(200)


# Other operators -----------------------------------------------------------------------------


def test_rows_of_gemm_and_matmul() -> None:
    model = parsed(
        """
        g (float[n, 5, 6] x) => (float[n, 3] out) {
            [mm] m = MatMul(x, w)
            y = Add(m, b)
            r = Relu(y)
            [axes] axes = Constant<value_ints = [1]>()
            p = ReduceMean<axes = [1], keepdims = 0>(r)
            [fc] out = Gemm<transB = 1, alpha = 0.5>(p, v, c)
        }
        """,
        {
            "w": normal(6, 4, seed=1),
            "b": normal(4, seed=2),
            "v": normal(3, 4, seed=3),
            "c": normal(3, seed=4),
        },
    )
    layers = layers_of(model)
    x = normal(30, 5, 6)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(patches=256, batch=8), ONE_THREAD)

    samples = recorder.originals(model, list(layers.values()))

    whole = tensors_of(model, {"x": x}, ["y", "out"])
    assert samples["mm"].out_shape == (5,)
    assert samples["mm"].positions.shape == (30, 5)
    assert samples["fc"].out_shape == ()
    assert samples["fc"].positions.shape == (30, 1)
    assert_close(samples["mm"].target, at_positions("MatMul", whole["y"], samples["mm"]))
    assert_close(samples["fc"].target, whole["out"])
    for layer in layers.values():
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
        assert inputs.features.dtype == np.float32


def test_images_folded_into_the_batch_have_more_positions() -> None:
    model = parsed(
        """
        g (float[n, 2, 3, 6, 6] x) => (float[m, 4, 6, 6] y) {
            shape = Constant<value_ints = [-1, 3, 6, 6]>()
            z = Reshape(x, shape)
            [conv] y = Conv<pads = [1, 1, 1, 1]>(z, w)
        }
        """,
        {"w": normal(4, 3, 3, 3, seed=1)},
    )
    layer = layers_of(model)["y"]
    x = normal(5, 2, 3, 6, 6)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(patches=300, batch=2), ONE_THREAD)
    sample = recorder.originals(model, [layer])["conv"]
    assert sample.positions.shape == (5, 60)
    assert sample.positions.max() > 36
    response = tensors_of(model, {"x": x}, ["y"])["y"].reshape(5, 2, 4, 36)
    wanted = response.transpose(0, 1, 3, 2).reshape(5, 72, 4)
    rows = np.concatenate([r[p] for r, p in zip(wanted, sample.positions, strict=True)])
    assert_close(sample.target, rows)
    assert_close(answers(layer, recorder.inputs(model, layer, sample)), sample.target)


def test_a_response_without_the_batch_is_refused() -> None:
    model = parsed(
        """
        g (float[n, 6] x) => (float[1, 3] y) {
            s = ReduceMean<axes = [0], keepdims = 1>(x)
            [fc] y = Gemm(s, w)
        }
        """,
        {"w": normal(6, 3)},
    )
    recorder = Recorder(Stacks(x=normal(7, 6)), CalibrationSettings(batch=4), ONE_THREAD)
    with pytest.raises(CalibrationError, match=r"'fc'.*leave"):
        recorder.originals(model, list(layers_of(model).values()))


# Moments and coordinates ---------------------------------------------------------------------


def test_moments_are_those_of_the_own_response() -> None:
    model = residual(offset=1000.0)  # a large mean, which a naive sum of squares would not survive
    layers = layers_of(model)
    x = normal(30, 3, 8, 8)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(patches=600, batch=7), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    whole = tensors_of(model, {"x": x}, ["y1", "y2", "ys"])
    for output, layer in layers.items():
        sample = samples[layer.name]
        own = at_positions("Conv", whole[output], sample).astype(np.float64)
        assert sample.mean.dtype == sample.covariance.dtype == np.float64
        np.testing.assert_allclose(sample.mean, own.mean(axis=0), rtol=1e-4, atol=1e-4)
        wanted = np.cov(own.T, bias=True)
        # Responses near 1000 carry float32 steps of 6e-5.
        np.testing.assert_allclose(sample.covariance, wanted, atol=1e-3 * np.abs(wanted).max())


def test_features_in_the_coordinates_of_a_basis() -> None:
    model = residual()
    layer = layers_of(model)["y2"]
    recorder = Recorder(Stacks(x=normal(9, 3, 8, 8)), CalibrationSettings(batch=4), ONE_THREAD)
    sample = recorder.originals(model, [layer])["conv2"]
    patches = recorder.inputs(model, layer, sample).features
    basis = normal(5, patches.shape[1], seed=3)
    features = recorder.inputs(model, layer, sample, basis).features
    assert features.dtype == np.float32
    assert_close(features, patches @ basis.T)


def test_patches_of_a_large_batch_are_gathered_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    layer = layers_of(model)["y2"]
    data = Stacks(x=normal(9, 3, 8, 8))

    def features() -> NDArray[Any]:
        recorder = Recorder(data, CalibrationSettings(batch=4), ONE_THREAD)
        sample = recorder.originals(model, [layer])["conv2"]
        return recorder.inputs(model, layer, sample).features

    whole = features()
    # 50 patches of 4·9 numbers: neither a divisor of the 64 positions of an image nor a multiple.
    monkeypatch.setattr("converter.calibration.patches.CHUNK_BYTES", 50 * 36 * 4)
    np.testing.assert_array_equal(features(), whole)


# Graphs with branches ------------------------------------------------------------------------


def residual(*, shortcut_first: bool = False, offset: float = 0.0) -> onnx.ModelProto:
    """conv1 → Relu → (conv2 + 1×1 convs) → Relu; the shortcut behind or before conv2 in order."""
    own = "[conv2] y2 = Conv<pads = [1, 1, 1, 1]>(a, w2, b2)"
    other = "[convs] ys = Conv(a, ws)"
    order = [other, own] if shortcut_first else [own, other]
    text = f"""
        g (float[n, 3, 8, 8] x) => (float[n, 6, 8, 8] out) {{
            [conv1] y1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
            a = Relu(y1)
            {order[0]}
            {order[1]}
            s = Add(y2, ys)
            out = Relu(s)
        }}
    """
    return parsed(
        text,
        {
            "w1": normal(4, 3, 3, 3, seed=1),
            "w2": normal(6, 4, 3, 3, seed=2),
            "b2": normal(6, seed=3) + np.float32(offset),
            "ws": normal(6, 4, 1, 1, seed=4),
        },
    )


def chain(depth: int, channels: int = 2, side: str = "h, w") -> onnx.ModelProto:
    """Conv → Relu, `depth` times."""
    lines = []
    tensor = "x"
    for index in range(depth):
        lines.append(
            f"[conv{index}] y{index} = Conv<pads = [1, 1, 1, 1]>({tensor}, w{index})\n"
            f"a{index} = Relu(y{index})"
        )
        tensor = f"a{index}"
    text = (
        f"g (float[n, {channels}, {side}] x) => (float[n, {channels}, {side}] {tensor})"
        f" {{ {' '.join(lines)} }}"
    )
    # Scaled so that activations neither grow nor fade.
    scale = np.float32(math.sqrt(2 / (9 * channels)))
    weights = {f"w{i}": scale * normal(channels, channels, 3, 3, seed=i) for i in range(depth)}
    return parsed(text, weights)


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_shortcut_before_and_behind_the_layer(shortcut_first: bool) -> None:
    model = residual(shortcut_first=shortcut_first)
    layers = layers_of(model)
    assert layers["y2"].shortcut == "ys"
    assert layers["ys"].shortcut == "y2"
    x = normal(10, 3, 8, 8)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(batch=4, patches=256), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    whole = tensors_of(model, {"x": x}, ["s", "y1"])
    assert_close(samples["conv1"].target, at_positions("Conv", whole["y1"], samples["conv1"]))
    assert_close(samples["conv2"].target, at_positions("Conv", whole["s"], samples["conv2"]))
    current = model
    for layer in layers.values():
        sample = samples[layer.name]
        inputs = recorder.inputs(current, layer, sample)
        names = [layer.input, layer.output] + ([layer.shortcut] if layer.shortcut else [])
        now = tensors_of(current, {"x": x}, names)
        own = at_positions("Conv", now[layer.output], sample)
        if layer.shortcut is None:
            assert inputs.offset is None
            assert_close(answers(layer, inputs), own)
        else:
            assert inputs.offset is not None
            other = at_positions("Conv", now[layer.shortcut], sample)
            assert_close(inputs.offset, other)
            assert_close(answers(layer, inputs), own + other)
        if layer.name != "conv1":
            assert np.abs(answers(layer, inputs) - sample.target).max() > 0.1
        current = split(current, layer)
    assert recorder.describe()["cuts"] == {"stored": 3, "too_large": 0, "runs_from_start": 1}


def test_a_shortcut_may_be_the_input_of_the_model() -> None:
    model = parsed(
        """
        g (float[n, 3, 5, 5] x) => (float[n, 3, 5, 5] out) {
            [conv] y = Conv<pads = [1, 1, 1, 1]>(x, w)
            out = Add(y, x)
        }
        """,
        {"w": normal(3, 3, 3, 3)},
    )
    layer = layers_of(model)["y"]
    x = normal(6, 3, 5, 5)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(batch=4), ONE_THREAD)
    sample = recorder.originals(model, [layer])["conv"]
    assert_close(
        sample.target, at_positions("Conv", tensors_of(model, {"x": x}, ["out"])["out"], sample)
    )
    inputs = recorder.inputs(model, layer, sample)
    assert inputs.offset is not None
    np.testing.assert_array_equal(inputs.offset, at_positions("Conv", x, sample))


def test_shapes_that_cross_the_cuts_fit_a_last_batch_that_is_smaller() -> None:
    model = parsed(
        """
        g (float[n, 2, 4, 4] x) => (float[n, 3] out) {
            shape = Shape(x)
            zero = Constant<value_int = 0>()
            count = Gather(shape, zero)
            [conv1] y1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
            a1 = Relu(y1)
            [conv2] y2 = Conv<pads = [1, 1, 1, 1]>(a1, w2)
            a2 = Relu(y2)
            axes = Constant<value_ints = [0]>()
            counts = Unsqueeze(count, axes)
            rest = Constant<value_ints = [-1]>()
            wanted = Concat<axis = 0>(counts, rest)
            flat = Reshape(a2, wanted)
            [fc] out = Gemm(flat, w3)
        }
        """,
        {
            "w1": normal(2, 2, 3, 3, seed=1),
            "w2": normal(2, 2, 3, 3, seed=2),
            "w3": normal(32, 3, seed=3),
        },
    )
    layers = layers_of(model)
    recorder = Recorder(
        Stacks(x=normal(10, 2, 4, 4)), CalibrationSettings(batch=4, patches=256), ONE_THREAD
    )
    samples = recorder.originals(model, list(layers.values()))
    for layer in layers.values():
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
    assert recorder.describe()["cuts"] == {"stored": 3, "too_large": 0, "runs_from_start": 1}


# Cuts ----------------------------------------------------------------------------------------


def test_later_inputs_follow_replaced_layers() -> None:
    model = chain(4)
    layers = layers_of(model)
    x = normal(11, 2, 6, 7)
    data = Stacks(x=x)
    recorder = Recorder(data, CalibrationSettings(batch=4, patches=256), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    before = data.passes
    current = model
    for index, layer in enumerate(layers.values()):
        inputs = recorder.inputs(current, layer, samples[layer.name])
        fresh = Recorder(Stacks(x=x), CalibrationSettings(batch=11), ONE_THREAD)
        assert_close(inputs.features, fresh.inputs(current, layer, samples[layer.name]).features)
        now = tensors_of(current, {"x": x}, [layer.output])[layer.output]
        assert_close(answers(layer, inputs), at_positions("Conv", now, samples[layer.name]))
        if index:
            unchanged = fresh.inputs(model, layer, samples[layer.name])
            assert np.abs(inputs.features - unchanged.features).max() > 0.1
        current = split(current, layer, seed=index)
    assert data.passes == before + 1


def test_a_cut_behind_a_change_is_not_used() -> None:
    model = chain(3)
    layers = list(layers_of(model).values())
    x = normal(6, 2, 5, 5)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, layers)
    last = layers[-1]
    old = recorder.inputs(model, last, samples[last.name])
    changed = with_weight(model, "w0", normal(2, 2, 3, 3, seed=9))
    new = recorder.inputs(changed, last, samples[last.name])
    now = tensors_of(changed, {"x": x}, ["y2"])["y2"]
    assert_close(answers(last, new), at_positions("Conv", now, samples[last.name]))
    assert np.abs(new.features - old.features).max() > 0.1
    assert recorder.describe()["cuts"]["runs_from_start"] == 2


def test_layers_in_any_order() -> None:
    model = chain(3)
    layers = list(layers_of(model).values())
    recorder = Recorder(Stacks(x=normal(6, 2, 5, 5)), CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, layers)
    for layer in [layers[2], layers[2], layers[0], layers[1]]:
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
    # Once for the last layer, which then is before its own cut, and once for the first.
    assert recorder.describe()["cuts"]["runs_from_start"] == 2


def wide_and_narrow() -> onnx.ModelProto:
    """Tensors of 160 images: x 42 MB, y1 and y2 42 MB, y3 10 MB (half of 64 MiB is 34 MB)."""
    return parsed(
        """
        g (float[n, 16, 64, 64] x) => (float[n, 16, 32, 32] y4) {
            [conv1] y1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
            a1 = Relu(y1)
            [conv2] y2 = Conv(a1, w2)
            a2 = Relu(y2)
            [conv3] y3 = Conv<pads = [0, 0, 1, 1], strides = [2, 2]>(a2, w3)
            a3 = Relu(y3)
            [conv4] y4 = Conv(a3, w4)
        }
        """,
        {
            "w1": 0.1 * normal(16, 16, 3, 3, seed=1),
            "w2": 0.3 * normal(16, 16, 1, 1, seed=2),
            "w3": 0.1 * normal(16, 16, 3, 3, seed=3),
            "w4": 0.3 * normal(16, 16, 1, 1, seed=4),
        },
    )


def test_cuts_that_do_not_fit_change_nothing() -> None:
    model = wide_and_narrow()
    layers = list(layers_of(model).values())
    data = Stacks(x=normal(160, 16, 64, 64))
    recorded = {}
    for memory in (64, 512):
        recorder = Recorder(data, CalibrationSettings(memory_mib=memory, patches=800), ONE_THREAD)
        samples = recorder.originals(model, layers)
        current, inputs = model, []
        for layer in layers:
            inputs.append(recorder.inputs(current, layer, samples[layer.name]))
            current = split(current, layer)
        recorded[memory] = (samples, inputs, recorder.describe())
    small, large = recorded[64], recorded[512]
    for layer, one, other in zip(layers, small[1], large[1], strict=True):
        np.testing.assert_array_equal(
            small[0][layer.name].positions, large[0][layer.name].positions
        )
        assert_close(small[0][layer.name].target, large[0][layer.name].target)
        assert_close(one.features, other.features)
    assert large[2]["cuts"] == {"stored": 4, "too_large": 0, "runs_from_start": 1}
    assert small[2]["cuts"] == {"stored": 1, "too_large": 3, "runs_from_start": 4}
    mib = 2**20
    # Images and the tensors of one batch come on top of the halves.
    assert small[2]["peak_bytes"] <= 64 * mib
    # One cut of 42 MB and 64 images on their way (17 MB a tensor), never two whole cuts.
    assert 42e6 < large[2]["peak_bytes"] <= 75e6
    assert small[2]["batch"] < 64 == large[2]["batch"]
    assert "run at once instead of 64" in small[2]["notes"][0]
    assert large[2]["notes"] == []
    assert small[2]["patches"] == {f"conv{i}": 800 for i in (1, 2, 3, 4)}
    assert (small[2]["images"], small[2]["memory_mib"]) == (160, 64)


def test_an_older_cut_is_run_forward() -> None:
    text = """
        g (float[n, 1, 64, 64] x) => (float[n, 16, 64, 64] y3) {
            [conv1] y1 = Conv(x, w1)
            [conv2] y2 = Conv(y1, w2)
            [conv3] y3 = Conv(y2, w3)
        }
    """
    weights = {"w1": normal(16, 1, 1, 1), "w2": normal(16, 16, 1, 1), "w3": normal(16, 16, 1, 1)}
    model = parsed(text, weights)
    data = Stacks(x=normal(160, 1, 64, 64))
    layers = list(layers_of(model).values())
    recorder = Recorder(data, CalibrationSettings(memory_mib=64, patches=320), ONE_THREAD)
    samples = recorder.originals(model, layers)
    passes = data.passes
    for layer in layers:
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
    assert recorder.describe()["cuts"] == {"stored": 1, "too_large": 2, "runs_from_start": 1}
    assert data.passes == passes + 1


# Bounds and bad input ------------------------------------------------------------------------


def test_targets_are_reduced_to_half_of_the_memory() -> None:
    model = parsed(
        "g (float[n, 1, 64, 64] x) => (float[n, 1024, 64, 64] y) { [conv] y = Conv(x, w) }",
        {"w": normal(1024, 1, 1, 1)},
    )
    recorder = Recorder(
        Stacks(x=normal(4, 1, 64, 64)),
        CalibrationSettings(memory_mib=64, patches=10**6),
        ONE_THREAD,
    )
    sample = recorder.originals(model, list(layers_of(model).values()))["conv"]
    assert sample.target.nbytes == 32 * 2**20
    assert len(sample.target) == 8192
    assert any("8192 patches of a layer are sampled instead of 16384" in n for n in recorder.notes)


def test_memory_too_small_for_one_patch_an_image() -> None:
    model = parsed(
        "g (float[n, 4] x) => (float[n, 16000] y) { [fc] y = Gemm(x, w) }",
        {"w": normal(4, 16000)},
    )
    recorder = Recorder(Stacks(x=normal(600, 4)), CalibrationSettings(memory_mib=64), ONE_THREAD)
    with pytest.raises(CalibrationError, match=r"takes 37 MiB.*raise the memory to 74 MiB"):
        recorder.originals(model, list(layers_of(model).values()))


def test_fixed_batch() -> None:
    model = chain(2)
    fixed = chain(2)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert fixed_batch(model_inputs(fixed)) == 4
    data = Stacks(x=normal(10, 2, 5, 5))
    layers = list(layers_of(model).values())
    free_recorder = Recorder(data, CalibrationSettings(), ONE_THREAD)
    recorder = Recorder(data, CalibrationSettings(), ONE_THREAD, fixed_batch=4)
    wanted = free_recorder.originals(model, layers)
    samples = recorder.originals(fixed, layers)
    assert recorder.describe()["batch"] == 4
    for layer in layers:
        sample = samples[layer.name]
        assert_close(sample.target, wanted[layer.name].target)
        np.testing.assert_allclose(
            sample.covariance, wanted[layer.name].covariance, rtol=1e-4, atol=1e-5
        )
        inputs = recorder.inputs(fixed, layer, sample)
        assert_close(inputs.features, free_recorder.inputs(model, layer, sample).features)


def test_several_inputs(tmp_path: Path) -> None:
    model = parsed(
        """
        g (float[n, 3, 4, 4] x, float[n, 5] late) => (float[n, 2] out) {
            [conv] y = Conv(x, w)
            p = GlobalAveragePool(y)
            f = Flatten(p)
            both = Concat<axis = 1>(f, late)
            [fc] out = Gemm(both, v)
        }
        """,
        {"w": normal(4, 3, 3, 3), "v": normal(9, 2)},
    )
    arrays = {"x": normal(9, 3, 4, 4), "late": normal(9, 5, seed=1)}
    np.savez(tmp_path / "set.npz", **arrays)
    data = open_calibration_set(tmp_path / "set.npz", model_inputs(model), Preprocessing())
    layers = layers_of(model)
    recorder = Recorder(data, CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    for layer in layers.values():
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
    assert_close(inputs.features, tensors_of(model, arrays, ["both"])["both"])
    assert recorder.describe()["cuts"]["runs_from_start"] == 1


def test_a_missing_input_is_named() -> None:
    model = chain(1)
    recorder = Recorder(Stacks(z=normal(3, 2, 4, 4)), CalibrationSettings(), ONE_THREAD)
    with pytest.raises(CalibrationError, match="does not feed the model's input 'x'"):
        recorder.originals(model, list(layers_of(model).values()))


def test_values_that_are_not_finite_name_layer_and_batch() -> None:
    model = chain(2)
    layers = list(layers_of(model).values())
    x = normal(10, 2, 4, 4)
    x[6] = 3e38
    recorder = Recorder(Stacks(x=x), CalibrationSettings(batch=4), ONE_THREAD)
    with pytest.raises(CalibrationError, match=r"'conv[01]' .*batch 1 .*samples 4 to 7.*check"):
        recorder.originals(model, layers)


@pytest.mark.parametrize("output", ["y2", "ys"])
def test_inputs_that_are_not_finite_are_refused_and_leave_no_cut(output: str) -> None:
    model = residual()
    layers = layers_of(model)
    layer = layers[output]
    recorder = Recorder(Stacks(x=normal(6, 3, 8, 8)), CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    recorder.inputs(model, layers["y1"], samples["conv1"])
    broken = with_weight(model, "w1", np.full((4, 3, 3, 3), 1e38, np.float32))
    with pytest.raises(CalibrationError, match=rf"'{layer.name}' is NaN or infinite in batch 0"):
        recorder.inputs(broken, layer, samples[layer.name])
    # The run stopped halfway through the cut; what follows must not start from its remains.
    inputs = recorder.inputs(model, layer, samples[layer.name])
    assert_close(answers(layer, inputs), samples[layer.name].target)


def test_a_set_without_samples() -> None:
    with pytest.raises(CalibrationError, match="no samples"):
        Recorder(Stacks(x=normal(0, 2, 4, 4)), CalibrationSettings(), ONE_THREAD)


@pytest.mark.parametrize("announced", [5, 7])
def test_a_set_that_gives_other_samples_than_it_announced(announced: int) -> None:
    model = chain(1)
    data = Stacks(announced, x=normal(6, 2, 4, 4))
    recorder = Recorder(data, CalibrationSettings(batch=4), ONE_THREAD)
    with pytest.raises(CalibrationError, match="gave 6 samples where it announced"):
        recorder.originals(model, list(layers_of(model).values()))


def test_samples_of_several_sizes_are_refused() -> None:
    class Growing(Stacks):
        def batches(self, size: int) -> Iterator[Batch]:
            for index in range(6):
                yield Batch({"x": normal(size, 2, 4 + index, 4)}, None, size)

    model = chain(1)
    recorder = Recorder(Growing(x=normal(6, 2, 4, 4)), CalibrationSettings(batch=1), ONE_THREAD)
    with pytest.raises(CalibrationError, match="'conv0' answers with other shapes in batch 1"):
        recorder.originals(model, list(layers_of(model).values()))


def test_at_most_so_many_images_are_used() -> None:
    model = chain(1)
    steps: list[int] = []

    def advance(steps_done: int = 1, note: str = "") -> None:
        del note
        steps.append(steps_done)

    layers = list(layers_of(model).values())
    data = Stacks(x=normal(20, 2, 4, 4))
    recorder = Recorder(data, CalibrationSettings(images=5, batch=2), ONE_THREAD)
    sample = recorder.originals(model, layers, advance)["conv0"]
    recorder.inputs(model, layers[0], sample, None, advance)
    assert len(sample.positions) == 5
    assert steps == [2, 2, 1, 2, 2, 1]


def test_no_layers_need_no_pass() -> None:
    data = Stacks(x=normal(2, 2, 4, 4))
    assert Recorder(data, CalibrationSettings(), ONE_THREAD).originals(chain(1), []) == {}
    assert data.passes == 0


def test_what_does_not_fit_the_layer() -> None:
    model = chain(2)
    layers = list(layers_of(model).values())
    recorder = Recorder(Stacks(x=normal(3, 2, 4, 4)), CalibrationSettings(), ONE_THREAD)
    samples = recorder.originals(model, layers)
    with pytest.raises(ValueError, match="replaced already"):
        recorder.inputs(split(model, layers[0]), layers[0], samples["conv0"])
    with pytest.raises(ValueError, match="a basis of shape"):
        recorder.inputs(model, layers[0], samples["conv0"], normal(3, 17))


# Parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_recorded_elsewhere_join_to_the_whole(size: int) -> None:
    model = residual()
    layers = list(layers_of(model).values())
    x = normal(20, 3, 8, 8)
    whole = Recorder(Stacks(x=x), CalibrationSettings(batch=4, patches=256), ONE_THREAD)
    samples = whole.originals(model, layers)
    drawn = Recorder(Stacks(x=x), CalibrationSettings(batch=4, patches=256), ONE_THREAD)
    drawn.draw(model, layers)

    parts = []
    for start in range(0, 20, size):
        part = drawn.part(Stacks(x=x[start : start + size]), start)
        parts.append(pickle.loads(pickle.dumps(part)).threaded(1))  # noqa: S301 - made here
    answered = [part.answers(model, layers) for part in parts]
    read: dict[str, list[tuple[Any, ...]]] = {layer.name: [] for layer in layers}
    for part in parts:
        for name, *piece in part.patches(model, layers):
            read[name].append(tuple(piece))

    for layer in layers:
        sample = samples[layer.name]
        joined = reduce(Sample.joined, [each[layer.name] for each in answered])
        np.testing.assert_array_equal(joined.positions, sample.positions)
        assert joined.out_shape == sample.out_shape
        assert_close(joined.target, sample.target)
        assert_close(joined.mean, sample.mean)
        assert_close(joined.covariance, sample.covariance)
        images, patches = (np.concatenate(each) for each in zip(*read[layer.name], strict=True))
        np.testing.assert_array_equal(images, np.repeat(np.arange(20), sample.positions.shape[1]))
        assert_close(patches, whole.inputs(model, layer, sample).features)
    assert drawn.describe()["patches"] == whole.describe()["patches"]


def test_a_part_names_samples_by_their_number_in_the_whole() -> None:
    model = chain(1)
    layers = list(layers_of(model).values())
    x = normal(12, 2, 4, 4)
    drawn = Recorder(Stacks(x=x), CalibrationSettings(batch=3), ONE_THREAD)
    drawn.draw(model, layers)
    x[10] = np.nan
    part = drawn.part(Stacks(x=x[6:]), 6)
    with pytest.raises(CalibrationError, match=r"response of .* in batch 3 .*samples 9 to 11"):
        part.answers(model, layers)
    with pytest.raises(CalibrationError, match=r"input of .* in batch 3 .*samples 9 to 11"):
        list(part.patches(model, layers))


# A trained network ---------------------------------------------------------------------------


def test_a_residual_network_layer_by_layer(shared: Path) -> None:
    source = onnx.load(shared / "models" / "resnet20_cifar10.onnx")
    graph = import_graph(source)
    run_passes(graph, (*normalising(), FoldBatchNorm()))
    model = export_model(graph, source)
    layers = [layer for layer in find_layers(graph) if layer.reason is None]
    assert sum(layer.shortcut is not None for layer in layers) >= 7
    (name,) = (each.name for each in model_inputs(model))
    x = normal(20, 3, 32, 32)
    recorder = Recorder(Stacks(**{name: x}), CalibrationSettings(batch=8, patches=256), ONE_THREAD)
    samples = recorder.originals(model, layers)
    current = model
    for index, layer in enumerate(layers):
        sample = samples[layer.name]
        inputs = recorder.inputs(current, layer, sample)
        wanted = layer.sum or layer.response
        now = tensors_of(current, {name: x}, [wanted])[wanted]
        assert_close(answers(layer, inputs), at_positions(layer.op, now, sample))
        if index == 0:
            assert_close(answers(layer, inputs), sample.target)
        if index % 4 == 1:
            current = split(current, layer, seed=index)
    cuts = recorder.describe()["cuts"]
    assert cuts == {"stored": len(layers), "too_large": 0, "runs_from_start": 1}
