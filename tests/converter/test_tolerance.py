"""The search for the fastest model within a tolerance, on made-up drops and on a small network."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter import (
    CalibrationSettings,
    ConfigError,
    RecoverySettings,
    SolverSettings,
    Target,
    ValidationError,
    pipeline,
)
from converter import tolerance as module
from converter.attempt import Attempt
from converter.calibration.sets import CalibrationSet
from converter.config import Budget, Runtime
from converter.drop import Evaluation
from converter.front import FrontPoint
from converter.outcome import Drop, Latency, Search
from converter.planner.choice import Choice
from converter.planner.cost import ModelCost
from converter.preparation import Clock
from converter.progress import SILENT
from converter.realisation import Realised
from converter.tolerance import PROBES, Tolerance, search

GAINS = np.geomspace(1, 12, 12)
LATENCY = Latency("cpu", 1, 1, 10.0, 10.0, 1.0, 1.0, 1.0, 10.0)


def effect_of(gain: float) -> float:
    """Error that rises as a front's does: slowly at first, then by powers."""
    return 1e-4 * (gain - 1) ** 3


@dataclasses.dataclass
class Images:
    """What drops are said to be measured on."""

    def describe(self) -> str:
        return "100 images"


@dataclasses.dataclass
class Stub:
    """Stands for everything known of a model: nothing here looks into it."""

    path: Path = Path("net.onnx")
    source: None = None
    cost: ModelCost = dataclasses.field(default_factory=lambda: ModelCost(1200, 100, ()))


