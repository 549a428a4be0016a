"""Milliseconds of one model by the forms of its layers: read off between those that were measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from converter.planner.milliseconds.forms import Measured, Point
from converter.planner.milliseconds.shelf import Shelf
from converter.schemes.form import KEEP, Form
from passes.layers import Layer

__all__ = ["Curve", "LatencyModel", "curves"]

Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Milliseconds of one model by the forms of its layers, as a user would measure them.

    Attributes
    ----------
    rest_ms : float
        What is no layer's: poolings, concatenations, what cannot be converted, the call itself.
    curves : mapping of str to mapping of str to tuple of ndarray
        By layer and family: multiply-accumulates, ascending, and milliseconds, both float64 of
        shape (k,). A layer whose time onnxruntime does not show has none.
    notes : tuple of str
        What could not be measured.
    """

    rest_ms: float
    curves: Mapping[str, Mapping[str, Curve]]
    notes: tuple[str, ...]

    @property
    def original_ms(self) -> float:
        """Milliseconds of the model with every layer as it is."""
        return self.rest_ms + sum(float(each[KEEP.family][1][0]) for each in self.curves.values())

    def layer_ms(self, layer: str, form: Form, macs: float) -> float | None:
        """Milliseconds that a layer takes in one form.

        Linear in the multiply-accumulates between the measured forms of the same family, and
        beyond them as between the last two, but never below 0.

        Parameters
        ----------
        layer : str
            Name of the layer.
        form : Form
        macs : float
            Of the layer in this form, for one sample.

        Returns
        -------
        float or None
            None where no form of the family was measured in this layer: what is not known to be
            faster is best not chosen.
        """
        curve = self.curves.get(layer, {}).get(form.family)
        return None if curve is None else _read_off(*curve, macs)


def curves(
    layers: Sequence[Layer],
    points: Mapping[str, Sequence[Point]],
    shelf: Shelf,
    measured: Measured,
) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """Put the measured forms of each layer in order, and say what is missing."""
    found: dict[str, dict[str, Curve]] = {}
    notes = []

    def milliseconds(layer: Layer, form: Form) -> float | None:
        seen, known = shelf.seen(layer, form), shelf.known(layer, form)
        if seen is not None:
            return seen * measured.factor
        return None if known is None else known * measured.factor * measured.drift

    for layer in layers:
        kept = milliseconds(layer, KEEP)
        if kept is None:
            notes.append(
                f"onnxruntime does not show the time of {layer.name}, so it stays as it is"
            )
            continue
        families: dict[str, list[tuple[float, float]]] = {KEEP.family: [(0.0, kept)]}
        for form, macs in points.get(layer.name, ()):
            taken = milliseconds(layer, form)
            if taken is None:
                notes.append(f"onnxruntime does not show the time of {layer.name} as {form}")
            elif form != KEEP:
                families.setdefault(form.family, []).append((macs, taken))
        found[layer.name] = {name: _curve(each) for name, each in families.items()}
    return found, notes


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Order points by their multiply-accumulates; those with the same count are averaged."""
    by_macs: dict[float, list[float]] = defaultdict(list)
    for macs, taken in points:
        by_macs[macs].append(taken)
    ordered = sorted(by_macs)
    return np.array(ordered), np.array([statistics.fmean(by_macs[macs]) for macs in ordered])


def _read_off(macs: NDArray[np.float64], taken: NDArray[np.float64], at: float) -> float:
    if len(macs) == 1 or macs[0] <= at <= macs[-1]:
        return float(np.interp(at, macs, taken))
    end, inner = (0, 1) if at < macs[0] else (-1, -2)
    slope = (taken[end] - taken[inner]) / (macs[end] - macs[inner])
    # never cheaper for more work: two noisy points would else point the wrong way
    return max(float(taken[end] + max(slope, 0.0) * (at - macs[end])), 0.0)
