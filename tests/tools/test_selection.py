"""The two ways to select channels that are timed: one network, written twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from converter.config import Runtime
from converter.latency import Timing
from converter.runtime import open_session, run
from tools import selection


def test_both_ways_are_timed_and_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[dict[str, onnx.ModelProto]] = []

    def noted(models: Any, feeds: Any, runtime: Runtime, **_: Any) -> dict[str, Timing]:
        timed.append(models)
        answers = {
            name: run(open_session(model, runtime), None, feeds)[0]
            for name, model in models.items()
        }
        np.testing.assert_allclose(answers["gather"], answers["conv"], rtol=1e-4, atol=1e-5)
        assert np.abs(answers["gather"] - answers["without"]).max() > 1e-4
        rounds = (2.0, 2.0, 2.0)
        timing = Timing(2.0, 2.0, 2.0, 3, rounds, 2, "cpu", 1, True, True)
        return dict.fromkeys(models, timing)

    monkeypatch.setattr(selection, "measure_latency", noted)
    selection.main(network=["resnet20"], batch=[2], threads=1)
    said = capsys.readouterr().out
    assert said.count("(1.00–1.00)") == len(selection.SHARES) == len(timed)
    for models in timed:
        kinds = {
            name: [node.op_type for node in model.graph.node] for name, model in models.items()
        }
        assert "Gather" in kinds["gather"]
        assert "Gather" not in kinds["conv"]
        # a 1×1 Conv for each Gather
        more = kinds["conv"].count("Conv") - kinds["gather"].count("Conv")
        assert more == kinds["gather"].count("Gather") > 10
