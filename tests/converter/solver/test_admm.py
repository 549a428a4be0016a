"""The ADMM on planted layers: what it finds, what it may spend, and whether its log is true."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from converter.errors import SolverError
from converter.solver import admm as module
from converter.solver.admm import Admm
from converter.solver.factorize import Allowance, Structure, data_svd, polish
from converter.solver.problem import Coordinates, Problem
from converter.solver.prox import activate
from converter.solver.solution import Solution
from passes.activation import IDENTITY, Activation

ROWS, CHANNELS, TAPS, PATCHES = 12, 8, 4, 480
WIDTH = CHANNELS * TAPS
DENSE = float(ROWS * WIDTH)
RANK_COST, CHANNEL_COST = float(ROWS + WIDTH), float(ROWS * TAPS)
PLANTED = (1, 6)
PLANTED_RANK = 2
PLANTED_COST = len(PLANTED) * CHANNEL_COST + PLANTED_RANK * RANK_COST
RELU = Activation("relu")
QUICK = Admm(iterations=15, rounds=4)


# ranks and channels for next to nothing: the first λ already costs less than this
AFFORDABLE = Allowance(DENSE, 1e-3 * RANK_COST, 1e-3 * CHANNEL_COST, 8)


def allowed(total: float) -> Allowance:
    return Allowance(total, RANK_COST, CHANNEL_COST, 8)


def patches_of(generator: torch.Generator, count: int, mixing: Tensor) -> Tensor:
    return torch.randn(count, WIDTH, generator=generator) @ mixing


def planted(seed: int = 0, **changes: Any) -> tuple[Problem, Tensor]:
    """S on two channels plus L of rank two, correlated patches; and patches that no fit sees."""
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(ROWS, PLANTED_RANK, generator=generator)
        @ torch.randn(PLANTED_RANK, WIDTH, generator=generator)
        / 2
    )
    for channel in PLANTED:
        taps = slice(channel * TAPS, (channel + 1) * TAPS)
        weight[:, taps] += torch.randn(ROWS, TAPS, generator=generator)
    return posed(weight, generator, **changes)


def dense(seed: int = 0, **changes: Any) -> tuple[Problem, Tensor]:
    """A weight with nothing planted."""
    generator = torch.Generator().manual_seed(seed)
    return posed(torch.randn(ROWS, WIDTH, generator=generator), generator, **changes)


def posed(weight: Tensor, generator: torch.Generator, **changes: Any) -> tuple[Problem, Tensor]:
    mixing = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=generator)
    bias = 0.3 * torch.randn(ROWS, generator=generator)
    patches = patches_of(generator, PATCHES, mixing)
    problem = Problem(
        weight=weight,
        bias=bias,
        channels=CHANNELS,
        features=patches,
        basis=None,
        eligible=torch.arange(CHANNELS),
        target=patches @ weight.T + bias,
        offset=None,
        unseen=torch.arange(PATCHES) % 4 == 3,
        activation=RELU,
    )
    return dataclasses.replace(problem, **changes), patches_of(generator, 600, mixing)


def fresh_error(problem: Problem, solution: Solution, patches: Tensor) -> float:
    """Relative error after the activation on `patches`, from the weights as they are deployed."""
    wanted = activate(problem.activation, patches @ problem.weight.T + problem.bias)
    answered = activate(
        problem.activation, patches @ solution.weight(problem.channels).T + solution.bias
    )
    return float((answered - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def cost(solution: Solution) -> float:
    return solution.rank * RANK_COST + len(solution.support) * CHANNEL_COST


def assert_log_is_true(solution: Solution) -> None:
    assert solution.history
    last = solution.history[-1]
    assert (solution.status == "converged") == (last.primal <= 1 and last.dual <= 1)
    assert [line.iteration for line in solution.history] == list(range(len(solution.history)))
    for line in solution.history:
        assert all(map(math.isfinite, (line.primal, line.dual, line.objective, line.rho)))
        assert line.primal >= 0
        assert line.dual >= 0
        assert 0 <= line.rank <= ROWS
        assert 0 <= line.support <= CHANNELS
    seconds = [line.seconds for line in solution.history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_structure_is_found(seed: int) -> None:
    problem, fresh = planted(seed)
    solution = Admm().solve(problem, allowed(PLANTED_COST))
    assert solution.support.tolist() == list(PLANTED)
    assert solution.rank == PLANTED_RANK
    # exact but for the rounds of polish; L alone of this cost misses an order of magnitude more
    assert solution.unseen < 0.02
    alone = data_svd(problem, int(PLANTED_COST // RANK_COST))
    assert solution.unseen < 0.25 * alone.unseen
    assert fresh_error(problem, solution, fresh) < 0.25 * fresh_error(problem, alone, fresh)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("build", [planted, dense])
def test_it_is_never_above_data_svd_of_the_same_cost(build: Any, share: float) -> None:
    problem, _ = build(3)
    allowance = allowed(share * DENSE)
    solution = QUICK.solve(problem, allowance)
    alone = data_svd(problem, allowance.rank_beside(0, ROWS))
    assert cost(solution) <= allowance.total * (1 + 1e-9)
    assert solution.unseen <= alone.unseen * (1 + 1e-6)


@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("build", [planted, dense])
def test_patches_that_neither_saw_agree(build: Any, seed: int, share: float) -> None:
    problem, fresh = build(seed)
    allowance = allowed(share * DENSE)
    solution = QUICK.solve(problem, allowance)
    rank = allowance.rank_beside(0, ROWS)
    alone = data_svd(problem, rank)
    # the choice is made on 120 unseen patches: on others it may lose what their sampling noise is
    limit = fresh_error(problem, alone, fresh) * 1.02
    assert fresh_error(problem, solution, fresh) <= limit


def test_where_no_patch_is_kept_back_structures_are_told_apart_on_those_of_the_fit() -> None:
    problem, patches = planted(unseen=torch.zeros(PATCHES, dtype=torch.bool))
    allowance = allowed(PLANTED_RANK * RANK_COST + len(PLANTED) * CHANNEL_COST)
    solution = Admm().solve(problem, allowance)
    assert solution.support.tolist() == list(PLANTED)
    assert fresh_error(problem, solution, patches) < 0.01


def test_a_budget_for_a_channel_but_no_rank_gives_s_alone() -> None:
    problem, _ = planted()
    allowance = Allowance(CHANNEL_COST, 10 * RANK_COST, CHANNEL_COST, 8)
    solution = QUICK.solve(problem, allowance)
    assert solution.rank == 0
    assert len(solution.support) == 1
    assert int(solution.support) in PLANTED


def test_a_channel_is_kept_where_the_path_has_removed_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, _ = planted()
    loud = 3
    problem.weight[:, loud * TAPS : (loud + 1) * TAPS] *= 20
    monkeypatch.setattr(module, "PATH_START", 1e9)
    solution = QUICK.solve(problem, Allowance(CHANNEL_COST, 10 * RANK_COST, CHANNEL_COST, 8))
    assert (solution.rank, solution.support.tolist()) == (0, [loud])
    settled = QUICK.solve(problem, allowed(DENSE), sizes=(1, 3))
    assert len(settled.support) == 3
    assert loud in settled.support

    eligible = torch.tensor([0, loud, 6])  # features in a basis, of some channels only
    columns = (eligible[:, None] * TAPS + torch.arange(TAPS)).flatten()
    basis = torch.cat([problem.weight, torch.eye(WIDTH)[columns]])
    seen = problem.features @ basis.T
    some = dataclasses.replace(problem, basis=basis, eligible=eligible, features=seen)
    alone = QUICK.solve(some, Allowance(CHANNEL_COST, 10 * RANK_COST, CHANNEL_COST, 8))
    assert (alone.rank, alone.support.tolist()) == (0, [loud])


def test_a_budget_for_a_rank_but_no_channel_gives_l_alone() -> None:
    problem, _ = planted()
    solution = QUICK.solve(problem, Allowance(RANK_COST, RANK_COST, 10 * RANK_COST, 8))
    assert solution.rank == 1
    assert len(solution.support) == 0


def test_no_channel_is_kept_that_is_not_eligible() -> None:
    full, _ = planted()
    eligible = torch.tensor([0, 2, 6])
    columns = (eligible[:, None] * TAPS + torch.arange(TAPS)).flatten()
    basis = torch.cat([full.weight, torch.eye(WIDTH)[columns]])
    problem = dataclasses.replace(
        full, basis=basis, eligible=eligible, features=full.features @ basis.T
    )
    solution = QUICK.solve(problem, allowed(PLANTED_COST))
    assert set(solution.support.tolist()) <= {0, 2, 6}
    assert solution.down.shape == (solution.rank, WIDTH)
    alone = data_svd(problem, int(PLANTED_COST // RANK_COST))
    assert solution.unseen <= alone.unseen * (1 + 1e-6)


def test_without_eligible_channels_it_is_l_alone() -> None:
    full, _ = planted()
    problem = dataclasses.replace(
        full,
        basis=full.weight,
        eligible=torch.arange(0),
        features=full.features @ full.weight.T,
    )
    solution = QUICK.solve(problem, allowed(PLANTED_COST))
    assert len(solution.support) == 0
    assert solution.rank == int(PLANTED_COST // RANK_COST)


def test_the_shortcut_is_part_of_the_problem() -> None:
    plain, _ = planted()
    generator = torch.Generator().manual_seed(4)
    offset = torch.randn(PATCHES, ROWS, generator=generator)
    problem = dataclasses.replace(plain, target=plain.target + offset, offset=offset)
    solution = Admm().solve(problem, allowed(PLANTED_COST))
    assert solution.support.tolist() == list(PLANTED)
    assert solution.unseen < 0.02


def test_the_metric_decides_which_channels_count() -> None:
    """Two channels feed disjoint outputs; the metric says which outputs the network heeds."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.zeros(ROWS, WIDTH)
    weight[:6, :TAPS] = torch.randn(6, TAPS, generator=generator)
    weight[6:, -TAPS:] = torch.randn(6, TAPS, generator=generator)
    base, _ = posed(weight, generator)
    allowance = Allowance(CHANNEL_COST, 10 * RANK_COST, CHANNEL_COST, 8)
    for heeded, channel in ((slice(0, 6), 0), (slice(6, 12), CHANNELS - 1)):
        diagonal = torch.full((ROWS,), 1e-3, dtype=torch.float64)
        diagonal[heeded] = 1.0
        problem = dataclasses.replace(base, metric=torch.diag(diagonal))
        assert QUICK.solve(problem, allowance).support.tolist() == [channel]


