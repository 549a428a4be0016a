"""Fair timing of several models side by side under onnxruntime.

All models are warmed up, then timed in short bursts that take turns, in a new random order every
round: what disturbs the machine for a while disturbs all of them. Two models are compared within each
round, and the median is taken over rounds: on a machine whose pace swings by a factor of two for seconds
at a time, the medians of both may fall into different swings, and their ratio then says nothing.

Sessions stay open over the rounds, and that is where such timings go wrong: after a run,
onnxruntime's threads spin for some 50 ms before they sleep, and take the cores from the next
session. So there are two modes:

- spinning, the default: threads spin as deployed, and a burst begins only when this program's other
  threads are asleep. On two AVX-512 cores, hardly used by others, this read like a session that is
  alone in its program (AlexNet for 32×32 at batch 1: 2.5–3.3 ms beside 2.4–3.2 ms alone, ResNet-20
  0.5–0.8 ms both ways), where turns without that wait read up to 8.6 ms.
- not spinning: threads sleep at once. Small models at batch 1 then read slower than deployed
  (ResNet-20 0.8–1.1 ms), but timings are steadier where other programs keep the cores busy.

Neither mode can undo the work of other programs: the interval of a speed-up shows it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from converter.config import Provider, Runtime
from converter.errors import ConfigError
from converter.runtime import open_session, run

__all__ = [
    "CLOSE",
    "OPENINGS",
    "Speedup",
    "Timing",
    "measure_latency",
    "speedup",
    "until_no_slower",
]

OPENINGS = 3
"""Sessions of each model where a plan, a result or a comparison is timed: single ones differ by a tenth."""
CLOSE = 0.02
"""Half the interval of a speed-up, as a share of it, that plans and results are timed to where the machine
allows it."""
READINGS = 3
"""A model counts as slower where it reads so in all of them, each with sessions of its own: one session may
be unlucky with its threads, and a small network then reads a quarter slower."""
PAUSE = 10.0
"""Seconds between these readings where the model was seen faster before. On two shared cores a ResNet-20 read
1.35 times the original's speed for minutes and 0.90 for some 2 to 40 seconds in between, both steadily: work
then goes slowly from core to core, and such a state should have passed by the last reading."""
_ROUNDS_LEAST = 5
_WARM_SECONDS = 0.02
"""Untimed runs before a burst end after this time: by then clocks and caches are warm."""
_SETTLE_STEP = 0.01
_SETTLE_BUSY = 0.001
_SETTLE_LIMIT = 0.5
"""Threads count as asleep once a step of waiting takes less than the busy time of CPU (seconds)."""


@dataclass(frozen=True)
class Timing:
    """How long one model takes for one batch, and how that was measured.

    Attributes
    ----------
    median_ms : float
        Median over rounds of each round's median, in milliseconds.
    p10_ms, p90_ms : float
        Quantiles over all timed runs, in milliseconds.
    runs : int
        Timed runs in all rounds.
    rounds_ms : tuple of float
        Each round's median, in milliseconds; models measured together share their rounds.
    batch : int
        Length of the first axis of the first input.
    provider : {"cpu", "cuda"}
    threads : int
        Threads inside an operator.
    spinning : bool
        Whether idle threads spun, as deployed.
    settled : bool
        Whether this program's other threads slept before every burst; always True where threads do
        not spin.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    rounds_ms: tuple[float, ...]
    batch: int
    provider: Provider
    threads: int
    spinning: bool
    settled: bool


@dataclass(frozen=True)
class Speedup:
    """How many times faster a model is than another: median over rounds, and its 95 % interval."""

    ratio: float
    low: float
    high: float


