"""The choice over all layers: one multiple-choice knapsack, solved by scipy's HiGHS.

Each layer takes exactly one of its candidates; the sum of their effects is least while the sums of
their costs stay within every limit:

    minimise Σ e_j x_j   subject to   Σ w_uj x_j ≤ room_u for each unit u,   Σ_{j in layer} x_j = 1

What HiGHS gets is made small and well scaled first, and nothing here can lose the optimum:

1. Candidates that another one of their layer dominates go, and those that exceed a limit even
   beside the cheapest of all other layers.
2. The linear relaxation gives prices λ ≥ 0. *Any* such prices bound the optimum from below by
   B = Σ_layers min_j (e_j + λ·w_j) − λ·room, and a choice with candidate j costs at least
   B + r_j, with r_j what j lies above its layer's minimum. So once a choice of value V is known,
   every candidate with r_j > V − B can go. (Pisinger, "A minimal algorithm for the multiple-choice
   knapsack problem", EJOR 83, 1995, calls what is left the core.)
3. The core is scaled by its own spread: effects from 1e-8 to 1 do not drown in HiGHS' tolerances.

HiGHS holds limits to a tolerance only. Each of its answers is summed again in float64, and one that
exceeds a limit by anything at all is forbidden and the next best asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from converter.errors import ConfigError, SolverError
from converter.schemes.form import Candidate

__all__ = ["Choice", "Limit", "Unit", "choose", "frontier"]

Unit = Literal["macs", "params", "ms"]

_NODES = 2000  # of branch and bound; a limit in nodes, unlike one in seconds, repeats itself
_SECONDS = 60.0  # a guard alone: 100 layers × 40 candidates end long before it
_PROVEN = 1e-6
_SLACK = 1e-12  # of a limit: above round-off, so that no choice that fits is lost before the check
_ROW_SCALE = 100.0  # a limit as HiGHS sees it: its tolerance of 1e-6 is then 1e-8 of the limit
_OBJECTIVE_SCALE = 1e4  # likewise for effects: its absolute gap is 1e-6
_FORBIDDEN = 20  # answers over a limit by less than HiGHS' tolerance, before giving up
_FIRST_CORE = 15  # candidates beside one for each layer, for each limit
_STDOUT = threading.Lock()


@dataclass(frozen=True)
class Limit:
    """A bound on what the layers of a choice may cost together, in one unit.

    Attributes
    ----------
    unit : {"macs", "params", "ms"}
    most : float
        The most that these layers may cost: what the whole model may, less `rest`.
    before : float or None
        Cost of these layers as they are, where `option` asks for a factor; None where it asks for
        an amount of the unit.
    option : str
        What the user asked for, as typed: "--macs 4", "--latency-ms 2".
    rest : float, default 0
        Cost of everything else in the model, so that a message can speak of the whole.
    """

    unit: Unit
    most: float
    before: float | None
    option: str
    rest: float = 0.0

    def reach(self, least: float) -> str:
        """Say the `least` cost of these layers as the option would ask for it, and never too much."""
        total = self.rest + least
        if total <= 0:  # milliseconds are differences of measurements, and noise can do this
            return f"{total:.3g}"
        if self.before is not None:
            return f"{math.floor((self.rest + self.before) / total * 100) / 100:g}"
        step = 10.0 ** (math.floor(math.log10(total)) - 2)
        return f"{math.ceil(total / step) * step:.4g} {self.unit}"


@dataclass(frozen=True)
class Choice:
    """One candidate for each layer, and what they come to.

    Attributes
    ----------
    chosen : dict of str to Candidate
        By layer, in the order of the layers.
    effect : float
        Sum of the effects.
    totals : dict of Unit to float
        Sum of the costs over these layers alone; "ms" only where every candidate was measured.
    gap : float
        No choice within the limits has less than (1 − gap) · effect, to HiGHS' round-off; in
        [0, 1].
    """

    chosen: dict[str, Candidate]
    effect: float
    totals: dict[Unit, float]
    gap: float

    @property
    def proven(self) -> bool:
        """Whether the choice is the best there is, to a relative 1e-6."""
        return self.gap <= _PROVEN


def choose(layers: Mapping[str, Sequence[Candidate]], limits: Sequence[Limit]) -> Choice:
    """Choose one candidate for each layer: the least sum of effects within all limits.

    Equal input gives an equal result: the search ends after 2,000 nodes of branch and bound, not
    after some time, and `Choice.gap` says what is then left to prove. For 100 layers × 40 candidates
    nothing was left in trials; one limit took half a second of CPU time at most, and two or three
    that hold parameters beside others up to six.

    Parameters
    ----------
    layers : mapping of str to sequence of Candidate
        Every layer has at least one; the layer as it is counts where it is among them.
    limits : sequence of Limit
        At most one for each unit; none gives the least effects.

    Raises
    ------
    ConfigError
        Where no choice keeps the limits; it says what can be reached.
    SolverError
        Where an effect or a cost is not a finite number, or the search found nothing in time.
    """
    _check_numbers(layers, limits)
    best = _least(layers, _effect, limits)
    if best is None:
        _refuse(layers, limits)
    chosen = dict(zip(layers, best.picked, strict=True))
    effect = math.fsum(c.effect for c in best.picked)
    gap = max(0.0, effect - best.bound) / effect if effect > 0 else 0.0
    return Choice(chosen, effect, _totals(best.picked), min(gap, 1.0))


def frontier(layers: Mapping[str, Sequence[Candidate]], unit: Unit, points: int) -> list[Choice]:
    """Trade effect against one unit: the best choices for budgets from the cheapest to no loss.

    Parameters
    ----------
    layers : mapping of str to sequence of Candidate
        As for `choose`.
    unit : {"macs", "params", "ms"}
    points : int
        Budgets to choose for, from 2, in geometric steps from the least cost that the layers can
        have to that of their least effects (every layer kept, unless something cheaper is as good).

    Returns
    -------
    list of Choice
        By rising cost and falling effect, none dominated; at most `points`.
    """
    if points < 2:
        raise ConfigError(f"{points} points make no front; give at least 2")
    cheapest = math.fsum(min(_cost(c, unit) for c in found) for found in layers.values())
    harmless = math.fsum(
        _cost(min(found, key=lambda c: (c.effect, _cost(c, unit))), unit)
        for found in layers.values()
    )
    start = max(cheapest, 1e-6 * harmless)
    between = np.geomspace(start, harmless, points)[1:-1] if harmless > 0 else ()
    choices = [
        choose(layers, [Limit(unit, float(most), None, f"{most:g} {unit}")])
        for most in (cheapest, *between, harmless)
        if most >= cheapest
    ]
    choices.sort(key=lambda choice: (choice.totals[unit], choice.effect))
    front: list[Choice] = []
    for choice in choices:
        if not front or choice.effect < front[-1].effect:
            front.append(choice)
    return front


def _cost(candidate: Candidate, unit: Unit) -> float:
    if unit == "macs":
        return candidate.macs
    if unit == "params":
        return candidate.params
    if candidate.ms is None:
        raise ValueError(f"the candidate {candidate.form} was not measured and cannot be timed")
    return candidate.ms


def _effect(candidate: Candidate) -> float:
    return candidate.effect


def _totals(picked: Sequence[Candidate]) -> dict[Unit, float]:
    units: list[Unit] = ["macs", "params"]
    if all(c.ms is not None for c in picked):
        units.append("ms")
    return {unit: _total(picked, unit) for unit in units}


def _total(picked: Sequence[Candidate], unit: Unit) -> float:
    """Sum the costs, rounded once: the same for every order of the layers."""
    return math.fsum(_cost(c, unit) for c in picked)


def _check_numbers(layers: Mapping[str, Sequence[Candidate]], limits: Sequence[Limit]) -> None:
    if len({limit.unit for limit in limits}) < len(limits):
        raise ValueError("two limits bound the same unit")
    for limit in limits:
        if not math.isfinite(limit.most):
            raise SolverError(f"the limit of {limit.option} is not finite; check the model's cost")
    for name, found in layers.items():
        if not found:
            raise ValueError(f"the layer {name} has no candidate")
        for candidate in found:
            numbers = [candidate.effect, *(_cost(candidate, limit.unit) for limit in limits)]
            if not all(map(math.isfinite, numbers)):
                raise SolverError(
                    f"the candidate {candidate.form} of {name} has an effect or a cost that is not "
                    "finite; check the calibration images and the model's weights"
                )


def _refuse(layers: Mapping[str, Sequence[Candidate]], limits: Sequence[Limit]) -> NoReturn:
    """Say which limit is the first that cannot be kept beside those before it, and how far it can."""
    for count, limit in enumerate(limits):
        others = limits[:count]
        best = _least(layers, partial(_cost, unit=limit.unit), others)
        if best is None:
            break
        least = _total(best.picked, limit.unit)
        if least > limit.most:
            beside = "".join(f" beside {other.option}" for other in others)
            smallest = "there" if others else "with every layer at its cheapest"
            raise ConfigError(
                f"the budget {limit.option} is out of reach for this model{beside}: {smallest} it "
                f"is {limit.reach(least)} at best; ask for less"
            )
    options = " and ".join(limit.option for limit in limits)
    raise SolverError(f"no choice was found for {options} in time; ask for a little less")


@dataclass(frozen=True)
class _Best:
    """Candidates by layer, and a bound that no choice within the limits goes below."""

    picked: list[Candidate]
    bound: float


@dataclass(frozen=True, eq=False)
class _Knapsack:
    """The problem as arrays over all candidates of all layers.

    Attributes
    ----------
    values : ndarray of shape (n,)
        What is minimised.
    costs : ndarray of shape (n, m)
        Above the layer's least, over the room of each limit.
    room : ndarray of shape (m,)
        1 up to round-off, or 0 where the layers' least costs are all that there is.
    layer : ndarray of shape (n,), int64
        Ascending from 0.
    candidates : list of Candidate
    """

    values: NDArray[np.float64]
    costs: NDArray[np.float64]
    room: NDArray[np.float64]
    layer: NDArray[np.int64]
    candidates: list[Candidate]

    @property
    def layers(self) -> int:
        return int(self.layer[-1]) + 1

    def least_of_layer(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Spread each layer's minimum over its candidates."""
        least = np.full(self.layers, np.inf)
        np.minimum.at(least, self.layer, numbers)
        return least[self.layer]

    def one_each(self, chosen: NDArray[np.int64]) -> bool:
        return np.array_equal(self.layer[chosen], np.arange(self.layers))


