"""Which round is kept, and after which none is worth it any more."""

from __future__ import annotations

import math

from converter.solver.best import GAIN, Best


def test_the_best_is_kept_and_a_round_that_gains_little_is_the_last() -> None:
    best = Best[str]()
    assert best.take(1.0, "first")
    assert best.take(0.5, "better")
    assert not best.take(0.5 * (1 - GAIN / 2), "hardly better")
    assert (best.made, best.error) == ("hardly better", 0.5 * (1 - GAIN / 2))
    assert not best.take(0.7, "worse")
    assert best.made == "hardly better"


def test_a_first_round_is_kept_whatever_it_is() -> None:
    best = Best[str]()
    best.take(math.nan, "no number")
    assert best.made == "no number"
    assert best.error != best.error
