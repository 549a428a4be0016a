"""Recording layer by layer: what is read, what is kept, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from converter.calibration.gather import Sample
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.calibration.sets import Batch, fixed_batch
from converter.config import CalibrationSettings, Preprocessing
from converter.errors import CalibrationError
from converter.runtime import model_inputs
from passes.base import run_passes
from passes.exchange import export_model, import_graph
from passes.fold_batchnorm import FoldBatchNorm
from passes.layers import find_layers
from passes.normalise import normalising
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
    split,
    tensors_of,
    with_weight,
)


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


def test_shapes_of_a_batch_that_was_freed_later_do_no_harm() -> None:
    model = parsed(
        """
        g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) {
            [first] h = Conv<pads = [1, 1, 1, 1]>(x, v)
            r = Relu(h)
            [second] k = Conv<pads = [1, 1, 1, 1]>(r, w)
            s = Relu(k)
            [third] y = Conv<pads = [1, 1, 1, 1]>(s, w2)
        }
        """,
        {"v": normal(4, 3, 3, 3), "w": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1)},
    )
    for name in "hrks":  # as shape inference left them when the batch was 1
        stale = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, 5, 5])
        model.graph.value_info.append(stale)
    layers = layers_of(model)
    recorder = Recorder(Stacks(x=normal(6, 3, 5, 5)), CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    for layer in layers.values():
        inputs = recorder.inputs(model, layer, samples[layer.name])
        assert_close(answers(layer, inputs), samples[layer.name].target)
    assert recorder.describe()["cuts"]["runs_from_start"] == 1


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
    recorder.inputs(model, layers[0], sample, advance)
    assert len(sample.positions) == 5
    assert steps == [2, 2, 1, 2, 2, 1]


def test_no_layers_need_no_pass() -> None:
    data = Stacks(x=normal(2, 2, 4, 4))
    assert Recorder(data, CalibrationSettings(), ONE_THREAD).originals(chain(1), []) == {}
    assert data.passes == 0


def test_a_sequence_that_passes_a_layer_is_made_again_where_it_is_needed() -> None:
    text = """split (float[n, 4, 4, 4] x) => (float[n, 4, 4, 4] y) {
        parts = SplitToSequence <axis = 1, keepdims = 1> (x, two)
        second = SequenceAt (parts, one)
        c = Conv (second, w)
        first = SequenceAt (parts, zero)
        d = Conv (first, v)
        y = Concat <axis = 1> (c, d)
    }"""
    weights = {
        "w": normal(2, 2, 1, 1),
        "v": normal(2, 2, 1, 1, seed=1),
        **{
            name: np.array(value, np.int64) for name, value in (("zero", 0), ("one", 1), ("two", 2))
        },
    }
    model = parsed(text, weights)
    layers = layers_of(model)
    x = normal(6, 4, 4, 4, seed=2)
    recorder = Recorder(Stacks(x=x), CalibrationSettings(batch=4), ONE_THREAD)
    samples = recorder.originals(model, list(layers.values()))
    for name, channels in (("c", slice(2, 4)), ("d", slice(0, 2))):
        found = recorder.inputs(model, layers[name], samples[name]).features
        wanted = at_positions("Conv", x[:, channels], samples[name])
        assert_close(found, wanted)
    assert recorder.describe()["cuts"]["stored"] == 2


def test_what_does_not_fit_the_layer() -> None:
    model = chain(2)
    layers = list(layers_of(model).values())
    recorder = Recorder(Stacks(x=normal(3, 2, 4, 4)), CalibrationSettings(), ONE_THREAD)
    samples = recorder.originals(model, layers)
    with pytest.raises(ValueError, match="replaced already"):
        recorder.inputs(split(model, layers[0]), layers[0], samples["conv0"])


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
        parts.append(pickle.loads(pickle.dumps(part)).threaded(1))  # noqa: S301  # its own bytes
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
