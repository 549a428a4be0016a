"""The choice against brute force, at its limits, and on networks of the size it is made for."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import ConfigError, SolverError
from converter.planner import choice as under_test
from converter.planner.choice import Choice, Limit, Unit, choose, frontier
from converter.schemes.form import KEEP, Candidate, Form

Layers = dict[str, list[Candidate]]
UNITS: tuple[Unit, ...] = ("macs", "params", "ms")


def candidate(
    rank: int, effect: float, macs: float, params: float = 1.0, ms: float | None = None
) -> Candidate:
    return Candidate(Form("channel", (rank,)) if rank else KEEP, effect, macs, params, ms)


def cost(one: Candidate, unit: Unit) -> float:
    value = {"macs": one.macs, "params": one.params, "ms": one.ms}[unit]
    assert value is not None
    return value


def network(
    seed: int, layers: int, count: int, lowest: float = 1e-3, spread: float = 1.5
) -> Layers:
    """Effects that decay exponentially with cost, at rates and magnitudes of their own."""
    random = np.random.default_rng(seed)
    made: Layers = {}
    for index in range(layers):
        macs, params = np.exp(random.normal((16, 11), spread))
        pace = 1e-8 * np.exp(random.normal(0, 0.4))
        size = 10 ** random.uniform(math.log10(lowest), 0)
        rate = random.uniform(4, 18)
        found = [candidate(0, 0.0, macs, params, macs * pace + 0.002)]
        for rank in range(1, count):
            share = 0.05 + 0.9 * rank / count
            noise = np.exp(random.normal(0, 0.05, 3))
            found.append(
                candidate(
                    rank,
                    size * math.exp(-rate * share) * noise[0],
                    macs * share,
                    params * share * noise[1],
                    macs * share * pace * noise[2] + 0.004,
                )
            )
        made[f"layer{index}"] = found
    return made


def limit(layers: Layers, unit: Unit, factor: float) -> Limit:
    before = math.fsum(cost(found[0], unit) for found in layers.values())
    return Limit(unit, before / factor, before, f"--{unit} {factor:g}")


def brute_force(layers: Layers, limits: list[Limit]) -> float | None:
    within = [
        math.fsum(c.effect for c in picked)
        for picked in itertools.product(*layers.values())
        if all(math.fsum(cost(c, each.unit) for c in picked) <= each.most for each in limits)
    ]
    return min(within, default=None)


def check(layers: Layers, limits: list[Limit], made: Choice) -> None:
    assert list(made.chosen) == list(layers)
    assert all(made.chosen[name] in found for name, found in layers.items())
    for each in limits:  # to the last bit: a budget that is met but for a hair is not met
        total = math.fsum(cost(c, each.unit) for c in made.chosen.values())
        assert total == made.totals[each.unit] <= each.most
    assert made.effect == math.fsum(c.effect for c in made.chosen.values())


# effects from 1e-8 to 1, and small whole costs that make ties and sums that hit a limit exactly
candidates = st.builds(
    candidate,
    st.integers(0, 9),
    st.one_of(st.just(0.0), st.floats(-8, 0).map(lambda power: 10.0**power)),
    st.integers(1, 12).map(float),
    st.one_of(st.integers(1, 12).map(float), st.floats(1e-3, 1e3)),
    st.floats(1e-3, 10),
)
problems = st.lists(st.lists(candidates, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(problems, st.data())
def test_against_brute_force(found: list[list[Candidate]], data: st.DataObject) -> None:
    layers = {f"layer{index}": each for index, each in enumerate(found)}
    limits = []
    for unit in data.draw(st.sets(st.sampled_from(UNITS), min_size=1).map(sorted)):
        least, most = (
            math.fsum(end(cost(c, unit) for c in each) for each in found) for end in (min, max)
        )
        # the ends themselves too: a limit that the cheapest choice just meets must be met
        share = data.draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-0.1, 1.0)))
        limits.append(
            Limit(unit, least if share == 0 else least + share * (most - least), most, unit)
        )
    expected = brute_force(layers, limits)
    if expected is None:
        with pytest.raises(ConfigError, match="out of reach"):
            choose(layers, limits)
        return
    made = choose(layers, limits)
    check(layers, limits, made)
    # HiGHS' absolute gap of 1e-6 is 1e-10 of the spread of effects, which is at most 1
    assert made.effect == pytest.approx(expected, rel=1e-9, abs=2e-10)
    assert made.proven or made.effect < 1e-3


@pytest.mark.parametrize("first_core", [under_test._FIRST_CORE, 1])
@pytest.mark.parametrize("seed", range(6))
def test_against_dynamic_programming(
    seed: int, first_core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole costs that can be tabulated; a first core too small for the optimum must grow."""
    monkeypatch.setattr(under_test, "_FIRST_CORE", first_core)
    random = np.random.default_rng(seed)
    layers: Layers = {}
    for index in range(40):
        size, rate = 10 ** random.uniform(-4, 0), random.uniform(1, 8)
        keep = int(random.integers(20, 120))
        costs = random.choice(np.arange(1, keep), 15, replace=False)
        layers[f"layer{index}"] = [
            candidate(
                rank,
                size * math.exp(-rate * each / keep) * random.uniform(0.7, 1.4),
                float(each),
            )
            for rank, each in enumerate(costs, start=1)
        ] + [candidate(0, 0.0, float(keep))]
    within = limit(layers, "macs", 2.5)
    room = math.floor(within.most)
    least = np.zeros(room + 1)  # by what the layers so far may cost
    for found in layers.values():
        following = np.full(room + 1, np.inf)
        for c in found:
            spent = int(c.macs)
            following[spent:] = np.minimum(following[spent:], least[: room + 1 - spent] + c.effect)
        least = following
    made = choose(layers, [within])
    check(layers, [within], made)
    assert made.effect == pytest.approx(least[room], rel=1e-9)
    assert made.proven


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
@pytest.mark.parametrize("factors", [(2.0, None), (None, 3.0), (2.0, 3.0)])
def test_scales_of_costs_and_effects_do_not_matter(
    scale: float, factors: tuple[float | None, float | None]
) -> None:
    layers = network(5, layers=5, count=6, lowest=1e-8)
    grown = {
        name: [
            Candidate(c.form, c.effect * 1e-5, c.macs * scale, c.params / scale, c.ms)
            for c in found
        ]
        for name, found in layers.items()
    }
    units: tuple[Unit, Unit] = ("macs", "params")
    limits = [
        limit(grown, unit, factor)
        for unit, factor in zip(units, factors, strict=True)
        if factor is not None
    ]
    made = choose(grown, limits)
    check(grown, limits, made)
    assert made.effect == pytest.approx(brute_force(grown, limits), rel=1e-9)
    assert made.proven


