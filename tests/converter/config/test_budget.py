"""A budget that reduces nothing is refused."""

from __future__ import annotations

import math
import re

import pytest

from converter.config import Budget
from converter.errors import ConfigError


@pytest.mark.parametrize(
    ("budget", "timed"),
    [
        (Budget(2), False),
        (Budget(params=1.01), False),
        (Budget(2, 3), False),
        (Budget(speedup=2), True),
        (Budget(latency_ms=0.25), True),
        (Budget(macs=2, speedup=2), True),
        (Budget(2, 3, latency_ms=4.5), True),
    ],
)
def test_budgets_that_make_sense(budget: Budget, timed: bool) -> None:
    assert budget.timed is timed


def test_the_order_of_a_budget() -> None:
    assert Budget(2, 3) == Budget(macs=2, params=3)


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["macs", "params", "speedup"])
def test_factors_that_reduce_nothing(name: str, factor: float) -> None:
    with pytest.raises(ConfigError, match=f"the {name} budget {re.escape(str(factor))} is not"):
        Budget(**{name: factor})


@pytest.mark.parametrize("latency", [0.0, -1.0, math.nan, math.inf])
def test_latencies_that_are_none(latency: float) -> None:
    with pytest.raises(ConfigError, match="is not a number of milliseconds above 0"):
        Budget(latency_ms=latency)


def test_no_budget() -> None:
    with pytest.raises(ConfigError, match="no budget was given; say --speedup 2"):
        Budget()


def test_time_is_bounded_once() -> None:
    with pytest.raises(ConfigError, match="both --speedup and --latency-ms were given"):
        Budget(speedup=2, latency_ms=3)
