"""What is read off between the measured forms."""

from __future__ import annotations

import numpy as np
import pytest

from converter.planner.milliseconds.model import LatencyModel, _curve
from converter.schemes.form import KEEP, Form


def test_milliseconds_are_linear_between_and_beyond_points() -> None:
    curves = {
        "a": {
            "keep": (np.array([0.0]), np.array([9.0])),
            "channel": (np.array([10.0, 20.0, 40.0]), np.array([3.0, 5.0, 6.0])),
            "tucker": (np.array([10.0, 20.0]), np.array([5.0, 4.0])),
        }
    }
    model = LatencyModel(1.0, curves, ())
    form = Form("channel", (1,))
    expected = {10.0: 3.0, 15.0: 4.0, 20.0: 5.0, 40.0: 6.0, 60.0: 7.0, 5.0: 2.0, -20.0: 0.0}
    for macs, taken in expected.items():
        assert model.layer_ms("a", form, macs) == pytest.approx(taken)
    assert model.layer_ms("a", KEEP, 123.0) == 9.0
    assert model.original_ms == 10.0
    # two points that noise has turned round do not go on so
    assert model.layer_ms("a", Form("tucker", (1, 1)), 0.0) == 5.0
    assert model.layer_ms("a", Form("tucker", (1, 1)), 100.0) == 4.0


def test_points_of_equal_work_are_averaged() -> None:
    macs, taken = _curve([(2.0, 4.0), (1.0, 1.0), (2.0, 6.0)])
    np.testing.assert_array_equal(macs, [1.0, 2.0])
    np.testing.assert_array_equal(taken, [1.0, 5.0])
