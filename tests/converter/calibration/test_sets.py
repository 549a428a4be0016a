"""Batches: the size that a model insists on, and filling one up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converter.calibration.sets import Batch, ModelInput, fixed_batch, padded
from converter.errors import CalibrationError
from tests.converter.calibration.conftest import F32, model_input, refused, stack


@pytest.mark.parametrize(
    ("batches", "expected"),
    [((4,), 4), (("n",), None), ((None,), None), ((4, 4), 4), ((4, "n"), 4), (("n", "m"), None)],
)
def test_the_batch_that_a_model_insists_on(
    batches: tuple[int | str | None, ...], expected: int | None
) -> None:
    inputs = [model_input(batch, 3, name=f"i{k}") for k, batch in enumerate(batches)]
    assert fixed_batch(inputs) == expected


def test_inputs_without_one_common_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="agree"):
        fixed_batch([model_input(4, 3, name="a"), model_input(2, 3, name="b")])
    with pytest.raises(CalibrationError, match="'s' has no batch axis"):
        fixed_batch([ModelInput("s", (), F32)])
    np.savez(tmp_path / "x.npz", s=np.float32(1))
    assert "no batch axis" in refused(tmp_path / "x.npz", ModelInput("s", (), F32))


def test_padding_repeats_the_last_sample() -> None:
    labels = np.array([5, 6])
    batch = Batch({"a": stack(2, 3), "b": stack(2, dtype=np.int64)}, labels, 2)
    full = padded(batch, 4)
    assert full.count == 2
    assert full.labels is labels
    np.testing.assert_array_equal(full.feeds["a"], [[0] * 3, [1] * 3, [1] * 3, [1] * 3])
    np.testing.assert_array_equal(full.feeds["b"], [0, 1, 1, 1])
    assert full.feeds["b"].dtype == np.int64
    assert padded(full, 4) is full
    for size in (1, 0):
        with pytest.raises(ValueError, match="cannot be filled"):
            padded(batch, size)