Found = Callable[..., tuple[Attempt, Search]]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Search where a plan is exactly as fast as asked and its drop is a function of its gain."""

    def run(
        max_drop: float,
        drop: Callable[[float], float],
        *,
        gains: Any = GAINS,
        slow: float = 0.0,
        most: float = math.inf,
    ) -> tuple[Attempt, Search]:
        points = [
            FrontPoint(effect_of(gain), gain, 1.0, 10 / gain, gain, {})
            for gain in map(float, gains)
        ]
        asked: list[float] = []

        def attempt(*_: object, **__: object) -> Attempt:
            gain = asked[-1]
            faster = gain >= slow
            shown = gain if faster else 1.0
            latency = dataclasses.replace(LATENCY, speedup=shown, converted_ms=10 / shown)
            return Attempt(
                model=onnx.ModelProto(),
                cost=ModelCost(100, 10, ()),
                replaced=int(faster),
                put_back=int(not faster),
                layers=(),
                passes=(),
                latency=latency,
                notes=(),
                choice=Choice({}, 0.0, {}, 0.0),
                realised=Realised(onnx.ModelProto(), (), (), {}),
            )

        def plan(_prepared: object, _paced: object, budget: Budget) -> object:
            assert budget.speedup is not None
            if budget.speedup > most:
                raise ConfigError("out of reach")
            asked.append(budget.speedup)
            return dataclasses.make_dataclass("Choice", ["effect"])(effect_of(budget.speedup))

        def measure(*_: object, **__: object) -> Drop:
            lost = drop(asked[-1]) if asked[-1] >= slow else 0.0
            return Drop("accuracy", lost, 0.01, 100)

        monkeypatch.setattr(module, "predicted_front", lambda *_: [(None, each) for each in points])
        monkeypatch.setattr(module, "plan", plan)
        monkeypatch.setattr(module, "attempt", attempt)
        monkeypatch.setattr(module, "measure_drop", measure)
        stand_ins: list[Any] = [Stub(), object(), Images()]
        prepared, paced, images = stand_ins
        return search(
            prepared,
            paced,
            Tolerance(max_drop, Evaluation()),
            images,
            SolverSettings(),
            Target(),
            batch=8,
            progress=SILENT,
            clock=Clock(),
        )

    return run


@pytest.mark.parametrize("per_effect", [20.0, 200.0, 2000.0], ids="{:g} points".format)
@pytest.mark.parametrize("max_drop", [0.3, 1.0, 5.0])
def test_it_ends_near_the_fastest_that_passes(
    find: Found, per_effect: float, max_drop: float
) -> None:
    attempt, found = find(max_drop, lambda gain: per_effect * effect_of(gain))
    best = min(1 + (max_drop / per_effect / 1e-4) ** (1 / 3), GAINS[-1])
    assert attempt.latency is not None
    assert len(found.probes) <= PROBES
    assert 0.85 * best <= attempt.latency.speedup <= best
    for probe in found.probes:
        assert probe.within == (probe.drop.points <= max_drop)
    assert attempt.latency.speedup == max(each.gained for each in found.probes if each.within)


def test_a_drop_that_never_comes_ends_at_the_largest_gain(find: Found) -> None:
    attempt, found = find(0.5, lambda _: -0.1)
    assert attempt.latency is not None
    assert attempt.latency.speedup > 0.95 * GAINS[-1]
    assert all(probe.within for probe in found.probes)


def test_nothing_within_names_the_closest(find: Found) -> None:
    with pytest.raises(ValidationError, match=r"closest loses 9\.\d\d ± 0\.01 points of accuracy"):
        find(0.5, lambda gain: 9 + 0.1 * gain)


def test_a_model_that_gives_nan_is_no_match(find: Found) -> None:
    attempt, found = find(1.0, lambda gain: math.inf if gain > 2 else 0.0)
    assert attempt.latency is not None
    assert 1.5 < attempt.latency.speedup <= 2
    assert any(math.isinf(probe.drop.points) for probe in found.probes)


def test_the_original_itself_is_no_result(find: Found) -> None:
    """Where small gains cannot be had, the search goes on to larger ones."""
    attempt, found = find(1.0, lambda gain: 0.1 * gain, slow=6.0)
    assert attempt.latency is not None
    assert attempt.latency.speedup >= 6
    assert not found.probes[0].within  # nothing lost, but nothing gained either


@pytest.mark.parametrize("most", [1.05, 1.5, 6.0])
def test_it_ends_at_the_fastest_plan_there_is(find: Found, most: float) -> None:
    """What the front promises may be a little more than any plan gives."""
    attempt, found = find(0.5, lambda _: 0.0, most=most)
    assert attempt.latency is not None
    assert 0.93 * most < attempt.latency.speedup <= most
    assert found.probes


def test_no_plan_at_all(find: Found) -> None:
    with pytest.raises(ValidationError, match="use it as it is"):
        find(0.5, lambda _: 0.0, most=1.0)


def test_nothing_to_gain(find: Found) -> None:
    with pytest.raises(ValidationError, match="use it as it is"):
        find(1.0, lambda _: 0.0, gains=[1.0])
    with pytest.raises(ValidationError, match="use it as it is"):
        find(1.0, lambda _: 0.0, slow=100.0)


def test_too_few_images_are_told(find: Found) -> None:
    few, _ = find(0.015, lambda _: 0.0)
    assert "100 images" in few.notes[0]
    enough, _ = find(0.5, lambda _: 0.0)
    assert enough.notes == ()


@pytest.mark.parametrize("max_drop", [-0.1, 100.0, math.nan, math.inf])
def test_tolerances_that_make_no_sense(max_drop: float) -> None:
    with pytest.raises(ConfigError, match="--max-drop"):
        Tolerance(max_drop, Evaluation())


# The whole way ---------------------------------------------------------------------------------

TEXT = """<ir_version: 8, opset_import: ["": 17]>
net (float[n, 3, 8, 8] image) => (float[n, 4] scores) {
    [conv1] a = Conv<pads = [1, 1, 1, 1]>(image, w1)
    b = Relu(a)
    [conv2] c = Conv<pads = [1, 1, 1, 1]>(b, w2)
    d = Relu(c)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    [classifier] scores = Gemm<transB = 1>(f, w3)
}"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A small network, whose second Conv has a spectrum that falls, and images for it."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in (("w1", (12, 3, 3, 3)), ("w2", (16, 12, 3, 3)), ("w3", (4, 16))):
        left, sizes, right = np.linalg.svd(
            random.normal(size=shape).reshape(shape[0], -1), full_matrices=False
        )
        weight = ((left * sizes * 0.7 ** np.arange(len(sizes))) @ right).reshape(shape)
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", random.normal(size=(60, 3, 8, 8)).astype(np.float32))
    return tmp_path / "net.onnx", tmp_path / "images.npy"


def convert(
    files: tuple[Path, Path], max_drop: float, recovery: RecoverySettings | None = None
) -> converter.Conversion:
    model, images = files
    return converter.convert(
        model,
        images,
        model.with_name("small.onnx"),
        max_drop=max_drop,
        calibration=CalibrationSettings(batch=16, patches=512),
        solver=SolverSettings(name="data-svd"),
        target=Target(Runtime(threads=1)),
        timing=False,
        recovery=recovery,
    )


def test_a_conversion_within_a_tolerance(files: tuple[Path, Path]) -> None:
    done = convert(files, 10.0)
    assert done.search is not None
    chosen = [each for each in done.search.probes if each.within]
    assert done.macs_reduction == max(each.macs_reduction for each in chosen) > 1
    assert {each.drop.images for each in done.search.probes} == {12}  # every fifth
    assert {each.drop.measure for each in done.search.probes} == {"agreement"}
    assert "48" in done.calibration["data"]
    held = converter.validate(files[0], done.out, files[1], time_batches=(), seconds=0.01)
    assert held.macs_reduction == pytest.approx(done.macs_reduction)
    assert done.to_dict()["search"]["probes"][0]["drop"]["measure"] == "agreement"


