"""Timing in turns: who runs when, what is reported, and that obvious differences are seen."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converter import latency
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ModelError
from converter.latency import Timing, measure_latency, speedup, until_no_slower
from converter.runtime import open_session

ONE = Runtime(threads=1)
FEEDS = {"x": np.ones((64, 256), np.float32)}


def chain(length: int) -> onnx.ModelProto:
    """`length` products with a 256 × 256 matrix, one after another."""
    nodes = [helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"]) for i in range(length)]
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    weight = np.eye(256, dtype=np.float32)[::-1].copy()
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 256])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def timing(*rounds: float) -> Timing:
    return Timing(
        median_ms=float(np.median(rounds)),
        p10_ms=min(rounds),
        p90_ms=max(rounds),
        runs=len(rounds),
        rounds_ms=rounds,
        batch=1,
        provider="cpu",
        threads=1,
        spinning=True,
        settled=True,
    )


@pytest.mark.parametrize("spinning", [True, False])
def test_twenty_times_the_work_is_clearly_slower(spinning: bool) -> None:
    times = measure_latency(
        {"long": chain(20), "short": chain(1)},
        FEEDS,
        ONE,
        seconds=0.15,
        rounds=6,
        spinning=spinning,
    )
    assert list(times) == ["long", "short"]
    gain = speedup(times["long"], times["short"])
    # 20 in theory; a run has its own cost, and other programs may hold the core for most of it.
    assert gain.ratio > 4
    assert gain.low > 1
    assert gain.low <= gain.ratio <= gain.high


def test_the_report_says_how_it_was_measured() -> None:
    times = measure_latency({"a": chain(1)}, FEEDS, ONE, seconds=0.06, rounds=6, spinning=False)
    found = times["a"]
    assert (found.batch, found.threads, found.provider) == (64, 1, "cpu")
    assert (found.spinning, found.settled) == (False, True)
    assert len(found.rounds_ms) == 6
    assert found.runs >= 6
    assert found.median_ms == np.median(found.rounds_ms)
    assert 0 < found.p10_ms <= found.p90_ms
    assert json.loads(json.dumps(dataclasses.asdict(found)))["median_ms"] == found.median_ms


def test_models_take_turns_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    bursts: list[str] = []

    def burst(name: str, seconds: float) -> np.ndarray:
        assert seconds == pytest.approx(3 / 12)
        bursts.append(name)
        return np.ones(2)

    monkeypatch.setattr(latency, "open_session", lambda *_, label, **__: label)
    monkeypatch.setattr(latency, "_runner", lambda session, *_: session)
    monkeypatch.setattr(latency, "_warmed", lambda *_: 0.001)
    monkeypatch.setattr(latency, "_burst", burst)
    times = measure_latency(dict.fromkeys("abc", b""), FEEDS, ONE, seconds=3, rounds=12)
    rounds = [tuple(bursts[start : start + 3]) for start in range(0, 36, 3)]
    assert len(bursts) == 36
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1
    assert times["a"].runs == 24


def test_each_opening_gets_its_share_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def noted(*arguments: Any, label: str, **options: Any) -> Any:
        opened.append(label)
        return open_session(*arguments, label=label, **options)

    monkeypatch.setattr(latency, "open_session", noted)
    models = {"a": chain(1), "b": chain(1)}
    times = measure_latency(models, FEEDS, ONE, seconds=0.06, rounds=6, spinning=False, openings=3)
    assert opened == ["a", "b"] * 3
    assert [len(each.rounds_ms) for each in times.values()] == [6, 6]


@pytest.mark.parametrize(("slowest", "rounds"), [(0.001, 40), (0.1, 20), (1.0, 5), (60.0, 5)])
def test_a_slow_model_gets_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, slowest: float, rounds: int
) -> None:
    monkeypatch.setattr(latency, "_warmed", lambda *_: slowest)
    monkeypatch.setattr(latency, "_burst", lambda *_: np.ones(1))
    times = measure_latency({"a": chain(1)}, FEEDS, ONE, seconds=2, rounds=40, spinning=False)
    assert len(times["a"].rounds_ms) == rounds


@pytest.mark.parametrize(("swing", "rounds"), [(0.0, 9), (0.5, 24)])
def test_a_slow_model_gets_more_rounds_until_its_speedup_is_known(
    monkeypatch: pytest.MonkeyPatch, swing: float, rounds: int
) -> None:
    random = np.random.default_rng(0)
    taken = {"slow": 10.0, "fast": 5.0}
    monkeypatch.setattr(latency, "open_session", lambda *_, label, **__: label)
    monkeypatch.setattr(latency, "_runner", lambda session, *_: session)
    monkeypatch.setattr(latency, "_warmed", lambda *_: 10.0)
    monkeypatch.setattr(
        latency, "_burst", lambda name, _: taken[name] * np.exp(swing * random.normal(size=1))
    )
    options: Any = {"spinning": False, "openings": 3, "within": latency.CLOSE}
    times = measure_latency(dict.fromkeys(taken, b""), FEEDS, ONE, **options)
    assert [len(each.rounds_ms) for each in times.values()] == [rounds, rounds]


def test_bursts_and_warm_up_run_at_least_once() -> None:
    wait = threading.Event()
    runs: list[float] = []

    def once() -> None:
        runs.append(0)
        wait.wait(0.03)

    assert latency._warmed(once, 3) >= 0.03
    assert len(runs) == 1  # three would take more than 20 ms
    (took,) = latency._burst(once, 0.001)
    assert took >= 30
    runs.clear()
    latency._warmed(lambda: runs.append(0), 3)
    assert len(runs) == 3


def test_settling_sees_a_busy_thread() -> None:
    assert latency._settle()
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    busy = threading.Thread(target=spin)
    busy.start()
    try:
        assert not latency._settle()
    finally:
        stop.set()
        busy.join()


def test_bound_runs_give_what_plain_runs_give() -> None:
    session = open_session(chain(3), ONE)
    seen: list[np.ndarray] = []
    genuine = session.io_binding

    def watched() -> object:
        binding = genuine()
        wait = binding.synchronize_outputs
        binding.synchronize_outputs = lambda: (wait(), seen.extend(binding.copy_outputs_to_cpu()))
        return binding

    session.io_binding = watched
    latency._bound(session, FEEDS, "cpu")()
    np.testing.assert_array_equal(seen[0], session.run(None, FEEDS)[0])


# ---- the ratio


def test_a_constant_ratio_has_no_width() -> None:
    gain = speedup(timing(2, 4, 6, 8, 10), timing(1, 2, 3, 4, 5))
    assert gain.ratio == 2
    assert (gain.low, gain.high) == (2, 2)


def test_noise_widens_the_interval_and_keeps_the_ratio_within() -> None:
    generator = np.random.default_rng(0)
    before = timing(*(3 * generator.lognormal(0, 0.1, 20)))
    after = timing(*generator.lognormal(0, 0.1, 20))
    gain = speedup(before, after)
    assert gain.low < gain.ratio < gain.high
    assert gain.low < 3 < gain.high
    assert gain == speedup(before, after)


def test_swings_of_the_machine_cancel_within_rounds() -> None:
    pace = np.array([1, 1, 1, 2, 2, 2, 2.0])
    before, after = 3 * pace, 1 * pace
    before[3] = 3  # it swung between the two: the medians of both are now 3 and 2
    assert speedup(timing(*before), timing(*after)).ratio == 3


def test_timings_of_two_measurements_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="one measurement"):
        speedup(timing(1, 2), timing(1, 2, 3))


# ---- refusals


@pytest.mark.parametrize(
    "option", [{"seconds": 0.0}, {"rounds": 0}, {"warmup": 0}, {"openings": 0}]
)
def test_settings_that_time_nothing(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        measure_latency({"a": chain(1)}, FEEDS, ONE, **option)


def test_feeds_and_models_that_do_not_run() -> None:
    with pytest.raises(CalibrationError, match=r"^slow does not take"):
        measure_latency({"slow": chain(1)}, {"x": np.ones((2, 3), np.float32)}, ONE)
    with pytest.raises(ModelError, match=r"^odd: "):
        measure_latency({"odd": b"noise"}, FEEDS, ONE)


def test_no_models_give_no_timings() -> None:
    assert measure_latency({}, FEEDS, ONE) == {}


@pytest.mark.parametrize(
    ("readings", "naps"),
    [([1.2], 0), ([1.0], 0), ([0.9, 1.1], 1), ([0.9, 0.8, 1.3], 2), ([0.9, 0.8, 0.7], 2)],
)
@pytest.mark.parametrize("seen_faster", [True, False])
def test_a_model_that_reads_slower_is_read_again(
    monkeypatch: pytest.MonkeyPatch, readings: list[float], naps: int, seen_faster: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(latency, "PAUSE", 15.0)
    monkeypatch.setattr(latency.time, "sleep", slept.append)
    left = list(readings)

    def read() -> dict[str, Timing]:
        return {"old": timing(2.0, 2.0), "new": timing(*[2.0 / left.pop(0)] * 2)}

    timings, gained = until_no_slower(read, "new", "old", seen_faster=seen_faster)
    assert not left
    assert gained.ratio == pytest.approx(readings[-1])
    assert timings["new"].median_ms == pytest.approx(2.0 / readings[-1])
    assert slept == naps * [15.0 if seen_faster else 0.0]