# The log


@pytest.mark.parametrize(
    "settings",
    [QUICK, Admm(iterations=1), Admm(iterations=60), Admm(eps_abs=10.0), Admm(work=1.0)],
    ids=["quick", "one iteration", "many", "loose", "no work"],
)
@pytest.mark.parametrize("activation", [RELU, IDENTITY, Activation("silu")], ids=str)
def test_the_log_is_true(settings: Admm, activation: Activation) -> None:
    problem, _ = planted(1, activation=activation)
    assert_log_is_true(settings.solve(problem, allowed(DENSE / 4)))


def test_loose_tolerances_are_met_at_once() -> None:
    problem, _ = planted()
    solution = dataclasses.replace(QUICK, eps_abs=1e3).solve(problem, AFFORDABLE)
    assert solution.status == "converged"
    assert len(solution.history) == 1


@pytest.mark.parametrize("metric", [False, True], ids=["identity", "metric"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_convex_problem_converges(seed: int, metric: bool) -> None:
    omega = None
    if metric:
        factor = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(seed))
        omega = (factor @ factor.T).double()
    problem, _ = planted(seed, activation=IDENTITY, metric=omega)
    solution = Admm(iterations=400, work=1e15, rounds=0).solve(problem, AFFORDABLE)
    assert solution.status == "converged"
    assert len(solution.history) <= 400
    last = solution.history[-1]
    assert last.primal <= 1
    assert last.dual <= 1
    assert_log_is_true(solution)


def test_a_convex_problem_that_converged_is_at_its_minimum() -> None:
    problem, _ = planted(activation=IDENTITY)
    close = Admm(iterations=2000, work=1e15, rounds=0, eps_abs=3e-4, eps_rel=3e-3)
    closer = dataclasses.replace(close, eps_abs=1e-4, eps_rel=1e-3)
    near, far = (one.solve(problem, AFFORDABLE) for one in (close, closer))
    assert near.status == far.status == "converged"
    last = far.history[-1]
    assert (last.support, last.rank) == (len(PLANTED), PLANTED_RANK)
    assert near.history[-1].objective == pytest.approx(last.objective, rel=0.02)


def test_work_bounds_the_iterations() -> None:
    problem, _ = planted()
    allowance = allowed(DENSE / 8)
    little = Admm(work=1.0).solve(problem, allowance)
    much = Admm(iterations=25).solve(problem, allowance)
    assert len(little.history) <= 12
    assert len(little.history) < len(much.history)
    assert len(much.history) <= 150


# Determinism and refusals


def test_two_runs_are_equal() -> None:
    problem, _ = planted(2)
    torch.manual_seed(1)
    first = QUICK.solve(problem, allowed(DENSE / 3))
    torch.manual_seed(2)
    second = QUICK.solve(problem, allowed(DENSE / 3))
    for name in ("support", "sparse", "down", "up", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert (first.unseen, first.fitted, first.status) == (
        second.unseen,
        second.fitted,
        second.status,
    )
    logs = [
        [dataclasses.replace(line, seconds=0.0) for line in one.history] for one in (first, second)
    ]
    assert logs[0] == logs[1]


def test_the_problem_is_left_as_it_was() -> None:
    problem, _ = planted()
    names = ("weight", "bias", "features", "target", "unseen", "eligible")
    before = {name: getattr(problem, name).clone() for name in names}
    QUICK.solve(problem, allowed(PLANTED_COST))
    assert all(torch.equal(getattr(problem, name), value) for name, value in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["features", "target"])
def test_activations_that_are_not_finite_are_refused(field: str, value: float) -> None:
    problem, _ = planted()
    spoiled = getattr(problem, field).clone()
    spoiled[4, 3] = value
    with pytest.raises(SolverError, match="not finite"):
        QUICK.solve(dataclasses.replace(problem, **{field: spoiled}), allowed(PLANTED_COST))


def test_what_it_gives_is_the_polish_of_its_structure() -> None:
    problem, _ = planted()
    solution = QUICK.solve(problem, allowed(PLANTED_COST))
    structure = Structure(tuple(solution.support.tolist()), solution.rank)
    again = polish(Coordinates(problem), structure, QUICK.rounds)
    assert solution.unseen == again.unseen
    assert torch.equal(solution.weight(CHANNELS), again.weight(CHANNELS))


def test_settled_sizes_leave_only_the_choice_of_channels() -> None:
    problem, _ = planted()
    sizes = (PLANTED_RANK + 1, len(PLANTED))
    solution = QUICK.solve(problem, allowed(PLANTED_COST + RANK_COST), sizes)
    assert (solution.rank, solution.support.tolist()) == (PLANTED_RANK + 1, list(PLANTED))