def _least(
    layers: Mapping[str, Sequence[Candidate]],
    value: Callable[[Candidate], float],
    limits: Sequence[Limit],
) -> _Best | None:
    """Minimise the sum of `value` within the limits; None where no choice keeps them."""
    fronts = [_front(found, value, [limit.unit for limit in limits]) for found in layers.values()]
    easiest = [found[0] for found in fronts]
    if _keeps(easiest, limits):
        return _Best(easiest, math.fsum(map(value, easiest)))
    knapsack = _knapsack(fronts, value, limits)
    if knapsack is None:
        return None
    relaxed = _reduced_values(knapsack)
    if relaxed is None:
        return None
    reduced, bound = relaxed

    # a first core of the few candidates nearest to their layer's minimum gives a good choice, whose
    # value then says which candidates the optimum can have at all
    count = min(len(reduced), knapsack.layers + _FIRST_CORE * len(limits))
    margin = float(np.partition(reduced, count - 1)[count - 1])
    best: NDArray[np.int64] | None = None
    excess = math.inf  # of the best choice, above `bound`
    while True:
        core = np.flatnonzero(reduced <= margin)
        found, core_bound = _search(knapsack, core, limits)
        if found is not None and float(knapsack.values[found].sum()) - bound < excess:
            best, excess = found, float(knapsack.values[found].sum()) - bound
        if len(core) == len(reduced) or excess <= margin:
            break
        margin = excess
    if best is None:
        return None
    # every choice lies in the core, or above bound + margin, and that is above the best one
    proven = max(bound, min(core_bound, bound + excess))
    return _Best([knapsack.candidates[j] for j in best], proven)


