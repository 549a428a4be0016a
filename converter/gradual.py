"""A large budget is met gradually: convert part of the way, recover, and go on from what that one computes.

A conversion replaces what is there by what is nearest, layer by layer. Half of the way that is still near,
and the network as a whole can make up for it; what it then computes has less to lose on the rest of the
way. So the recovered network is written out densely, in the original's graph, and that one is converted
next. The original stays what all of them learn from, are judged by and timed against.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx

from converter.config import Budget, RecoverySettings, Runtime, SolverSettings
from converter.errors import ConverterError
from converter.pace import Paced, plan
from converter.planner.cost import count_cost
from converter.preparation import Clock, Prepared, Start
from converter.progress import Progress
from converter.realisation import realise, rewritten
from converter.refine.dense import dense
from converter.refine.recovery import Recovered, Teacher

__all__ = ["go_on_from_parts", "parts_of", "shares_of"]

FROM = 2.0
"""Factor from which on a budget is met in two parts."""


def parts_of(
    budget: Budget | None, recovery: RecoverySettings | None, original_ms: float | None
) -> int:
    """Say in how many parts a budget is met; a tolerance, which is no budget, in one."""
    if budget is None or recovery is None:
        return 1
    if recovery.gradual is not None:
        return recovery.gradual
    factors = [budget.macs, budget.params, budget.speedup]
    if budget.latency_ms is not None and original_ms is not None:
        factors.append(original_ms / budget.latency_ms)
    return 2 if any(factor is not None and factor >= FROM for factor in factors) else 1


def shares_of(parts: int) -> tuple[float, ...]:
    """Share of the length of a recovery that each part gets: the further on, the more."""
    return tuple(2 * part / (parts * (parts + 1)) for part in range(1, parts + 1))


def go_on_from_parts(
    begin: Callable[[Start | None], tuple[Prepared, Paced | None]],
    budget: Budget | None,
    recovery: RecoverySettings | None,
    *,
    solver: SolverSettings,
    runtime: Runtime,
    teacher: Callable[[], Teacher] | None,
    checkpoint: Callable[[int], Path],
    progress: Progress,
    clock: Clock,
) -> tuple[Prepared, Paced | None, int, tuple[str, ...]]:
    """Go all parts of the way but the last, and prepare that one; see the module.

    Parameters
    ----------
    begin : callable
        Prepares a network, and times what it may become; None stands for the original.
    budget : Budget or None
        The whole; None for a tolerance, which is met in one part.
    recovery : RecoverySettings or None
        None where nothing is recovered: then there is one part.
    solver : SolverSettings
    runtime : Runtime
        Where dense weights are read off.
    teacher : callable or None
        Gives who the networks learn from, once there is something to learn; None without a recovery.
    checkpoint : callable
        Says where the state of a part's recovery lies. It stays there, so that a run that is cut off later
        has this part behind it.
    progress : Progress
    clock : Clock
        Gets the seconds of each stage.

    Returns
    -------
    prepared, paced
        What `begin` made of the network that the last part converts.
    parts : int
        In how many parts the budget is met; fewer than planned where one could not be recovered.
    notes : tuple of str
        What each part has come to.

    Raises
    ------
    ConfigError
        Where the whole budget is out of reach.
    ModelError, CalibrationError, SolverError
        As `prepare`.
    """
    notes: list[str] = []
    prepared, paced = begin(None)
    original_ms = None if paced is None else paced.model.original_ms
    parts = parts_of(budget, recovery, original_ms)
    for part in range(1, parts):
        assert budget is not None, "a tolerance is met in one part"
        assert teacher is not None, "without a recovery there is one part"
        with clock.stage("choose"):
            if part == 1:
                plan(prepared, paced, budget)  # what cannot be met in the end is refused now
            choice = plan(prepared, paced, _some_of(budget, part / parts, original_ms))
        with clock.stage("fit layers"):
            realised = realise(prepared, choice.chosen, solver, progress, trade=not budget.timed)
        converted = rewritten(prepared, realised.branches, reorder=False)
        with clock.stage("recover"):
            try:
                recovered = teacher().teach(
                    converted,
                    share=shares_of(parts)[part - 1],
                    checkpoint=checkpoint(part),
                    progress=progress,
                )
            except ConverterError as error:
                # what is in the way of this part may be in that of the last, too, which says so
                notes.append(
                    f"part {part} of {parts} could not be recovered, so it is the last: {error}"
                )
                parts = part
                break
            model = dense(prepared.original, recovered.model, runtime)
        notes += (f"part {part} of {parts}: {_outcome(prepared, recovered)}", *recovered.notes)
        start = Start(model, prepared.passes, _digest(model))
        del prepared, paced  # what was recorded of one part is not held beside that of the next
        prepared, paced = begin(start)
    return prepared, paced, parts, tuple(notes)


def _outcome(prepared: Prepared, recovered: Recovered) -> str:
    cost = count_cost(recovered.model, prepared.sample, label="the model on the way")
    macs, params = prepared.cost.macs / cost.macs, prepared.cost.params / cost.params
    return (
        f"MACs ÷ {macs:.2f}, parameters ÷ {params:.2f}, recovered for {recovered.seconds:.0f} s from a "
        f"held-out loss of {recovered.before.loss:.4g} → {recovered.after.loss:.4g}; the next part "
        "converts what that one computes"
    )


def _some_of(budget: Budget, share: float, original_ms: float | None) -> Budget:
    """Give the budget of a share of the way: factors are powers of the whole."""
    latency = budget.latency_ms
    if latency is not None:
        assert original_ms is not None, "a budget in time has measured layers"
        latency = original_ms * min(latency / original_ms, 1.0) ** share
    return Budget(
        macs=_power(budget.macs, share),
        params=_power(budget.params, share),
        speedup=_power(budget.speedup, share),
        latency_ms=latency,
    )


def _power(factor: float | None, share: float) -> float | None:
    return None if factor is None else factor**share


def _digest(model: onnx.ModelProto) -> str:
    """Tell the weights of a model from others; its graph is that of the file it came from."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()
