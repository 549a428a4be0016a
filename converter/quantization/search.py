"""What suits a graph in int8: types, ranges and the layers that stay in float, by measured error and time.

Everything is judged alike, on held-out images under onnxruntime as this processor runs it, so that a product
that saturates shows as an error, and a slow one as time. Of two models the better has the lower

    time · max(error, harmless error)

so that one percent of time must buy one percent of error, until the error is harmless; and one that is not
faster than the float model counts after all that are, for it would not be taken. In this order:

1. the types of `ARITHMETICS`, with the plain ranges;
2. the other ranges, which change no time: the one of least error;
3. where the error still does harm, and the model is faster: each group of neighbouring layers alone in
   float. Those that take most error off for their multiply-accumulates then stay in float, 1, 2, 4, … groups
   at a time.

With 24 groups at most these are 36 models at most, whatever the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from converter.answers import Judge
from converter.errors import ModelError
from converter.outcome import Answers
from converter.planner.cost import LayerCost
from converter.progress import Progress
from converter.quantization.integers import ARITHMETICS, in_int8, layer_groups
from converter.quantization.ranges import METHODS, Ranges

__all__ = ["Found", "LeftInFloat", "Trial", "search_int8"]

GROUPS = 24
"""Groups of layers at most that are tried in float one by one."""
LEAST_GAIN = 0.05
"""Share of the error that a group must take off to stay in float; an even share of 24 groups is 0.04."""
CLEARLY = 0.9
"""Share of the price at most that a model with layers in float must have: errors are measured on some hundred
images, and times waver."""
UNTIMED = ("u8 × s8", "u8 × s7")
"""Types that are tried where nothing is timed: those that x86 has an instruction for."""
_INTEGER_COST = 0.5
"""What an integer multiply-accumulate counts beside one in float where nothing is timed."""

TimesOf = Callable[[Mapping[str, onnx.ModelProto]], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """One model that was tried.

    Attributes
    ----------
    name : str
        Types and ranges.
    left : int
        Layers in float.
    error : float
        `Answers.error`, from the float model.
    agreement : float or None
    time : float or None
        Relative to the float model, both in turns; None where it was not timed.
    """

    name: str
    left: int
    error: float
    agreement: float | None
    time: float | None


@dataclass(frozen=True)
class LeftInFloat:
    """Neighbouring layers that stay in float.

    Attributes
    ----------
    layers : tuple of str
    gained : float
        Share of the error that goes where these alone are in float, at most 1.
    """

    layers: tuple[str, ...]
    gained: float


@dataclass(frozen=True, eq=False)
class Found:
    """The best of what was tried.

    Attributes
    ----------
    model : onnx.ModelProto
    deviation : Answers
        From the float model.
    types, ranges : str
    left : tuple of LeftInFloat
    trials : tuple of Trial
        In the order in which they were tried.
    """

    model: onnx.ModelProto
    deviation: Answers
    types: str
    ranges: str
    left: tuple[LeftInFloat, ...]
    trials: tuple[Trial, ...]


@dataclass(eq=False)
class _Candidate:
    name: str
    model: onnx.ModelProto
    deviation: Answers
    left: tuple[LeftInFloat, ...] = ()
    time: float | None = None

    @property
    def slower(self) -> bool:
        """Whether it was timed, and is not faster than the float model."""
        return self.time is not None and self.time >= 1.0

    def trial(self) -> Trial:
        left = sum(len(each.layers) for each in self.left)
        return Trial(self.name, left, self.deviation.error, self.deviation.agreement, self.time)


def search_int8(
    ready: onnx.ModelProto,
    ranges: Ranges,
    judge: Judge,
    times_of: TimesOf | None,
    costs: Mapping[str, LayerCost],
    harmless: float,
    progress: Progress,
) -> Found:
    """Seek the int8 form of a model that is `ready_for_int8`.

    Parameters
    ----------
    ready : onnx.ModelProto
    ranges : Ranges
        Of its `quantizable_tensors`.
    judge : Judge
        Whose answers are those of the float model.
    times_of : callable or None
        Times of some models relative to the float one, measured in turns; None times nothing, and an
        integer multiply-accumulate counts half of one in float.
    costs : mapping of str to LayerCost
        Of its linear layers, by name.
    harmless : float
        Error that is let be.
    progress : Progress

    Raises
    ------
    ModelError
        Where onnxruntime quantizes the model in no way.
    """
    groups = layer_groups(ready, GROUPS)
    steps = len(ARITHMETICS) + len(METHODS) - 1
    with progress.stage("try int8", steps) as advance:
        plain = METHODS[0]
        by_types: dict[str, _Candidate] = {}
        refusal: ModelError | None = None
        arithmetics = [each for each in ARITHMETICS if times_of or each.name in UNTIMED]
        for arithmetic in arithmetics:
            name = f"{arithmetic.name}, {plain}"
            try:
                model = in_int8(ready, ranges.by(plain), arithmetic)
                by_types[arithmetic.name] = _Candidate(name, model, judge.of(model))
            except ModelError as error:  # types that this provider has no kernel for
                refusal = error
            advance(1, name)
        if not by_types:
            assert refusal is not None, "each of the types was tried"
            raise refusal
        tried = list(by_types.values())
        _time(tried, times_of)
        best = min(tried, key=lambda each: _price(each, costs, harmless))
        types = next(each for each in arithmetics if by_types.get(each.name) is best)

        method = plain
        for other in METHODS[1:]:
            name = f"{types.name}, {other}"
            model = in_int8(ready, ranges.by(other), types)
            candidate = _Candidate(name, model, judge.of(model), time=best.time)
            tried.append(candidate)
            if candidate.deviation.error < best.deviation.error:
                best, method = candidate, other
            advance(1, name)

    if best.deviation.error > harmless and not best.slower:
        mixed = _with_layers_in_float(
            best,
            groups,
            lambda left: in_int8(ready, ranges.by(method), types, left),
            judge,
            costs,
            harmless,
            progress,
        )
        _time([best, *mixed], times_of)
        tried += mixed
        cheapest = min(mixed, key=lambda each: _price(each, costs, harmless), default=best)
        if _clearly_cheaper(cheapest, best, costs, harmless):
            best = cheapest
    return Found(
        model=best.model,
        deviation=best.deviation,
        types=types.name,
        ranges=method,
        left=best.left,
        trials=tuple(each.trial() for each in tried),
    )


def _with_layers_in_float(
    whole: _Candidate,
    groups: Sequence[tuple[str, ...]],
    made: Callable[[Sequence[str]], onnx.ModelProto],
    judge: Judge,
    costs: Mapping[str, LayerCost],
    harmless: float,
    progress: Progress,
) -> list[_Candidate]:
    """Leave more and more groups in float, the most rewarding ones first, until the error is harmless."""
    gains: dict[tuple[str, ...], float] = {}
    with progress.stage("find what must stay in float", len(groups)) as advance:
        for names in groups:
            error = judge.of(made(names)).error
            gains[names] = 1.0 - error / whole.deviation.error
            advance(1, names[0])
    worth = [names for names in groups if gains[names] >= LEAST_GAIN]
    worth.sort(key=lambda names: gains[names] / max(_macs(names, costs), 1), reverse=True)
    mixed = []
    # not all groups, for that would be the float model
    for count in _doubling(min(len(worth), len(groups) - 1)):
        chosen = worth[:count]
        model = made([name for names in chosen for name in names])
        left = tuple(
            LeftInFloat(tuple(name for name in names if name in costs), gains[names])
            for names in chosen
        )
        mixed.append(_Candidate(whole.name, model, judge.of(model), left))
        if mixed[-1].deviation.error <= harmless:
            break
    return mixed


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [2**power for power in range(most.bit_length())]


def _macs(names: Sequence[str], costs: Mapping[str, LayerCost]) -> int:
    return sum(costs[name].macs or 0 for name in names if name in costs)


def _time(candidates: Sequence[_Candidate], times_of: TimesOf | None) -> None:
    if times_of is None:
        return
    times = times_of({str(index): each.model for index, each in enumerate(candidates)})
    for index, each in enumerate(candidates):
        each.time = times[str(index)]


def _clearly_cheaper(
    mixed: _Candidate, whole: _Candidate, costs: Mapping[str, LayerCost], harmless: float
) -> bool:
    slower, price = _price(mixed, costs, harmless)
    return not slower and price < CLEARLY * _price(whole, costs, harmless)[1]


def _price(
    candidate: _Candidate, costs: Mapping[str, LayerCost], harmless: float
) -> tuple[bool, float]:
    """Order candidates as the module says; the lower the better."""
    time = candidate.time
    if time is None:
        names = [name for each in candidate.left for name in each.layers]
        in_float = _macs(names, costs) / max(_macs(list(costs), costs), 1)
        time = in_float + _INTEGER_COST * (1.0 - in_float)
    error = candidate.deviation.error
    price = time * max(error, harmless) if math.isfinite(error) else math.inf
    return candidate.slower, price
