"""A chosen plan becomes a model: layers are fitted in the order of the graph and replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from converter.branches import branches_of
from converter.config import SolverSettings
from converter.fitting import UNSEEN_EVERY, fit
from converter.outcome import LayerOutcome
from converter.planner.cost import ModelCost
from converter.preparation import Prepared
from converter.progress import Progress
from converter.schemes import KEEP, Candidate, Form, Geometry, cost_of
from converter.solver.solution import Solution
from converter.work import Work, key_of
from passes.base import PassResult, run_passes
from passes.exchange import export_model, import_graph
from passes.layers import Layer
from passes.reorder_sums import ReorderSums
from passes.split import Branches, Split

__all__ = ["Realised", "realise", "rewritten", "unchanged"]


@dataclass(frozen=True, eq=False)
class Realised:
    """A plan that was carried out.

    Attributes
    ----------
    model : onnx.ModelProto
    layers : tuple of LayerOutcome
        In graph order, the kept ones too.
    passes : tuple of PassResult
        What replaced and reordered nodes.
    branches : dict of str to Branches
        What each replaced layer became, so that some of them can be put back without a new fit.
    """

    model: onnx.ModelProto
    layers: tuple[LayerOutcome, ...]
    passes: tuple[PassResult, ...]
    branches: dict[str, Branches]


def realise(
    prepared: Prepared,
    chosen: Mapping[str, Candidate],
    solver: SolverSettings,
    progress: Progress,
    *,
    trade: bool,
) -> Realised:
    """Fit the chosen forms in graph order, each on what the converted layers before it deliver.

    Parameters
    ----------
    prepared : Prepared
    chosen : mapping of str to Candidate
        By the name of each convertible layer.
    solver : SolverSettings
    progress : Progress
    trade : bool
        Whether the ADMM may trade ranks for channels of S.
    """
    graph = import_graph(prepared.original)
    current = prepared.original
    results: tuple[PassResult, ...] = ()
    outcomes: dict[str, LayerOutcome] = {}
    replaced: dict[str, Branches] = {}
    waiting = [layer for layer in prepared.convertible if chosen[layer.name].form != KEEP]
    with progress.stage("fit layers", len(waiting)) as advance:
        for layer in waiting:
            advance(0, layer.name)
            started = time.monotonic()
            candidate, geometry = chosen[layer.name], prepared.geometries[layer.name]
            sample = prepared.samples[layer.name]
            fitted = _fitted(
                prepared.work,
                layer,
                geometry,
                sample,
                # also where the fit is kept: the next layer's recording goes on from this one
                prepared.recorder.inputs(current, layer, sample),
                prepared.metrics[layer.name],
                candidate.form,
                solver,
                trade=trade,
            )
            replaced[layer.name] = branches_of(geometry, candidate.form, fitted)
            results += run_passes(graph, [Split(layer, replaced[layer.name])])
            current = export_model(graph, prepared.original)
            outcomes[layer.name] = _outcome(
                *(layer, geometry, candidate, fitted, time.monotonic() - started),
                judged=len(sample.positions) >= UNSEEN_EVERY,
            )
            advance(1)
    results += run_passes(graph, [ReorderSums()])
    return Realised(
        model=export_model(graph, prepared.original),
        layers=tuple(
            outcomes.get(layer.name) or unchanged(layer, prepared) for layer in prepared.layers
        ),
        passes=results,
        branches=replaced,
    )


def _fitted(work: Work | None, *problem: Any, trade: bool) -> Solution:
    """`fit`, or what is kept of an earlier run that was given the same."""
    if work is None:
        return fit(*problem, trade=trade)
    key = key_of("fit", *problem, trade)
    found = work.solution(key)
    if found is None:
        found = fit(*problem, trade=trade)
        work.keep_solution(key, found)
    return found


def rewritten(
    prepared: Prepared, branches: Mapping[str, Branches], *, reorder: bool = True
) -> onnx.ModelProto:
    """Give the model in which the named layers are replaced by branches that are there already.

    Without `reorder` the response of each of them stays a tensor.
    """
    graph = import_graph(prepared.original)
    splits = [
        Split(layer, branches[layer.name])
        for layer in prepared.convertible
        if layer.name in branches
    ]
    run_passes(graph, [*splits, *([ReorderSums()] if reorder else [])])
    return export_model(graph, prepared.original)


def _outcome(
    layer: Layer,
    geometry: Geometry,
    candidate: Candidate,
    solution: Solution,
    seconds: float,
    *,
    judged: bool,
) -> LayerOutcome:
    form = Form(
        candidate.form.scheme if solution.rank else "sparse",
        solution.ranks if solution.rank else (),
        len(solution.support),
    )
    before, after = cost_of(geometry, KEEP), cost_of(geometry, form)
    return LayerOutcome(
        name=layer.name,
        op=layer.op,
        shape=(geometry.outputs, geometry.channels, *geometry.kernel),
        activation=str(layer.activation),
        scheme=form.family,
        ranks=form.ranks,
        support=form.support,
        macs_before=round(before[0]),
        macs_after=round(after[0]),
        params_before=round(before[1]),
        params_after=round(after[1]),
        error=solution.unseen if judged else None,
        effect=candidate.effect,
        status=solution.status,
        iterations=len(solution.history),
        seconds=seconds,
        trace=solution.history,
    )


def unchanged(layer: Layer, prepared: Prepared, reason: str | None = None) -> LayerOutcome:
    """Say of a layer that it stays as it is, and why."""
    candidates = prepared.candidates.get(layer.name)
    if layer.reason is not None or candidates is None:
        macs, params = _listed(layer, prepared.cost)
        reason = layer.reason
    else:
        macs, params = round(candidates[0].macs), round(candidates[0].params)
        cheaper = len(candidates) > 1
        reason = reason or (
            "the budget is met more cheaply elsewhere" if cheaper else "no form of it is cheaper"
        )
    return LayerOutcome(
        name=layer.name,
        op=layer.op,
        shape=() if layer.weight is None else tuple(layer.weight.shape),
        activation=str(layer.activation),
        scheme="kept",
        ranks=(),
        support=0,
        macs_before=macs,
        macs_after=macs,
        params_before=params,
        params_after=params,
        reason=reason,
    )


def _listed(layer: Layer, cost: ModelCost) -> tuple[int, int]:
    same = (each for each in cost.layers if (each.op, each.output) == (layer.op, layer.output))
    found = next(same, None)
    return (0, 0) if found is None else (found.macs or 0, found.params)
