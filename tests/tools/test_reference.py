"""The results page: rows in a fixed order, with what is allowed beside what came out."""

from __future__ import annotations

from pathlib import Path

from tools.reference import Ask, Row, _page, made_by


def row(model: str, budget: str, allowed: float | None = None) -> Row:
    return Row(
        model=model,
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
        off=-0.034,
        seconds=40.4,
        memory_mib=1234.5,
    )


def test_rows_come_in_the_order_of_models_and_what_is_asked_of_them() -> None:
    rows = [
        row("VGG-16", "--macs 8"),
        row("trained here", "--macs 2"),
        row("VGG-16", "--macs 4"),
        row("ResNet-20", "--macs 2"),
    ]
    body = [line for line in _page(rows).splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[:2] for line in body] == [
        ["| ResNet-20", "`--macs 2`"],
        ["| VGG-16", "`--macs 4`"],
        ["| VGG-16", "`--macs 8`"],
        ["| trained here", "`--macs 2`"],
    ]


def test_what_is_allowed_and_predicted_stands_beside_what_was_measured() -> None:
    page = _page([row("VGG-16", "--macs 4", 0.4), row("x", "--macs 2")])
    asked, free = [line for line in page.splitlines() if line.startswith("| ")][-2:]
    assert "| -0.50 ± 0.25 | ≥ −0.4 |" in asked
    assert "| -0.50 ± 0.25 | – |" in free
    assert "| 5,000 | 88.00 % | 87.50 % |" in asked
    assert "| -3 % | 40 | 1,234 |" in asked


def test_a_recovery_is_part_of_what_was_asked_and_of_the_file_names() -> None:
    plain, recovered = Ask(("--macs", "2")), Ask(("--params", "2", "--macs", "2"), 0.0, "18m")
    assert str(recovered) == "--params 2 --macs 2 --recover 18m"
    names = [made_by(Path("net.onnx"), ask, Path("work"))[0].name for ask in (plain, recovered)]
    assert names == ["net-macs2.onnx", "net-params2-macs2-recover18m.onnx"]


def test_a_note_stands_above_the_table() -> None:
    page = _page([row("VGG-16", "--macs 4")], "other programs ran beside it")
    assert "\n- other programs ran beside it\n\n| model" in page
    assert "\n- other" not in _page([row("VGG-16", "--macs 4")])


def test_what_was_not_run_is_named() -> None:
    last = _page([row("VGG-16", "--macs 4", 0.4)]).splitlines()[-1]
    assert last.startswith("Not run yet: ResNet-20 `--macs 2`, ")
    assert "VGG-16 `--macs 4`" not in last
    assert "VGG-16 `--macs 8`" in last
