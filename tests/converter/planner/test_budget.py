"""The share of each layer: predicted effects, and the choice against brute force."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.config import Budget
from converter.errors import ConfigError
from converter.planner.budget import Candidates, choose, effects_of_rank

Plan = Mapping[str, int | None]


def layer(
    name: str, effects: Sequence[float], *, size: int = 8, positions: int = 1, step: int = 2
) -> Candidates:
    """Make a size×size layer whose ranks 1 … len(effects) have these effects."""
    ranks = np.arange(1, len(effects) + 1, dtype=np.int64)
    params = ranks * float(step * size)
    return Candidates(
        name=name,
        ranks=ranks,
        effects=np.array(effects, dtype=np.float64),
        macs=params * positions,
        params=params,
        macs_kept=float(size * size * positions),
        params_kept=float(size * size),
    )


def cost(layers: Sequence[Candidates], plan: Plan, unit: str) -> float:
    """Cost of a plan for the layers alone."""
    total = 0.0
    for each in layers:
        rank = plan[each.name]
        kept = each.macs_kept if unit == "macs" else each.params_kept
        costs = each.macs if unit == "macs" else each.params
        total += kept if rank is None else float(costs[list(each.ranks).index(rank)])
    return total


def effect(layers: Sequence[Candidates], plan: Plan) -> float:
    total = 0.0
    for each in layers:
        rank = plan[each.name]
        total += 0.0 if rank is None else float(each.effects[list(each.ranks).index(rank)])
    return total


def plans(layers: Sequence[Candidates]) -> list[dict[str, int | None]]:
    options = [[None, *map(int, each.ranks)] for each in layers]
    names = [each.name for each in layers]
    return [dict(zip(names, ranks, strict=True)) for ranks in itertools.product(*options)]


def lagrangian_optimum(layers: Sequence[Candidates], limit: float) -> dict[str, int | None]:
    """Best plan within the limit among those that are optimal at some price: the lower hull."""
    points = sorted((cost(layers, plan, "macs"), effect(layers, plan), k, plan)
                    for k, plan in enumerate(plans(layers)))  # fmt: skip
    hull: list[tuple[float, float, dict[str, int | None]]] = []
    for x, y, _, plan in points:
        if hull and y >= hull[-1][1]:
            continue  # dearer and no better
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y, plan))
    return [plan for x, _, plan in hull if x <= limit][-1]


def falling(rng: np.random.Generator, count: int, scale: float = 1.0) -> list[float]:
    """Effects as eigenvalues leave them: falling and convex in the rank."""
    values = np.sort(rng.exponential(size=count + 1))[::-1] * scale
    return list(np.cumsum(values[::-1])[::-1][1:])


def uneven(seed: int = 0, count: int = 4) -> list[Candidates]:
    rng = np.random.default_rng(seed)
    return [
        layer(f"l{k}", falling(rng, 3, 10.0**-k), positions=int(rng.integers(1, 30)))
        for k in range(count)
    ]


# ---- effects_of_rank


def test_effects_are_those_of_the_best_projection() -> None:
    rng = np.random.default_rng(3)
    half, other = rng.normal(size=(5, 9)), rng.normal(size=(5, 5))
    covariance, metric = half @ half.T / 9, other @ other.T
    effects = effects_of_rank(covariance, metric)
    assert effects.shape == (6,)
    assert effects[0] == pytest.approx(np.trace(metric @ covariance))
    assert effects[-1] == 0
    assert (np.diff(effects) <= 0).all()
    # brute force: the data in the metric's own coordinates, cut by an SVD
    root = np.linalg.cholesky(metric)
    values = np.linalg.svd(root.T @ half / 3, compute_uv=False)
    wanted = [float((values[rank:] ** 2).sum()) for rank in range(6)]
    np.testing.assert_allclose(effects, wanted, rtol=1e-9, atol=1e-12)


def test_no_projection_of_the_rank_leaves_less() -> None:
    rng = np.random.default_rng(4)
    half, other = rng.normal(size=(4, 7)), rng.normal(size=(4, 4))
    covariance, metric = half @ half.T / 7, other @ other.T
    effects = effects_of_rank(covariance, metric)
    for rank in range(1, 4):
        for _ in range(200):
            basis = rng.normal(size=(4, rank))
            # the best fit within this column space, in the metric
            inside = basis @ np.linalg.solve(basis.T @ metric @ basis, basis.T @ metric)
            rest = np.eye(4) - inside
            left = np.trace(metric @ rest @ covariance @ rest.T)
            assert left >= effects[rank] * (1 - 1e-9)


def test_a_metric_without_some_directions_forgives_them() -> None:
    metric = np.diag([1.0, 1.0, 0.0])
    effects = effects_of_rank(np.diag([4.0, 1.0, 100.0]), metric)
    np.testing.assert_allclose(effects, [5, 1, 0, 0], atol=1e-12)


def test_round_off_below_zero_is_no_effect() -> None:
    metric = np.diag([1.0, -1e-17])
    effects = effects_of_rank(np.diag([1.0, -1e-17]), metric)
    np.testing.assert_allclose(effects, [1, 0, 0], atol=1e-15)


# ---- choose


@pytest.mark.parametrize("factor", [1.05, 1.5, 2.0, 2.6])
def test_the_macs_budget_is_met(factor: float) -> None:
    layers = uneven()
    fixed = 7.0  # what cannot be converted
    before = fixed + sum(each.macs_kept for each in layers)
    plan = choose(layers, Budget(macs=factor), before, 1000.0)
    assert list(plan) == [each.name for each in layers]
    assert fixed + cost(layers, plan, "macs") <= before / factor * (1 + 1e-6)


@pytest.mark.parametrize("factor", [1.2, 2.0, 3.0])
def test_the_params_budget_is_met(factor: float) -> None:
    layers = uneven(1)
    before = sum(each.params_kept for each in layers)
    plan = choose(layers, Budget(params=factor), 1e6, before)
    assert cost(layers, plan, "params") <= before / factor * (1 + 1e-6)


@pytest.mark.parametrize(("macs", "params"), [(1.5, 1.5), (1.1, 3.0), (3.0, 1.1), (2.5, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_both_budgets_are_met(macs: float, params: float, seed: int) -> None:
    layers = uneven(seed)
    before = {
        "macs": sum(each.macs_kept for each in layers),
        "params": sum(each.params_kept for each in layers),
    }
    plan = choose(layers, Budget(macs=macs, params=params), before["macs"], before["params"])
    assert cost(layers, plan, "macs") <= before["macs"] / macs * (1 + 1e-6)
    assert cost(layers, plan, "params") <= before["params"] / params * (1 + 1e-6)


def test_a_second_budget_that_does_not_bind_changes_nothing() -> None:
    layers = uneven(2)
    macs = sum(each.macs_kept for each in layers)
    params = sum(each.params_kept for each in layers)
    alone = choose(layers, Budget(macs=2), macs, params)
    assert choose(layers, Budget(macs=2, params=1.0001), macs, params) == alone


def test_shares_are_uneven_where_the_layers_are() -> None:
    frail = layer("frail", [8.0, 4.0, 2.0])
    sturdy = layer("sturdy", [0.03, 0.02, 0.01])
    plan = choose([frail, sturdy], Budget(macs=1.5), 128, 128)
    assert plan["frail"] is None  # all of the cut falls on the other
    assert plan["sturdy"] == 1
    # as frail, but at a price that is many times as high
    dear = layer("dear", [8.0, 4.0, 2.0], positions=100)
    frail_and_dear = choose([frail, dear], Budget(macs=2), 6464, 128)
    assert frail_and_dear["frail"] is None
    assert frail_and_dear["dear"] is not None


def test_equal_layers_get_equal_ranks() -> None:
    layers = [layer(f"l{k}", [3.0, 1.0, 0.2]) for k in range(3)]
    plan = choose(layers, Budget(macs=2), 192, 192)
    assert len(set(plan.values())) == 1


def test_no_more_is_cut_than_the_budget_asks_for() -> None:
    layers = [layer("a", [4.0, 2.0, 0.9]), layer("b", [5.0, 3.0, 2.0])]
    assert choose(layers, Budget(macs=1.0001), 128, 128) == {"a": 3, "b": None}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(1.01, 3.5))
def test_it_is_the_best_that_one_price_can_give(seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    layers = [
        layer(f"l{k}", falling(rng, 3, 10.0 ** rng.uniform(-2, 1)), positions=int(rng.integers(1, 9)))
        for k in range(3)
    ]  # fmt: skip
    before = sum(each.macs_kept for each in layers)
    plan = choose(layers, Budget(macs=factor), before, before)
    assert plan == lagrangian_optimum(layers, before / factor)
    # and therefore no plan of the same cost or less has less effect
    spent, left = cost(layers, plan, "macs"), effect(layers, plan)
    assert all(
        effect(layers, other) >= left - 1e-12
        for other in plans(layers)
        if cost(layers, other, "macs") <= spent
    )


def test_a_budget_out_of_reach_says_what_can_be_reached() -> None:
    layers = [layer("a", [1.0, 0.5]), layer("b", [1.0, 0.5])]  # from 64 to 16 at least
    with pytest.raises(ConfigError, match=r"--macs 5 is out of reach .* it is 4; ask for less"):
        choose(layers, Budget(macs=5), 128, 128)
    with pytest.raises(ConfigError, match="--params 9 is out of reach"):
        choose(layers, Budget(macs=2, params=9), 128, 128)


@pytest.mark.parametrize("fixed", [0.0, 3.0, 17.0, 100.0])
def test_what_is_said_to_be_reached_is(fixed: float) -> None:
    layers = uneven(5)
    before = fixed + sum(each.macs_kept for each in layers)
    with pytest.raises(ConfigError) as refused:
        choose(layers, Budget(macs=1000), before, before)
    found = re.search(r"it is ([\d.]+);", str(refused.value))
    assert found
    plan = choose(layers, Budget(macs=float(found[1])), before, before)
    assert all(rank == 1 for rank in plan.values())


def test_a_layer_without_candidates_is_kept() -> None:
    none = layer("none", [])
    plan = choose([none, layer("some", [1.0, 0.5, 0.1])], Budget(macs=1.2), 128, 128)
    assert plan["none"] is None
    assert plan["some"] is not None
    with pytest.raises(ConfigError, match="out of reach"):
        choose([none], Budget(macs=1.5), 64, 64)


def test_a_layer_without_effect_is_cut_first() -> None:
    dead, live = layer("dead", [0.0, 0.0, 0.0]), layer("live", [1.0, 0.5, 0.1])
    plan = choose([dead, live], Budget(macs=1.3), 128, 128)
    assert plan == {"dead": 1, "live": None}
