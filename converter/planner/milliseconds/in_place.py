"""Layers measured where they stand, on the CPU.

In each of some sessions every layer has another form that is still to be measured, so that shapes,
neighbours, onnxruntime's blocked layout and the state of the caches are those of a real model. Its profile
says how long each node ran.

A profile adds some microseconds to each node. A chain of nodes that do nothing shows how many, more or
less. With that taken off, the nodes add up to the time of a run but for one factor. Both numbers are fitted
to the times of whole runs of all sessions, robustly, since other programs disturb one session or the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from converter.planner.milliseconds.forms import Measured, Subject, with_forms
from converter.planner.milliseconds.owners import by_layer
from converter.planner.milliseconds.profiling import Profile, profile_overhead, profiled
from converter.planner.milliseconds.shelf import Shelf
from converter.progress import Progress
from converter.schemes.form import KEEP, Form
from passes.layers import Layer

__all__ = ["measured_in_place"]

_RUN_SECONDS = 0.15
"""Of one session: profiled for so long, then timed for half of it; the original for three times that."""
_LEAST_FITTED = 5
"""With fewer sessions the overhead of a profile is what the chain says."""
_LEAST_OVERHEAD, _MOST_OVERHEAD = 0.5, 2.0
"""Of a node with something to do, relative to one of the chain."""
_BUSY_FACTOR = 1.4
"""A run that takes so many times its nodes was disturbed; read 0.9 to 1.2 where nothing else ran."""
_BUSY_MS = 0.3
"""In shorter runs the call itself has a share."""


def measured_in_place(subject: Subject, shelf: Shelf, progress: Progress) -> Measured:
    """Profile the original, then sessions in which the layers have forms to measure; see `measure_layers`."""
    layers, runtime = subject.layers, subject.runtime
    rounds = _rounds(subject, shelf)
    profiles = []
    with progress.stage("measure layers", len(rounds)) as advance:
        for forms in rounds:
            seconds = _RUN_SECONDS if forms else 3 * _RUN_SECONDS
            # no name for the copy here: `profiled` lets go of it as soon as its session is open
            profiles.append(profiled(with_forms(subject, forms), subject.feeds, runtime, seconds))
            advance(1, f"{len(forms)} layers changed")
    overhead, factor = _fitted(profiles, profile_overhead(runtime))
    rests = []
    for forms, profile in zip(rounds, profiles, strict=True):
        times = by_layer(profile, layers, overhead)
        for layer in layers:
            form = forms.get(layer.name, KEEP)
            # a layer that stays as it is while others change is no point of its own
            if layer.name in times and (form != KEEP or not forms):
                shelf.note(layer, form, times[layer.name])
        rests.append(profile.total(overhead) - sum(times.values()))
    rest = factor * statistics.median(rests)
    return Measured(factor, _drift(layers, shelf), rest, _doubts(factor, profiles[0].wall_ms))


def _doubts(factor: float, wall_ms: float) -> tuple[str, ...]:
    if factor < _BUSY_FACTOR or wall_ms < _BUSY_MS:
        return ()
    return (
        f"a whole run took {factor:.1f} times what its nodes took undisturbed, so other programs "
        "keep the processor busy and predictions are rough; measure again when it is idle",
    )


def _fitted(profiles: Sequence[Profile], expected: float) -> tuple[float, float]:
    """Return the overhead of a node, in milliseconds, and the factor on what is left of its time."""

    def misses(numbers: NDArray[np.float64]) -> list[float]:
        factor, overhead = numbers
        return [factor * each.total(overhead * expected) / each.wall_ms - 1 for each in profiles]

    factor = statistics.median(each.wall_ms / each.total(expected) for each in profiles)
    if len(profiles) < _LEAST_FITTED or expected == 0:
        return expected, factor
    bounds = ((0.0, _LEAST_OVERHEAD), (np.inf, _MOST_OVERHEAD))
    fit = least_squares(misses, (factor, 1.0), bounds=bounds, loss="cauchy", f_scale=0.05)
    return float(fit.x[1]) * expected, float(fit.x[0])


def _rounds(subject: Subject, shelf: Shelf) -> list[dict[str, Form]]:
    """Share out the forms that are still to be measured: for each session, the form of each layer.

    The first has none: it is the original. Layers that are alike divide their forms among them.
    """
    rounds: list[dict[str, Form]] = [{}]
    for group in shelf.alike(subject.layers):
        forms = dict.fromkeys(form for layer in group for form in subject.wanted[layer.name])
        missing = [form for form in forms if form != KEEP and shelf.known(group[0], form) is None]
        for index, form in enumerate(missing):
            number = 1 + index // len(group)
            if number == len(rounds):
                rounds.append({})
            rounds[number][group[index % len(group)].name] = form
    return rounds


def _drift(layers: Sequence[Layer], shelf: Shelf) -> float:
    """How much slower kept layers read now than when they were measured first; a median."""
    pairs = [(shelf.seen(layer, KEEP), shelf.known(layer, KEEP)) for layer in layers]
    ratios = [now / before for now, before in pairs if now and before]
    return statistics.median(ratios) if ratios else 1.0