def test_without_a_limit_every_layer_has_its_least_effect() -> None:
    layers = network(0, 4, 6)
    made = choose(layers, [])
    assert {c.form for c in made.chosen.values()} == {KEEP}
    assert (made.effect, made.gap) == (0.0, 0.0)


def test_a_second_limit_that_does_not_bind_changes_nothing() -> None:
    layers = network(1, 20, 10)
    macs = limit(layers, "macs", 2)
    alone = choose(layers, [macs])
    assert choose(layers, [macs, limit(layers, "ms", 1.0001)]).effect == alone.effect
    tighter = limit(layers, "params", 4)
    assert choose(layers, [macs, tighter]).effect > alone.effect


def test_a_candidate_that_is_dominated_is_never_chosen() -> None:
    good = candidate(4, 0.1, 10, 10)
    no_better = [candidate(5, 0.1, 11, 10), candidate(6, 0.2, 10, 10), candidate(7, 0.1, 10, 10)]
    layers = {"a": [*no_better, good, candidate(1, 0.5, 2, 2)]}
    made = choose(layers, [Limit("macs", 11, 20, "--macs 2")])
    assert made.chosen == {"a": good}  # of equals the lower form
    front = under_test._front(layers["a"], lambda c: c.effect, ["macs"])
    assert [c.form.ranks for c in front] == [(4,), (1,)]


def test_the_order_of_candidates_does_not_matter() -> None:
    layers = network(2, 30, 20)
    limits = [limit(layers, "macs", 3), limit(layers, "ms", 2)]
    made = choose(layers, limits)
    assert choose(layers, limits) == made
    assert choose({name: found[::-1] for name, found in layers.items()}, limits) == made


def test_an_answer_over_the_limit_by_less_than_the_tolerance_is_not_taken() -> None:
    # each fits alone, and the two together exceed the limit by 1e-9 of it: HiGHS does not see that
    found = [candidate(3, 0.1, 100 * (1 + 1e-9)), candidate(2, 0.2, 50), candidate(1, 0.9, 1)]
    layers = {"a": found, "b": found}
    limits = [Limit("macs", 200.0, 400.0, "--macs 2")]
    made = choose(layers, limits)
    check(layers, limits, made)
    assert made.effect == pytest.approx(0.3)


def test_the_message_names_the_limit_and_what_can_be_reached() -> None:
    layers = {"a": [candidate(0, 0.0, 60), candidate(1, 0.5, 20)]}
    with pytest.raises(ConfigError) as caught:
        choose(layers, [Limit("macs", 10, 60, "--macs 4", rest=20)])
    # (60 + 20) / (20 + 20)
    assert str(caught.value) == (
        "the budget --macs 4 is out of reach for this model: with every layer at its cheapest it is "
        "2 at best; ask for less"
    )


