"""Patches and rows of a layer, against onnxruntime and by brute force."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from converter.calibration.gather import Sample
from converter.calibration.record import Recorder
from converter.config import CalibrationSettings
from converter.errors import CalibrationError
from tests.converter.calibration.recorded import (
    ONE_THREAD,
    Stacks,
    answers,
    assert_close,
    at_positions,
    chain,
    layers_of,
    normal,
    parsed,
    residual,
    tensors_of,
)


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
