"""A large budget is met gradually: convert part of the way, recover, and go on from what that one computes.

A conversion replaces what is there by what is nearest, layer by layer. Half of the way that is still near,
and the network as a whole can make up for it; what it then computes has less to lose on the rest of the
way. So the recovered network is written out densely, in the original's graph, and that one is converted
next. The original stays what all of them learn from, are judged by and timed against.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from converter.config import Budget, RecoverySettings, Runtime, SolverSettings
from converter.pace import Paced, plan
from converter.planner.cost import count_cost
from converter.preparation import Clock, Prepared, Start
from converter.progress import Progress
from converter.realisation import realise, rewritten
from converter.refine.dense import dense
from converter.refine.recovery import Teacher

__all__ = ["Way", "go_part_way", "parts_of", "shares_of"]

FROM = 2.0
"""Factor from which on a budget is met in two parts."""


@dataclass(frozen=True, eq=False)
class Way:
    """Where a gradual conversion has come to.

    Attributes
    ----------
    start : Start
        The recovered network, densely, which is converted next.
    note : str
        What the part has come to.
    """

    start: Start
    note: str


def parts_of(budget: Budget | None, settings: RecoverySettings) -> int:
    """Say in how many parts a budget is met; a tolerance, which is no budget, in one."""
    if budget is None:
        return 1
    if settings.gradual is not None:
        return settings.gradual
    factors = (budget.macs, budget.params, budget.speedup)
    return 2 if any(factor is not None and factor >= FROM for factor in factors) else 1


def shares_of(parts: int) -> tuple[float, ...]:
    """Share of the length of a recovery that each part gets: the further on, the more."""
    return tuple(2 * part / (parts * (parts + 1)) for part in range(1, parts + 1))


def go_part_way(
    prepared: Prepared,
    paced: Paced | None,
    budget: Budget,
    part: int,
    parts: int,
    *,
    solver: SolverSettings,
    runtime: Runtime,
    teacher: Callable[[], Teacher],
    checkpoint: Path,
    progress: Progress,
    clock: Clock,
) -> Way:
    """Convert to a part of a budget and recover; see the module.

    Parameters
    ----------
    prepared, paced, solver, progress, clock
        As for `converter.attempt.meet`.
    budget : Budget
        The whole.
    part, parts : int
        Which part, from 1, and of how many.
    runtime : Runtime
        Where dense weights are read off.
    teacher : callable
        Gives who the network learns from, once there is something to learn.
    checkpoint : Path
        Of this part's recovery. It stays, so that a run that is cut off later has this part behind it.

    Raises
    ------
    ConfigError
        Where the whole budget is out of reach.
    SolverError
        Where a fit or the training becomes non-finite.
    """
    with clock.stage("choose"):
        if part == 1:
            plan(prepared, paced, budget)  # what cannot be met in the end is refused now
        original_ms = None if paced is None else paced.model.original_ms
        some = _some_of(budget, part / parts, original_ms)
        choice = plan(prepared, paced, some)
    with clock.stage("fit layers"):
        realised = realise(prepared, choice.chosen, solver, progress, trade=not budget.timed)
    converted = rewritten(prepared, realised.branches, reorder=False)
    with clock.stage("recover"):
        recovered = teacher().teach(
            converted, share=shares_of(parts)[part - 1], checkpoint=checkpoint, progress=progress
        )
        model = dense(prepared.original, recovered.model, runtime)
    cost = count_cost(recovered.model, prepared.sample, label="the model on the way")
    loss = f"{recovered.before.loss:.4g} → {recovered.after.loss:.4g}"
    return Way(
        start=Start(model, prepared.passes, _digest(model)),
        note=(
            f"part {part} of {parts}: MACs ÷ {prepared.cost.macs / cost.macs:.2f}, parameters ÷ "
            f"{prepared.cost.params / cost.params:.2f}, recovered for {recovered.seconds:.0f} s from a "
            f"held-out loss of {loss}; the next part converts what that one computes"
        ),
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