def test_the_message_says_milliseconds_where_they_were_asked_for() -> None:
    layers = {"a": [candidate(0, 0.0, 1, 1, 6.0), candidate(1, 0.5, 1, 1, 2.3416)]}
    with pytest.raises(ConfigError, match=r"--latency-ms 2 .* it is 3\.35 ms at best") as caught:
        choose(layers, [Limit("ms", 1.0, None, "--latency-ms 2", rest=1.0)])
    assert caught.value.exit_code == 2


def test_two_limits_that_exclude_each_other() -> None:
    layers = {"a": [candidate(1, 0.5, 10, 90), candidate(2, 0.5, 90, 10), KEPT]}
    macs, params = Limit("macs", 50, 100, "--macs 2"), Limit("params", 50, 100, "--params 2")
    for one in (macs, params):
        assert choose(layers, [one]).effect == 0.5
    with pytest.raises(
        ConfigError,
        match=r"--params 2 is out of reach for this model beside --macs 2: there it is 1\.11 at",
    ):
        choose(layers, [macs, params])


KEPT = candidate(0, 0.0, 100, 100)


@pytest.mark.parametrize("seed", range(4))
def test_what_the_message_offers_can_be_had(seed: int) -> None:
    layers = network(seed, 6, 5)
    with pytest.raises(ConfigError) as caught:
        choose(layers, [limit(layers, "macs", 1000)])
    offered = float(str(caught.value).split(" it is ")[1].split(" at best")[0])
    assert choose(layers, [limit(layers, "macs", offered)])


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    layers = {"conv1": [candidate(0, 0.0, 10), candidate(3, math.nan, 5)]}
    with pytest.raises(SolverError, match=r"channel r 3 of conv1 has an effect or a cost"):
        choose(layers, [Limit("macs", 5, 10, "--macs 2")])
    with pytest.raises(ValueError, match="was not measured"):
        choose({"a": [candidate(1, 0.1, 1)]}, [Limit("ms", 5, 10, "--speedup 2")])
    with pytest.raises(ValueError, match="same unit"):
        choose({"a": [candidate(1, 0.1, 1)]}, [Limit("ms", 5, 10, "x"), Limit("ms", 6, 10, "y")])
    with pytest.raises(ValueError, match="no candidate"):
        choose({"a": []}, [])


def test_a_search_that_is_cut_short_says_what_is_left_to_prove(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = network(6, 100, 40, spread=2.0)
    limits = [limit(layers, "macs", 3), limit(layers, "params", 4)]
    best = choose(layers, limits)
    assert best.proven
    monkeypatch.setattr(under_test, "_NODES", 1)
    short = choose(layers, limits)
    check(layers, limits, short)
    assert not short.proven
    assert short.effect * (1 - short.gap) <= best.effect * (1 + 1e-9) <= short.effect * (1 + 2e-9)


@pytest.mark.parametrize(
    "factors", [{"macs": 4.0}, {"ms": 2.0}, {"macs": 3.0, "ms": 2.5}, {"macs": 2.0, "params": 3.0}]
)
def test_a_large_network_takes_seconds(factors: dict[Unit, float]) -> None:
    layers = network(3, 100, 40)
    limits = [limit(layers, unit, factor) for unit, factor in factors.items()]
    start = time.process_time()  # others may share the machine
    made = choose(layers, limits)
    assert time.process_time() - start < 5
    check(layers, limits, made)
    assert made.proven


def test_the_front_falls_from_the_cheapest_to_no_loss() -> None:
    layers = network(4, 8, 8)
    front = frontier(layers, "ms", 9)
    assert 5 <= len(front) <= 9
    spent = [choice.totals["ms"] for choice in front]
    lost = [choice.effect for choice in front]
    assert spent == sorted(set(spent))
    assert lost == sorted(set(lost), reverse=True)
    assert spent[0] == math.fsum(min(cost(c, "ms") for c in found) for found in layers.values())
    assert lost[-1] == 0.0


@settings(max_examples=30, deadline=None)
@given(problems, st.sampled_from(UNITS))
def test_no_point_of_the_front_is_dominated(found: list[list[Candidate]], unit: Unit) -> None:
    layers = {f"layer{index}": each for index, each in enumerate(found)}
    front = frontier(layers, unit, 5)
    assert front
    for choice in front:
        expected = brute_force(layers, [Limit(unit, choice.totals[unit], None, unit)])
        assert choice.effect == pytest.approx(expected, rel=1e-9, abs=2e-10)


def test_one_point_is_no_front() -> None:
    with pytest.raises(ConfigError, match="1 points make no front"):
        frontier(network(0, 2, 3), "macs", 1)


def test_nothing_is_printed() -> None:
    """HiGHS 1.12 prints past its own options and Python's stdout, into a pipe's buffer too."""
    code = (
        "from tests.converter.planner.test_choice import frontier, network\n"
        "print('before', flush=True)\n"
        "frontier(network(0, 60, 30), 'macs', 12)\n"
        "print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["before", "after"]