def _front(
    found: Sequence[Candidate], value: Callable[[Candidate], float], units: Sequence[Unit]
) -> list[Candidate]:
    """Candidates that no other one equals or betters in value and every unit, by rising value."""
    ordered = sorted(
        found,
        key=lambda c: (value(c), *(_cost(c, unit) for unit in units), c.macs, c.params, c.form),
    )
    costs = np.array([[_cost(c, unit) for unit in units] for c in ordered]).reshape(
        len(ordered), len(units)
    )
    no_dearer = (costs[:, None] <= costs).all(axis=2)  # [i, j]: i costs no more than j
    dominated = np.triu(no_dearer, 1).any(axis=0)
    return [ordered[j] for j in np.flatnonzero(~dominated)]


def _keeps(picked: Sequence[Candidate], limits: Sequence[Limit]) -> bool:
    return all(_total(picked, limit.unit) <= limit.most for limit in limits)


def _knapsack(
    fronts: Sequence[Sequence[Candidate]],
    value: Callable[[Candidate], float],
    limits: Sequence[Limit],
) -> _Knapsack | None:
    """Scale the costs, without candidates that exceed a limit even beside all others' cheapest."""
    while True:
        candidates = [c for found in fronts for c in found]
        layer = np.repeat(np.arange(len(fronts)), [len(found) for found in fronts])
        room, costs = [], []
        for limit in limits:
            cost = np.array([_cost(c, limit.unit) for c in candidates])
            least = np.full(len(fronts), np.inf)
            np.minimum.at(least, layer, cost)
            left = limit.most - math.fsum(least)
            if left < 0:
                return None
            slack = _SLACK * max(abs(limit.most), float(np.abs(cost).max()))
            room.append((left + slack) / max(left, slack))
            costs.append((cost - least[layer]) / max(left, slack))
        columns = np.stack(costs, axis=1)
        fits = (columns <= np.array(room)).all(axis=1)
        if fits.all():
            values = np.array([value(c) for c in candidates])
            return _Knapsack(values, columns, np.array(room), layer, candidates)
        fronts = [
            [candidates[j] for j in np.flatnonzero(fits & (layer == one))]
            for one in range(len(fronts))
        ]
        if not all(fronts):
            return None


