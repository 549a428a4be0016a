"""What a profile adds, found from whole runs, and when it is not to be trusted."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from converter.planner.milliseconds.in_place import _doubts, _fitted
from converter.planner.milliseconds.profiling import Profile


def test_overhead_and_factor_are_found_in_spite_of_a_disturbed_session() -> None:
    generator = np.random.default_rng(0)
    empty = onnx.GraphProto()
    profiles = []
    for count in (20, 35, 50, 80, 110, 140):
        real = generator.uniform(0.002, 0.05, count)
        nodes = {str(index): value + 0.006 for index, value in enumerate(real)}
        profiles.append(Profile(empty, nodes, 1.1 * float(real.sum())))
    disturbed = Profile(empty, profiles[0].nodes, 4 * profiles[0].wall_ms)
    overhead, factor = _fitted([*profiles, disturbed], expected=0.004)
    assert overhead == pytest.approx(0.006, rel=0.1)
    assert factor == pytest.approx(1.1, rel=0.05)


def test_a_busy_machine_is_noted_but_not_for_tiny_models() -> None:
    (note,) = _doubts(2.5, 10.0)
    assert "2.5 times" in note
    assert _doubts(1.1, 10.0) == ()
    assert _doubts(2.5, 0.05) == ()


def test_with_one_session_the_chain_is_believed() -> None:
    profile = Profile(onnx.GraphProto(), {"a": 1.004, "b": 2.004}, 6.0)
    overhead, factor = _fitted([profile], expected=0.004)
    assert overhead == 0.004
    assert factor == pytest.approx(2.0)