def measure_latency(
    models: Mapping[str, onnx.ModelProto | Path | bytes],
    feeds: Mapping[str, npt.NDArray[Any]],
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    rounds: int = 24,
    warmup: int = 3,
    spinning: bool = True,
    openings: int = 1,
    within: float | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time `models` on the same `feeds`, in turns.

    Parameters
    ----------
    models : mapping of str to onnx.ModelProto, Path or bytes
        What is timed, by name. All stay open together.
    feeds : mapping of str to ndarray
        One batch of input. On CUDA it is copied to the device once, and a run counts until its
        outputs are there.
    runtime : Runtime
        Provider and threads.
    seconds : float, default 2.0
        Timed seconds for each model, above 0; warm-up and waiting come on top.
    rounds : int, default 24
        Bursts that `seconds` are split into, from 1. A slow model gets fewer, but not below 5, and
        one run in each at least.
    warmup : int, default 3
        Untimed runs before each burst, from 1; fewer where they take longer than 20 ms.
    spinning : bool, default True
        Which of the two modes of this module.
    openings : int, default 1
        The models are opened so many times, from 1, and each opening gets its share of the rounds: what
        one session has of good or bad luck, with memory and threads, the next one has not.
    within : float or None, default None
        Where a slow model would get fewer rounds, give it more, up to all of them, until half the
        interval of each model's speed-up over the first one is within this share of it.
    seed : int, default 0
        Seed of the order within rounds.

    Returns
    -------
    dict of str to Timing
        In the order of `models`.

    Raises
    ------
    ConfigError
        Where seconds, rounds or warm-up are not above 0.
    ConfigError, ModelError, CalibrationError
        As `converter.runtime.open_session` and `converter.runtime.run`.
    """
    for name, value in (
        ("seconds", seconds),
        ("rounds", rounds),
        ("warmup", warmup),
        ("openings", openings),
    ):
        if value <= 0:
            raise ConfigError(f"{name} is {value}, and a timing needs more than 0; correct it")
    times: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in models}
    generator = np.random.default_rng(seed)
    settled = True
    most = rounds
    for _ in range(openings):
        runs = {
            name: _runner(
                open_session(model, runtime, spinning=spinning, label=name), feeds, runtime, name
            )
            for name, model in models.items()
        }
        slowest = max((_warmed(once, warmup) for once in runs.values()), default=0.0)
        if slowest > 0:
            rounds = min(rounds, max(_ROUNDS_LEAST, int(seconds / slowest)))
        order = list(runs)
        for round_ in range(math.ceil(most / openings)):
            enough = within is None or _widest(times) <= within
            if round_ >= math.ceil(rounds / openings) and enough:
                break
            generator.shuffle(order)
            for name in order:
                if spinning:
                    settled &= _settle()
                _warmed(runs[name], warmup)
                times[name].append(_burst(runs[name], seconds / rounds))
        runs.clear()  # before the next ones are open
    batch = next((feed.shape[0] for feed in feeds.values() if feed.ndim), 1)
    return {
        name: _timing(bursts, batch, runtime, spinning=spinning, settled=settled)
        for name, bursts in times.items()
    }


def _widest(times: Mapping[str, list[npt.NDArray[np.float64]]]) -> float:
    """Half the widest interval of a speed-up over the first model, as a share; few rounds have none."""
    if len(next(iter(times.values()), ())) < _ROUNDS_LEAST:
        return math.inf
    first, *others = ([float(np.median(burst)) for burst in bursts] for bursts in times.values())
    found = (_compared(first, rounds) for rounds in others)
    return max(((each.high - each.low) / 2 / each.ratio for each in found), default=0.0)


def speedup(original: Timing, converted: Timing) -> Speedup:
    """Return how many times faster `converted` is than `original`, both from one `measure_latency`.

    The ratio is the median over rounds of the ratio within each. The interval is a percentile
    bootstrap over rounds (Efron 1979): 2,000 resamples with a fixed seed, each of the same rounds of
    both, since what disturbs a round disturbs both models.

    Raises
    ------
    ValueError
        Where the two were not measured in the same rounds.
    """
    if len(original.rounds_ms) != len(converted.rounds_ms):
        raise ValueError(
            "a speed-up needs two timings from one measurement, and these have different rounds"
        )
    return _compared(original.rounds_ms, converted.rounds_ms)


def until_no_slower(
    read: Callable[[], dict[str, Timing]], model: str, than: str, *, seen_faster: bool
) -> tuple[dict[str, Timing], Speedup]:
    """Read again while `model` is slower than another, three times at most.

    Parameters
    ----------
    read : callable
        Times both in turns.
    model, than : str
        Names of their timings.
    seen_faster : bool
        Whether `model` was faster at an earlier time: then the machine gets time between readings.

    Returns
    -------
    tuple of (dict of str to Timing, Speedup)
        The last reading, and how many times faster `model` is than the other.
    """
    for left in reversed(range(READINGS)):
        timings = read()
        gained = speedup(timings[than], timings[model])
        if gained.ratio >= 1.0 or not left:
            break
        time.sleep(PAUSE if seen_faster else 0.0)
    return timings, gained


def _compared(original: Sequence[float], converted: Sequence[float]) -> Speedup:
    """`speedup` of each round's milliseconds."""
    ratios = np.asarray(original) / np.asarray(converted)
    picks = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    return Speedup(float(np.median(ratios)), float(low), float(high))


def _runner(
    session: ort.InferenceSession,
    feeds: Mapping[str, npt.NDArray[Any]],
    runtime: Runtime,
    label: str,
) -> Callable[[], object]:
    """Run once through the checked way, then return the bare run that is timed."""
    run(session, None, feeds, label=label)
    if runtime.provider == "cuda":
        return _bound(session, feeds, "cuda")
    given = dict(feeds)
    return lambda: session.run(None, given)


def _bound(
    session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]], device: str
) -> Callable[[], object]:
    """Return a run with inputs and outputs on `device`, that ends when the outputs are there."""
    binding = session.io_binding()
    for name, feed in feeds.items():
        binding.bind_ortvalue_input(
            name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feed), device, 0)
        )
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def once() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return once


def _warmed(once: Callable[[], object], warmup: int) -> float:
    """Run untimed; return the seconds that the last run took."""
    start = time.perf_counter()
    last = 0.0
    for _ in range(warmup):
        begin = time.perf_counter()
        once()
        last = time.perf_counter() - begin
        if begin + last - start > _WARM_SECONDS:
            break
    return last


def _burst(once: Callable[[], object], seconds: float) -> npt.NDArray[np.float64]:
    """Milliseconds of each run, for about `seconds`, and of one run at least."""
    clock = time.perf_counter_ns
    marks = [clock()]
    end = marks[0] + int(seconds * 1e9)
    while len(marks) == 1 or marks[-1] < end:
        once()
        marks.append(clock())
    return np.diff(np.asarray(marks)) / 1e6


def _settle() -> bool:
    """Wait until this program's threads sleep; False where they do not within the limit."""
    end = time.perf_counter() + _SETTLE_LIMIT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_SETTLE_STEP)
        if time.process_time() - before < _SETTLE_BUSY:
            return True
    return False


def _timing(
    bursts: list[npt.NDArray[np.float64]],
    batch: int,
    runtime: Runtime,
    *,
    spinning: bool,
    settled: bool,
) -> Timing:
    rounds = tuple(float(np.median(burst)) for burst in bursts)
    p10, p90 = np.quantile(np.concatenate(bursts), (0.1, 0.9))
    return Timing(
        median_ms=statistics.median(rounds),
        p10_ms=float(p10),
        p90_ms=float(p90),
        runs=sum(map(len, bursts)),
        rounds_ms=rounds,
        batch=batch,
        provider=runtime.provider,
        threads=runtime.thread_count,
        spinning=spinning,
        settled=settled,
    )
