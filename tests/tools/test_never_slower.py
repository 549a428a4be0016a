"""What is drawn, and what counts as slower."""

from __future__ import annotations

from itertools import islice

from tools.never_slower import SHARES, Row, draws, page


def row(low: float, high: float) -> Row:
    return Row("ResNet-20", "--macs 2 --batch 1", 3, 1.2, (low + high) / 2, low, high)


def test_twenty_draws_hold_every_model_in_its_share_and_repeat_with_the_seed() -> None:
    drawn = list(islice(draws(3, list(SHARES)), 20))
    assert {name: sum(each.model == name for each in drawn) for name in SHARES} == SHARES
    assert drawn == list(islice(draws(3, list(SHARES)), 20))
    assert drawn != list(islice(draws(4, list(SHARES)), 20))
    assert all(each.factor > 1 for each in drawn)


def test_a_result_counts_as_slower_where_its_whole_interval_says_so() -> None:
    assert row(0.90, 0.99).slower
    assert not row(0.90, 1.01).slower
    text = page([row(0.90, 0.99), row(1.1, 1.2)], seed=0)
    assert "**1 of 2 are not slower.**" in text
    assert "(0.90–0.99) **slower** |" in text
