"""Fits of chosen forms: what they report holds in the graph, and they keep to their form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from converter.branches import branches_of
from converter.calibration.gather import Inputs
from converter.config import SolverSettings
from converter.errors import SolverError
from converter.fitting import problem_of
from converter.schemes import Form, cost_of
from converter.solver.problem import METRIC_FLOOR
from tests.converter.recorded_layer import (
    FORMS,
    IMAGES,
    ROWS,
    Recorded,
    answers,
    fitted,
    replaced,
    rows_of,
)


@FORMS
def test_what_a_fit_reports_is_what_its_branches_do(recorded: Recorded, form: Form) -> None:
    solution = fitted(recorded, form)
    branches = branches_of(recorded.geometry, form, solution)
    found = answers(replaced(recorded, branches), recorded.images)
    wanted = answers(recorded.model, recorded.images)
    unseen = np.arange(IMAGES) % 8 == 7
    omega = recorded.metric / np.mean(np.diag(recorded.metric)) + METRIC_FLOOR * np.eye(ROWS)
    missed, spread = rows_of((found - wanted)[unseen]), rows_of(wanted[~unseen])
    spread -= spread.mean(0)
    error = np.einsum("ni,ij,nj->", missed, omega, missed) / len(missed)
    whole = np.einsum("ni,ij,nj->", spread, omega, spread) / len(spread)
    # float32 through all of it
    assert solution.unseen == pytest.approx(error / whole, rel=1e-2)
    assert solution.unseen < 0.9


@FORMS
def test_a_fit_keeps_to_its_form(recorded: Recorded, form: Form) -> None:
    solution = fitted(recorded, form)
    weights = sum(each.numel() for each in (*solution.factors, solution.sparse))
    assert weights <= cost_of(recorded.geometry, form)[1] - ROWS
    if form.scheme in ("spatial", "tucker", "depthwise"):
        assert solution.ranks == form.ranks
        assert len(solution.support) == form.support


def test_channel_keeps_its_rank_where_nothing_is_to_be_traded(recorded: Recorded) -> None:
    solution = fitted(recorded, Form("channel", (4,)))
    assert (solution.ranks, len(solution.support), solution.history) == ((4,), 0, ())
    assert fitted(recorded, Form("channel", (4,)), trade=True).history


@pytest.mark.parametrize("name", ["svd", "data-svd"])
def test_baselines_are_of_low_rank_alone(recorded: Recorded, name: str) -> None:
    solver = SolverSettings(name=name)  # type: ignore[arg-type]  # both are names of solvers
    solution = fitted(recorded, Form("channel", (4,)), solver)
    assert solution.ranks == (4,)
    assert len(solution.support) == 0


def test_a_fit_that_fails_names_the_layer(recorded: Recorded) -> None:
    features = np.full_like(recorded.inputs.features, np.inf)
    bad = dataclasses.replace(recorded, inputs=Inputs(features, None))
    for form in (Form("channel", (4,)), Form("spatial", (4,))):
        with pytest.raises(SolverError, match=r"layer conv: .*not finite"):
            fitted(bad, form)


def test_long_patches_are_looked_at_through_the_layer_itself_unless_whole(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.fitting.FULL_PATCH_LIMIT", 64)
    arguments = (recorded.layer, recorded.sample, recorded.inputs, recorded.metric, "cpu")
    few, whole = problem_of(*arguments), problem_of(*arguments, whole=True)
    assert few.basis is few.weight
    assert len(few.eligible) == 0
    assert few.features.shape == (len(recorded.inputs.features), ROWS)
    assert whole.basis is None
    assert whole.features.shape == recorded.inputs.features.shape
    for form in (Form("channel", (4,)), Form("spatial", (4,))):
        assert fitted(recorded, form).unseen < 0.9
    # S is not sought there
    assert fitted(recorded, Form("channel", (4,)), trade=True).history == ()
