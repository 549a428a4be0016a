"""The program in this process, and what stands for the calls that it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import converter
from converter import cli
from converter.cli.terminal import DEBUG
from converter.front import Front, FrontPoint
from converter.outcome import Conversion, LayerOutcome, Stage


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def twofold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process, as the console script does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        code = exit_.value.code
        return Ended(code if isinstance(code, int) else int(code is not None), *printed)

    monkeypatch.delenv(DEBUG, raising=False)
    return run


class Called:
    """Stands for `converter.convert`: keeps its arguments and returns a small result."""

    def __init__(self) -> None:
        self.positional: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        self.error: BaseException | None = None

    def __call__(self, *positional: Any, **named: Any) -> Conversion:
        self.positional, self.named = positional, named
        if self.error is not None:
            raise self.error
        model, _, out, _ = positional
        layer = LayerOutcome(
            *("fc", "Gemm", (4, 3), "identity", "kept", (), 0, 12, 12, 12, 12), reason="too small"
        )
        return Conversion(
            source=model,
            out=out,
            macs_before=12,
            macs_after=12,
            params_before=12,
            params_after=12,
            layers=(layer,),
            passes=(),
            latency=None,
            stages=(Stage("all", 0.1),),
            notes=("nothing was left to gain",),
            settings={},
            calibration={},
            machine={},
            source_digest="",
            out_digest="",
            peak_memory_mib=1.0,
        )


class Planned(Called):
    """Stands for `converter.plan`."""

    def __call__(self, *positional: Any, **named: Any) -> Front:  # type: ignore[override]  # another result
        self.positional, self.named = positional, named
        return Front(
            source=positional[0],
            points=(
                FrontPoint(0.0, 1.0, 1.0, None, None, {}),
                FrontPoint(0.01, 2.0, 2.0, None, None, {"fc": "sparse s 2"}),
            ),
            judged_on=None,
            stages=(Stage("all", 0.1),),
            notes=(),
            settings={"target": {"batch": 1, "runtime": {"provider": "cpu", "threads": 0}}},
            calibration={},
            machine={},
            source_digest="",
        )


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    stand_in = Called()
    monkeypatch.setattr(converter, "convert", stand_in)
    return stand_in


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    stand_in = Planned()
    monkeypatch.setattr(converter, "plan", stand_in)
    return stand_in


QUICK = ("--seconds", "0.01", "--time-batch", "1", "--preset", "unit")


@pytest.fixture
def recoloured(net: Path, tmp_path: Path) -> Path:
    """A model that takes blue for green, and is right on three of five pictures."""
    model = onnx.load(net)
    weight = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0.5, 0.5, 0.5]], np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "recoloured.onnx"
    onnx.save(model, path)
    return path
