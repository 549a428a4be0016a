"""The results page: rows in a fixed order, with what is allowed beside what came out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import reference
from tools.reference import TARGETS, Ask, Int8Row, Row, Target, _page, made_by


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


def converted(page: str) -> list[str]:
    """Rows of the first table."""
    first = page.partition("\n## Converted")[2].partition("\n## ")[0]
    return [line for line in first.splitlines() if line.startswith("| ")][1:]


def test_rows_come_in_the_order_of_models_and_what_is_asked_of_them() -> None:
    rows = [
        row("VGG-16", "--macs 8"),
        row("trained here", "--macs 2"),
        row("VGG-16", "--macs 4"),
        row("ResNet-20", "--macs 2"),
    ]
    assert [line.split(" | ")[:2] for line in converted(_page(rows))] == [
        ["| ResNet-20", "`--macs 2`"],
        ["| VGG-16", "`--macs 4`"],
        ["| VGG-16", "`--macs 8`"],
        ["| trained here", "`--macs 2`"],
    ]


def test_what_is_allowed_and_predicted_stands_beside_what_was_measured() -> None:
    page = _page([row("VGG-16", "--macs 4", 0.4), row("x", "--macs 2")])
    asked, free = converted(page)
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
    assert "\n- other programs ran beside it\n\n## Converted" in page
    assert "\n- other" not in _page([row("VGG-16", "--macs 4")])


def test_what_was_not_run_is_named() -> None:
    page = _page([row("VGG-16", "--macs 4", 0.4)])
    plain, recovered = [line for line in page.splitlines() if line.startswith("Not run yet")]
    assert plain.startswith("Not run yet: ResNet-20 `--macs 2`, ")
    assert "VGG-16 `--macs 4`" not in plain
    assert "VGG-16 `--macs 8`" in plain
    assert "VGG-16 `--macs 4 --recover 10m`" in recovered
    assert "--recover" not in plain


def test_what_was_recovered_stands_beside_what_is_published() -> None:
    page = _page([row("ResNet-20", "--macs 2"), row("ResNet-20", "--macs 2 --recover 18m", 0.0)])
    assert len(converted(page)) == 1
    beside = page.partition("\n## Recovered")[2]
    rows = [line for line in beside.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| ResNet-20 | `--macs 2 --recover 18m` | 2.00 | 3.00 |")
    assert "| -0.50 ± 0.25 | ≥ 0 |" in rows[1]
    assert "| ResNet-20 | ALDS | yes | −74.9 % | −67.9 % | -0.47 |" in rows
    ours = "| ResNet-20 | Twofold, `--macs 2 --recover 18m` | none | −66.7 % | −50.0 % | -0.50 ± 0.25 |"
    assert ours in rows


INT8 = Int8Row(
    model="VGG-16",
    budget="--macs 4 --recover 10m",
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
)


def test_int8_has_a_table_of_its_own() -> None:
    page = _page([row("VGG-16", "--macs 4", 0.4)], "", [INT8])
    assert page.splitlines()[-1] == (
        "| VGG-16 | `--macs 4 --recover 10m` | 5,000 | 93.10 % | 93.08 % | 92.90 % | 5.30 (5.20–5.40) | "
        "10.10 (10.00–10.20) | 2.20 (2.10–2.30) | ≥ 2 | 2.80 (2.70–2.90) | ≥ 2.5 | 3.60 | 80 | "
        "original: u8 × s8, min-max, 0 of 14 layers in float |"
    )
    assert "## In int8" not in _page([row("VGG-16", "--macs 4", 0.4)])


def test_int8_rows_make_what_is_not_there_and_quantize_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vgg = next(target for target in TARGETS if target.name == "VGG-16")
    done: list[str] = []

    def measure(target: Target, model: Path, ask: Ask, shared: Path, work: Path) -> Row:
        assert (target.name, shared) == ("VGG-16", tmp_path)
        done.append(str(ask))
        made_by(model, ask, work)[0].touch()
        return row(target.name, str(ask))

    def measure_int8(target: Target, model: Path, ask: Ask, shared: Path, work: Path) -> Int8Row:
        assert made_by(model, ask, work)[0].exists()
        assert (target.name, shared) == ("VGG-16", tmp_path)
        done.append(f"{ask} --int8")
        return Int8Row(**{**asdict(INT8), "budget": str(ask)})

    monkeypatch.setattr(reference, "_measure", measure)
    monkeypatch.setattr(reference, "_measure_int8", measure_int8)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / vgg.file).touch()
    given = {"shared": tmp_path, "references": tmp_path / "none", "work": tmp_path / "work"}
    for _ in range(2):
        reference.main(
            **given, out=tmp_path / "page.md", only=None, int8=True, note="", fresh=False
        )
    asks = [str(ask) for ask in vgg.asks if ask.int8]
    assert asks == ["--macs 4 --recover 10m", "--params 20 --macs 7 --recover 55m"]
    assert done == [f"{ask}{end}" for ask in asks for end in ("", " --int8")]
    assert (tmp_path / "page.md").read_text().count(INT8.settings) == 2
    assert len(json.loads((tmp_path / "work" / "int8.json").read_text())) == 2
