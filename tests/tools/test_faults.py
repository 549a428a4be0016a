"""Some random kills, and that a fault that leaves something behind would be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.faults import Place, kill_at_random


def test_runs_that_are_killed_leave_nothing_wrong_behind(tmp_path: Path) -> None:
    place = Place(tmp_path)
    tally = kill_at_random(place, 1, np.random.default_rng(0))
    assert sum(tally.values()) == 1
    out = tmp_path / "half.onnx"
    place.check(out, finished=False)
    out.write_bytes(place.whole[:-1])
    with pytest.raises(AssertionError, match=r"half\.onnx is not what"):
        place.check(out, finished=False)
    (tmp_path / "images.npy").write_bytes(b"")
    with pytest.raises(AssertionError, match="an input was changed"):
        place.check(tmp_path / "none.onnx", finished=False)
