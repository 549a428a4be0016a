"""A plan that was carried out: fitted, put together, and timed; nothing is written yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from converter.config import Budget, SolverSettings
from converter.errors import ConfigError
from converter.model_file import load_model
from converter.outcome import Latency, LayerOutcome
from converter.pace import Paced, never_slower, plan
from converter.planner.choice import Choice
from converter.planner.cost import ModelCost, count_cost
from converter.preparation import Clock, Prepared
from converter.progress import Progress
from converter.realisation import Realised, realise, unchanged
from passes.base import PassResult

__all__ = ["Attempt", "attempt", "meet"]

ATTEMPTS = 2
"""Plans that are carried out where the first measures short of a budget in time, or lost layers that did not
pay."""
NEGLIGIBLE = 1e-6
"""Effect, as a share of the variance of the outputs, that is not worth a note."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a plan has come to.

    Attributes
    ----------
    model : onnx.ModelProto
        The finished model; the original where nothing made it faster.
    cost : ModelCost
        Of `model`.
    replaced, put_back : int
        Layers that are replaced in it, and those that were until the model was timed.
    layers : tuple of LayerOutcome
    passes : tuple of PassResult
        What replaced and reordered nodes.
    latency : Latency or None
        None where nothing is timed.
    notes : tuple of str
        What a reader must know of layers that were put back.
    choice : Choice
        The plan that was carried out.
    realised : Realised
        What it was fitted to, with no layer put back.
    """

    model: onnx.ModelProto
    cost: ModelCost
    replaced: int
    put_back: int
    layers: tuple[LayerOutcome, ...]
    passes: tuple[PassResult, ...]
    latency: Latency | None
    notes: tuple[str, ...]
    choice: Choice
    realised: Realised


def attempt(
    prepared: Prepared,
    paced: Paced | None,
    choice: Choice,
    solver: SolverSettings,
    progress: Progress,
    clock: Clock,
    *,
    trade: bool,
    realised: Realised | None = None,
) -> Attempt:
    """Fit a plan, and put layers back that do not pay.

    Parameters
    ----------
    prepared : Prepared
    paced : Paced or None
        None times nothing, and then nothing is put back.
    choice : Choice
        The plan.
    solver : SolverSettings
    progress : Progress
    clock : Clock
        Gets the seconds of each stage.
    trade : bool
        Whether the ADMM may trade ranks for channels of S.
    realised : Realised or None, default None
        What the plan was fitted to before; None fits it.

    Raises
    ------
    SolverError
        Where a fit becomes non-finite.
    """
    # in graph order, each layer on what the converted ones before it deliver
    if realised is None:
        with clock.stage("fit layers"):
            realised = realise(prepared, choice.chosen, solver, progress, trade=trade)
    model: onnx.ModelProto | None = realised.model
    left, latency, layers = realised.branches, None, realised.layers

    # against the original; layers that do not pay are put back
    if paced is not None:
        with clock.stage("time the result"):
            model, left, latency = never_slower(
                prepared, paced, choice.chosen, realised.branches, realised.model
            )
        back = realised.branches.keys() - left.keys()
        layers = tuple(_put_back(each, prepared) if each.name in back else each for each in layers)
        layers = tuple(_timed(each, paced, choice) for each in layers)
    if model is None:
        # the original as it is; it is counted as everywhere, with BatchNormalization folded
        result, cost = load_model(prepared.path), prepared.cost
    else:
        result, cost = model, count_cost(model, prepared.sample, label="the converted model")
    return Attempt(
        model=result,
        cost=cost,
        replaced=len(left),
        put_back=len(realised.branches) - len(left),
        layers=layers,
        passes=realised.passes,
        latency=latency,
        notes=(*_unproven(choice), *_verdict(realised.branches, left)),
        choice=choice,
        realised=realised,
    )


def meet(
    prepared: Prepared,
    paced: Paced | None,
    budget: Budget,
    solver: SolverSettings,
    progress: Progress,
    clock: Clock,
) -> Attempt:
    """Carry out the plan for a budget; one that is slower than it should be is made once more.

    A plan is tried with random weights before it is fitted, and on a machine whose pace swings that reading
    may be too good. One in time that measures short of it is then made tighter. One that lost layers, which
    did not pay, is made as the machine is by now, since without them it misses the budget, and carried out
    where it then reads faster than the original; where the plan is the same, its fits are too.

    Parameters
    ----------
    prepared, paced, solver, progress, clock
        As for `attempt`.
    budget : Budget

    Raises
    ------
    ConfigError
        Where the budget is out of reach.
    SolverError
        Where a fit becomes non-finite.
    """
    more, best = 1.0, None
    readings: list[float] = []
    for _ in range(ATTEMPTS):
        try:
            with clock.stage("choose"):
                choice = plan(prepared, paced, budget, more=more)
        except ConfigError:
            if best is None:
                raise
            break  # what is faster than the first is out of reach
        if best is not None and paced is not None and paced.predicted_speedup(choice.chosen) <= 1.0:
            break  # it was tried just now, and would be put back as the first one was
        alike = best if best is not None and best.choice.chosen == choice.chosen else None
        done = attempt(
            *(prepared, paced, choice, solver, progress, clock),
            trade=not budget.timed,
            realised=None if alike is None else alike.realised,
        )
        readings.append(_gained(done))
        if best is None or _worth(done, budget) >= _worth(best, budget):
            best = done
        short = _short(done, budget)
        if short <= 1.0 and not _lost(done, budget):
            break
        more *= short
    assert best is not None, "the first attempt ended, or its refusal was raised"
    return dataclasses.replace(best, notes=(*best.notes, *_missed(readings, best, budget)))


def _worth(done: Attempt, budget: Budget) -> tuple[int, float]:
    """Order attempts: the fewer layers a budget that is not in time lost the better, then the faster."""
    return -done.put_back if _has_counts(budget) else 0, _gained(done)


def _lost(done: Attempt, budget: Budget) -> bool:
    """Whether a budget is missed since layers did not pay."""
    return done.put_back > 0 and (_has_counts(budget) or not done.replaced)


def _has_counts(budget: Budget) -> bool:
    return budget.macs is not None or budget.params is not None


def _gained(done: Attempt) -> float:
    return 1.0 if done.latency is None else done.latency.speedup


def _missed(readings: Sequence[float], best: Attempt, budget: Budget) -> tuple[str, ...]:
    """Say that plans were made again, or that none was fast enough."""
    read = " and ".join(f"{each:.2f}" for each in readings)
    if _short(best, budget) > 1.0:
        return (f"the budget in time is missed: plans for it measured {read} times the original",)
    if len(readings) > 1:
        return (
            "planned twice, since the first plan was too slow or lost layers that did not pay: "
            f"{read} times the original",
        )
    return ()


def _short(done: Attempt, budget: Budget) -> float:
    """By how many times a model surely misses its budget in time; 1 where it may be met, or nothing helps."""
    if done.latency is None or not done.replaced or not budget.timed:
        return 1.0
    if budget.latency_ms is None:
        assert budget.speedup is not None, "a budget in time is one of the two"
        wanted = budget.speedup
    else:
        wanted = done.latency.original_ms / budget.latency_ms
    return wanted / done.latency.speedup if done.latency.high < wanted else 1.0


def _put_back(layer: LayerOutcome, prepared: Prepared) -> LayerOutcome:
    original = next(each for each in prepared.layers if each.name == layer.name)
    return unchanged(original, prepared, "put back: the replacement did not make the model faster")


def _timed(layer: LayerOutcome, paced: Paced, choice: Choice) -> LayerOutcome:
    """Add what the layer was planned to take; a layer whose time does not show stays without."""
    if layer.name not in paced.candidates:
        return layer
    before = paced.candidates[layer.name][0].ms or None
    after = before if layer.scheme == "kept" else choice.chosen[layer.name].ms
    return dataclasses.replace(layer, ms_before=before, ms_after=after)


def _unproven(choice: Choice) -> tuple[str, ...]:
    if choice.proven or choice.gap * choice.effect < NEGLIGIBLE:
        return ()
    share = max(choice.gap, 0.001)
    return (f"the search for a plan ended where up to {share:.1%} less effect may be possible",)


def _verdict(branches: Mapping[str, object], left: Mapping[str, object]) -> tuple[str, ...]:
    if not branches:
        return ("the original meets the budget as it is, so it was written",)
    if not left:
        return (
            "no plan within this budget made the model faster than the original on this machine, so "
            "the original was written as it is",
        )
    if len(left) < len(branches):
        return (
            f"{len(branches) - len(left)} layers were put back, since the model was slower with "
            "their replacements; the budget may be missed for that",
        )
    return ()
