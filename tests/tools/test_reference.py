"""The results page: rows in a fixed order, and only what was asked of Twofold's own method."""

from __future__ import annotations

from tools.reference import Row, _page


def row(model: str, solver: str, budget: str, allowed: float | None = None) -> Row:
    return Row(
        model=model,
        solver=solver,
        budget=budget,
        allowed=allowed,
        macs=2.0,
        params=3.0,
        images=5000,
        before=88.0,
        after=87.5,
        error=0.25,
        batch_1="1.50 (1.40–1.60)",
        batch_32="1.90 (1.80–2.00)",
        seconds=40.4,
        memory_mib=1234.5,
    )


def test_rows_come_in_the_order_of_models_budgets_and_solvers() -> None:
    rows = [
        row("VGG-16", "svd", "MACs ÷ 2"),
        row("VGG-16", "admm", "MACs ÷ 4"),
        row("VGG-16", "admm", "MACs ÷ 2"),
        row("ResNet-20", "admm", "MACs ÷ 2"),
    ]
    body = [line for line in _page(rows).splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[:3] for line in body] == [
        ["| ResNet-20", "admm", "MACs ÷ 2"],
        ["| VGG-16", "admm", "MACs ÷ 2"],
        ["| VGG-16", "svd", "MACs ÷ 2"],
        ["| VGG-16", "admm", "MACs ÷ 4"],
    ]


def test_the_drop_that_is_allowed_stands_beside_the_change_of_admm_alone() -> None:
    ours, theirs = _page(
        [row("VGG-16", "admm", "MACs ÷ 2", 0.7), row("VGG-16", "svd", "MACs ÷ 2", 0.7)]
    ).splitlines()[-2:]
    assert "| -0.50 ± 0.25 | ≥ −0.7 |" in ours
    assert "| -0.50 ± 0.25 | – |" in theirs
    assert "| 5,000 | 88.00 % | 87.50 % |" in ours
