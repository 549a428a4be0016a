"""Ranges do not depend on how the images are batched, and follow numpy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from converter.calibration.opening import open_calibration_set
from converter.config import Preprocessing, QuantizationSettings, Runtime
from converter.errors import SolverError
from converter.progress import SILENT
from converter.quantization import ranges as module
from converter.quantization.integers import quantizable_tensors, ready_for_int8
from converter.quantization.ranges import METHODS, Ranges, collect_ranges
from converter.quantization.recording import Recording
from converter.runtime import model_inputs

Network = Callable[..., onnx.ModelProto]
RUNTIME = Runtime(threads=1)


def collected(files: tuple[Path, Path], batch: int = 64, memory: int = 64) -> tuple[Ranges, int]:
    model = ready_for_int8(onnx.load(files[0]), files[0])
    data = open_calibration_set(files[1], model_inputs(model), Preprocessing())
    bounds = QuantizationSettings(batch=batch)
    object.__setattr__(bounds, "memory_mib", memory)  # less than is allowed, for a small network
    recording = Recording(model, data, bounds, RUNTIME)
    return collect_ranges(recording, quantizable_tensors(model), SILENT)


def low_high(ranges: Ranges, method: str, tensor: str) -> tuple[float, float]:
    low, high = ranges.by(method)[tensor].range_value
    return float(low), float(high)


def test_every_method_has_a_range_of_every_tensor(files: tuple[Path, Path]) -> None:
    ranges, count = collected(files)
    assert count == 60
    assert {"image", "a", "r", "s", "d", "l", "t", "u", "p", "f", "scores"} == set(ranges.tensors)
    for method in METHODS:
        assert set(ranges.by(method).keys()) == set(ranges.tensors)


def test_plain_ranges_are_the_extremes_and_others_lie_within(
    files: tuple[Path, Path], images: NDArray[np.float32]
) -> None:
    ranges, _ = collected(files, batch=7)
    low, high = low_high(ranges, "min-max", "image")
    assert (low, high) == (images.min(), images.max())
    assert low_high(ranges, "min-max", "r")[0] == 0.0
    for method in METHODS[1:]:
        inner = low_high(ranges, method, "image")
        assert low <= inner[0] < inner[1] <= high


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 5))
def test_batches_make_no_difference(sizes: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(sum(sizes)).astype(np.float32)
    whole, parted = Ranges(["x"]), Ranges(["x"])
    whole.add({"x": values})
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        parted.add({"x": part})
    assert low_high(whole, "min-max", "x") == low_high(parted, "min-max", "x")


def test_a_tensor_that_wakes_up_late_takes_no_more_room() -> None:
    random = np.random.default_rng(0)
    late = random.uniform(0, 0.95, 100_000).astype(np.float32)
    ranges, awake = Ranges(["x"]), Ranges(["x"])
    ranges.add({"x": random.uniform(0, 1e-6, 1000).astype(np.float32)})
    for part in np.split(late, 10):
        ranges.add({"x": part})
        awake.add({"x": part})
    for collector in (ranges._fine, ranges._coarse):
        counts = collector.histogram_dict["x"][0]
        assert len(counts) <= module._WIDER * collector.num_bins
        assert counts.sum() == 101_000
    for method in METHODS[1:]:
        assert low_high(ranges, method, "x") == pytest.approx(
            low_high(awake, method, "x"), abs=0.02
        )


def test_a_percentile_is_numpys_to_the_width_of_a_bin() -> None:
    values = np.random.default_rng(0).standard_normal((40, 5000)).astype(np.float32)
    ranges = Ranges(["x"])
    for row in values:
        ranges.add({"x": row})
    low, high = low_high(ranges, "percentile 99.99", "x")
    # half of the hundredth of a percent is cut on each side; bins are those of the first rows
    width = 2 * np.abs(values[0]).max() / 2048
    wanted = np.quantile(values, (0.00005, 0.99995))
    np.testing.assert_allclose((low, high), wanted, atol=2 * width)


def test_nothing_is_printed(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    ranges, _ = collected(files)
    for method in METHODS:
        ranges.by(method)
    assert capsys.readouterr() == ("", "")


def test_a_large_network_takes_fewer_images(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORK", 1.0)
    assert collected(files)[1] == 32


def test_a_small_bound_on_memory_runs_fewer_images_at_once(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    add = Ranges.add

    def noting(ranges: Ranges, values: dict[str, NDArray[np.float32]]) -> None:
        sizes.append(len(values["image"]))
        add(ranges, values)

    monkeypatch.setattr(Ranges, "add", noting)
    collected(files, memory=1)
    elements = 192 + 2 * 768 + 4 * 512 + 192 + 8 + 8 + 5  # of one image: the eleven tensors
    assert max(sizes) == 2**20 // (16 * elements)
    assert sum(sizes) == 60


def test_a_fixed_batch_is_filled(
    network: Network, images: NDArray[np.float32], tmp_path: Path
) -> None:
    onnx.save(network(batch=8), tmp_path / "m.onnx")
    np.save(tmp_path / "i.npy", images)
    ranges, count = collected((tmp_path / "m.onnx", tmp_path / "i.npy"))
    assert count == 60
    assert low_high(ranges, "min-max", "image") == (images.min(), images.max())


def test_a_tensor_that_is_not_finite_is_named() -> None:
    with pytest.raises(SolverError, match="tensor 'x' becomes NaN or infinite"):
        Ranges(["x"]).add({"x": np.array([1.0, np.inf], np.float32)})