def _reduced_values(knapsack: _Knapsack) -> tuple[NDArray[np.float64], float] | None:
    """Price the limits by the linear relaxation; None where not even that can keep them.

    Returns
    -------
    reduced : ndarray of shape (n,)
        What each candidate's value, with its priced costs, lies above its layer's least.
    bound : float
        No choice within the limits has a lower value.
    """
    base = knapsack.least_of_layer(knapsack.values)
    spread = float((knapsack.values - base).max())
    scale = _OBJECTIVE_SCALE / spread if spread > 0 else 1.0
    relaxed = optimize.linprog(
        (knapsack.values - base) * scale,
        A_ub=knapsack.costs.T,
        b_ub=knapsack.room,
        A_eq=_membership(knapsack.layer),
        b_eq=np.ones(knapsack.layers),
        bounds=(0, 1),
        method="highs",
    )
    if relaxed.status == 2:
        return None
    if relaxed.status != 0:
        raise SolverError(
            f"the relaxed choice ended with {relaxed.message!r}; ask for a little less"
        )
    prices = np.maximum(-relaxed.ineqlin.marginals, 0.0) / scale
    priced = knapsack.values + knapsack.costs @ prices
    least = knapsack.least_of_layer(priced)
    first_of_layer = np.unique(knapsack.layer, return_index=True)[1]
    bound = math.fsum(least[first_of_layer]) - float(prices @ knapsack.room)
    return priced - least, bound


def _membership(layer: NDArray[np.int64]) -> Any:
    """Matrix of shape (layers, n): 1 where the candidate is one of the layer."""
    return sparse.csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))


def _search(
    knapsack: _Knapsack, core: NDArray[np.int64], limits: Sequence[Limit]
) -> tuple[NDArray[np.int64] | None, float]:
    """Branch and bound over the candidates in `core`, with limits held in float64.

    Returns
    -------
    chosen : ndarray of shape (layers,), int64, or None
        Indices into the knapsack; None where the core holds no choice within the limits.
    bound : float
        No choice of the core within the limits has a lower value.
    """
    layer = knapsack.layer[core]
    base = knapsack.least_of_layer(knapsack.values)[core]
    values = knapsack.values[core] - base
    scale = _OBJECTIVE_SCALE / float(values.max()) if values.max() > 0 else 1.0
    offset = math.fsum(base[np.unique(layer, return_index=True)[1]])
    constraints = [
        optimize.LinearConstraint(_membership(layer), 1, 1),
        optimize.LinearConstraint(
            knapsack.costs[core].T * _ROW_SCALE, -np.inf, knapsack.room * _ROW_SCALE
        ),
    ]
    for _ in range(_FORBIDDEN):
        with _silent():
            solved = optimize.milp(
                values * scale,
                integrality=np.ones(len(core)),
                bounds=optimize.Bounds(0, 1),
                constraints=constraints,
                # presolve finds nothing more in a core, and takes longer than the search
                options={
                    "presolve": False,
                    "mip_rel_gap": 0.0,
                    "node_limit": _NODES,
                    "time_limit": _SECONDS,
                },
            )
        if solved.x is None:
            return None, math.inf if solved.status == 2 else -math.inf
        inside = solved.x > 0.5
        chosen = core[inside]
        if knapsack.one_each(chosen) and _keeps([knapsack.candidates[j] for j in chosen], limits):
            return chosen, offset + solved.mip_dual_bound / scale
        # HiGHS' tolerance let it through: forbid just this choice, which keeps the search exact
        constraints.append(
            optimize.LinearConstraint(inside[None, :].astype(float), -np.inf, inside.sum() - 1)
        )
    return None, -math.inf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what native code prints off the process's standard output.

    HiGHS 1.12 prints a line each time it repairs a solution, whatever its options say
    (jump-dev/HiGHS.jl#312). What other threads print meanwhile goes the same way, so this encloses
    the one call alone. Not on Windows, where the C library's buffer is out of reach.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    with _STDOUT:  # two at once would save each other's silence and restore that
        try:
            shown = os.dup(1)
        except OSError:  # no standard output to protect
            yield
            return
        flush(None)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        try:
            yield
        finally:
            flush(None)
            os.dup2(shown, 1)
            os.close(shown)