def test_what_was_learned_is_taken_back_where_it_is_not_within(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = RecoverySettings(epochs=4, batch=8, precision="float32")

    def recovered(drop: float) -> converter.Conversion:
        # the search measures for itself: this is what was learned
        monkeypatch.setattr(
            "converter.pipeline.measure_drop", lambda *_, **__: Drop("agreement", drop, 1.0, 12)
        )
        return convert(files, 60.0, recovery=taught)

    kept, back = recovered(60.0), recovered(60.1)
    assert kept.recovery is not None
    assert kept.recovery["improved"]
    # nothing is learned from the twelve that are judged on, of sixty
    assert kept.recovery["images"] + kept.recovery["held_out"] == 48
    assert back.recovery is not None
    assert not back.recovery["improved"]
    assert "60.10 ± 1.00 points of agreement, more than --max-drop 60" in back.notes[-1]
    plain = convert(files, 60.0).out.read_bytes()
    assert back.out_digest == hashlib.sha256(plain).hexdigest() != kept.out_digest


class _Reader:
    """Gives the images of a file one by one, as onnxruntime's readers do."""

    def __init__(self, path: Path) -> None:
        self._rows = iter(np.load(path))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        row = next(self._rows, None)
        return None if row is None else {"image": row[None]}


@pytest.mark.parametrize("kind", ["a reader", "another spelling", "more images"])
def test_what_is_judged_on_is_not_learned_from_however_it_is_given(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(files[1].parent)
    learned: list[str] = []
    require = pipeline.require_recoverable

    def noted(original: Any, data: CalibrationSet, settings: Any) -> None:
        learned.append(data.describe())
        require(original, data, settings)

    monkeypatch.setattr(pipeline, "require_recoverable", noted)
    source: Any = _Reader(files[1]) if kind == "a reader" else files[1]
    done = converter.convert(
        files[0],
        source,
        files[0].with_name("small.onnx"),
        max_drop=60.0,
        calibration=CalibrationSettings(
            batch=16, patches=512, images=30 if kind == "more images" else None
        ),
        solver=SolverSettings(name="data-svd"),
        target=Target(Runtime(threads=1)),
        timing=False,
        recovery=RecoverySettings(epochs=1, batch=8, precision="float32"),
        recover_images=Path(files[1].name) if kind == "another spelling" else None,
    )
    assert done.recovery is not None
    # of sixty, or of thirty, every fifth is judged on
    count = 54 if kind == "more images" else 48
    assert done.recovery["images"] + done.recovery["held_out"] == count
    assert learned[0].startswith(f"{count} of ")


def test_nothing_is_written_where_nothing_is_within(files: tuple[Path, Path]) -> None:
    """Outputs that are no scores: the bound is on their error, and 1e-4 % is out of reach."""
    model = onnx.load(files[0])
    model.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, ["n", 16, 8, 8])
    )
    onnx.save(model, files[0])
    with pytest.raises(ValidationError, match="% output error"):
        convert(files, 1e-4)
    assert not list(files[0].parent.glob("*small*"))


def test_a_budget_or_a_tolerance(files: tuple[Path, Path]) -> None:
    model, images = files
    out = model.with_name("small.onnx")
    with pytest.raises(ConfigError, match="one of the two"):
        converter.convert(model, images, out)
    with pytest.raises(ConfigError, match="one of the two"):
        converter.convert(model, images, out, Budget(macs=2), max_drop=1)
    with pytest.raises(ConfigError, match="--val"):
        converter.convert(model, images, out, Budget(macs=2), val=images)
    with pytest.raises(ConfigError, match="says nothing about other images"):
        converter.convert(model, images, out, max_drop=1, val=images)


@pytest.mark.parametrize(
    ("calib", "val", "said"),
    [
        ("data", "data/val", "val lies in .*data, which"),
        ("data/calib", "data", "data has images of .*calib, which"),
        ("data", "other/../data", "data is .*data, which"),
    ],
)
def test_images_to_judge_on_lie_apart(
    files: tuple[Path, Path], tmp_path: Path, calib: str, val: str, said: str
) -> None:
    for folder in ("data/val", "data/calib", "other"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{said} the layers are fitted on"):
        converter.convert(
            files[0], tmp_path / calib, tmp_path / "small.onnx", max_drop=1, val=tmp_path / val
        )
    with pytest.raises(ConfigError, match="which the model learns from"):
        converter.convert(
            *(files[0], files[1], tmp_path / "small.onnx"),
            max_drop=1,
            val=tmp_path / val,
            recovery=RecoverySettings(epochs=1),
            recover_images=tmp_path / calib,
        )
