"""The results page: rows in a fixed order, with what is allowed beside what came out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tools.reference import ASKED, ROOT
from tools.results_page import Int8Row, Results, Row, Run, page, this_machine

RUN = Run("A machine, 2 cores", "2026-11-27")


def of_rows(*rows: Row, int8: tuple[Int8Row, ...] = ()) -> str:
    """The page of some rows."""
    results = Results(
        {f"{row.model} {row.budget}": row for row in rows},
        {f"{row.model} {row.budget}": row for row in int8},
    )
    return page(results, ASKED)


def row(model: str, budget: str, allowed: float | None = None, run: Run = RUN) -> Row:
    return Row(
        model=model,
        budget=budget,
        run=run,
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


def converted(text: str) -> list[str]:
    """Rows of the first table."""
    first = text.partition("\n## Converted")[2].partition("\n## ")[0]
    return [line for line in first.splitlines() if line.startswith("| ")][1:]


def test_rows_come_in_the_order_of_models_and_what_is_asked_of_them() -> None:
    rows = [
        row("VGG-16", "--macs 8"),
        row("trained here", "--macs 2"),
        row("VGG-16", "--macs 4"),
        row("ResNet-20", "--macs 2"),
    ]
    assert [line.split(" | ")[:2] for line in converted(of_rows(*rows))] == [
        ["| ResNet-20", "`--macs 2`"],
        ["| VGG-16", "`--macs 4`"],
        ["| VGG-16", "`--macs 8`"],
        ["| trained here", "`--macs 2`"],
    ]


def test_what_is_allowed_and_predicted_stands_beside_what_was_measured() -> None:
    asked, free = converted(of_rows(row("VGG-16", "--macs 4", 0.4), row("x", "--macs 2")))
    assert "| -0.50 ± 0.25 | ≥ −0.4 |" in asked
    assert "| -0.50 ± 0.25 | – |" in free
    assert "| 5,000 | 88.00 % | 87.50 % |" in asked
    assert "| -3 % | 40 | 1,234 | A 2026-11-27 |" in asked


def test_a_prediction_far_off_stands_beside_what_is_off_at_the_pace_of_the_measurement() -> None:
    (line,) = converted(of_rows(replace(row("VGG-16", "--macs 8"), off=0.68, at_pace=0.012)))
    assert "| +68 % (+1 %) | 40 |" in line


def test_where_and_when_a_row_was_measured_stands_with_it() -> None:
    busy = Run("Another", "2026-11-20", "other programs ran beside it")
    rows = (row("VGG-16", "--macs 4", run=busy), row("ResNet-20", "--macs 2"))
    text = of_rows(*rows, int8=(INT8,))
    first, second = converted(text)
    assert first.endswith("| A 2026-11-27 |")
    assert second.endswith("| B 2026-11-20 [1] |")
    assert "A: A machine, 2 cores. B: Another." in text
    assert "\n- [1] other programs ran beside it\n" in text


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    kept = Results({"VGG-16 --macs 4": row("VGG-16", "--macs 4", 0.4)})
    kept.int8[f"VGG-16 {INT8.budget}"] = INT8
    kept.write(tmp_path / "rows.json")
    assert Results.read(tmp_path / "rows.json") == kept
    assert Results.read(tmp_path / "none.json") == Results()
    assert "onnxruntime" in this_machine()


def test_the_published_page_is_that_of_the_published_rows() -> None:
    docs = ROOT / "docs"
    assert (docs / "results.md").read_text() == page(Results.read(docs / "results.json"), ASKED)


def test_the_readme_quotes_published_rows() -> None:
    """Network, budget, accuracy before and after, and speed-ups, to the digit."""
    published = Results.read(ROOT / "docs" / "results.json")
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2]
    quoted = re.findall(
        r"^\| ([\w-]+) \| `(--.+)`(, in int8)? \| (.+) \| (.+) \|$", text, re.MULTILINE
    )
    assert len(quoted) >= 5
    for model, budget, in_int8, accuracy, speeds in quoted:
        key = f"{model} {budget}"
        if in_int8:
            quantized = published.int8[key]
            found = quantized.original, quantized.converted_int8, *quantized.over_original
        else:
            row = published.rows[key]
            found = row.before, row.after, row.batch_1, row.batch_32
        before, after, one, many = found
        assert accuracy == f"{before:.2f} → {after:.2f} %", key
        assert speeds == f"{one.split()[0]} / {many.split()[0]}", key


def test_what_was_not_run_is_named() -> None:
    text = of_rows(row("VGG-16", "--macs 4", 0.4))
    plain, recovered = [line for line in text.splitlines() if line.startswith("Not run yet")]
    assert plain.startswith("Not run yet: ResNet-20 `--macs 2`, ")
    assert "VGG-16 `--macs 4`" not in plain
    assert "VGG-16 `--macs 8`" in plain
    assert "VGG-16 `--macs 4 --recover 10m`" in recovered
    assert "--recover" not in plain


def test_what_was_recovered_stands_beside_what_is_published() -> None:
    text = of_rows(row("ResNet-20", "--macs 2"), row("ResNet-20", "--macs 2 --recover 18m", 0.0))
    assert len(converted(text)) == 1
    beside = text.partition("\n## Recovered")[2]
    rows = [line for line in beside.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| ResNet-20 | `--macs 2 --recover 18m` | 2.00 | 3.00 |")
    assert "| -0.50 ± 0.25 | ≥ 0 |" in rows[1]
    assert "| ResNet-20 | ALDS | yes | −74.9 % | −67.9 % | -0.47 |" in rows
    ours = "| ResNet-20 | Twofold, `--macs 2 --recover 18m` | none | −66.7 % | −50.0 % | -0.50 ± 0.25 |"
    assert ours in rows


INT8 = Int8Row(
    model="VGG-16",
    budget="--macs 4 --recover 10m",
    run=RUN,
    images=5000,
    original=93.1,
    original_int8=93.08,
    converted_int8=92.9,
    over_original=("5.30 (5.20–5.40)", "10.10 (10.00–10.20)"),
    over_int8=("2.20 (2.10–2.30)", "2.80 (2.70–2.90)"),
    asked=(2.0, 2.5),
    file=3.6,
    settings="original: u8 × s8, min-max, 0 of 14 layers in float",
    seconds=80.4,
    allowed=0.5,
)


def test_int8_has_a_table_of_its_own() -> None:
    text = of_rows(row("VGG-16", "--macs 4", 0.4), int8=(INT8,))
    assert text.splitlines()[-1] == (
        "| VGG-16 | `--macs 4 --recover 10m` | 5,000 | 93.10 % | 93.08 % | 92.90 % | -0.18 | ≥ −0.5 | "
        "5.30 (5.20–5.40) | 10.10 (10.00–10.20) | 2.20 (2.10–2.30) | ≥ 2 | 2.80 (2.70–2.90) | ≥ 2.5 | "
        "3.60 | 80 | original: u8 × s8, min-max, 0 of 14 layers in float | A 2026-11-27 |"
    )
    assert "## In int8" not in of_rows(row("VGG-16", "--macs 4", 0.4))
