"""Forms as branches, random or of a solution: their shapes, and that they run in the graph."""

from __future__ import annotations

import numpy as np

from converter.branches import branches_of, branches_of_form
from converter.schemes import Form
from tests.converter.recorded_layer import FORMS, ROWS, Recorded, answers, fitted, replaced


@FORMS
def test_branches_of_a_form_have_its_shapes_and_no_bias(recorded: Recorded, form: Form) -> None:
    branches = branches_of_form(recorded.geometry, form)
    assert branches.ranks == form.ranks
    assert branches.kept == form.support
    assert branches.bias is not None
    assert not branches.bias.any()
    assert np.isfinite(answers(replaced(recorded, branches), recorded.images)).all()
    again = branches_of_form(recorded.geometry, form)
    for one, other in zip(branches.factors, again.factors, strict=True):
        assert np.array_equal(one.weight, other.weight)


def test_a_solution_without_l_is_one_branch(recorded: Recorded) -> None:
    solution = fitted(recorded, Form("sparse", (), 4))
    branches = branches_of(recorded.geometry, Form("sparse", (), 4), solution)
    assert branches.factors == ()
    assert branches.kept == 4
    assert branches.sparse is not None
    assert branches.sparse.shape == (ROWS, 4, 3, 3)
