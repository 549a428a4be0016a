"""What is measured, and what is taken from earlier runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tools import reference
from tools.reference import TARGETS, Ask, Target, made_by
from tools.results_page import Int8Row, Results, Row, Run


def test_a_recovery_is_part_of_what_was_asked_and_of_the_file_names() -> None:
    plain, recovered = Ask(("--macs", "2")), Ask(("--params", "2", "--macs", "2"), 0.0, "18m")
    assert str(recovered) == "--params 2 --macs 2 --recover 18m"
    names = [made_by(Path("net.onnx"), ask, Path("work"))[0].name for ask in (plain, recovered)]
    assert names == ["net-macs2.onnx", "net-params2-macs2-recover18m.onnx"]


def test_rows_are_measured_once_and_those_in_int8_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vgg = next(target for target in TARGETS if target.name == "VGG-16")
    published = Results.read(reference.ROOT / "docs" / "results.json")
    sample = published.rows["VGG-16 --macs 4"]
    in_int8 = next(each for each in published.int8.values() if each.model == "VGG-16")
    vgg_at = "VGG-16", vgg.file
    done: list[str] = []

    def measure(target: Target, model: Path, ask: Ask, shared: Path, work: Path, run: Run) -> Row:
        assert (target.name, model.name, shared, work.parent) == (*vgg_at, tmp_path, tmp_path)
        done.append(str(ask))
        return dataclasses.replace(sample, budget=str(ask), run=run)

    def measure_int8(
        target: Target, model: Path, ask: Ask, shared: Path, work: Path, run: Run
    ) -> Int8Row:
        assert (target.name, model.name, shared, work.parent) == (*vgg_at, tmp_path, tmp_path)
        assert ask.int8 is not None
        done.append(str(ask))
        return dataclasses.replace(in_int8, budget=str(ask), run=run)

    monkeypatch.setattr(reference, "_measure", measure)
    monkeypatch.setattr(reference, "_measure_int8", measure_int8)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / vgg.file).touch()

    def run(**changes: Any) -> None:
        asked: Any = {"only": None, "int8": True, "budget": None, "remark": "", "fresh": False}
        folders = tmp_path, tmp_path / "none", tmp_path / "work"
        reference.main(*folders, out=tmp_path / "page.md", **{**asked, **changes})

    run()
    run()
    asks = [str(ask) for ask in vgg.asks if ask.int8]
    assert done == asks
    assert all("--int8" in ask and "--recover" in ask for ask in asks)
    assert (tmp_path / "page.md").read_text().count(in_int8.settings) == len(asks)
    done.clear()
    run(int8=False, budget=["--macs 8"], remark="alone")
    run(int8=False, budget=["--macs 8"])
    run(int8=False, budget=["--macs 8"], fresh=True)
    assert done == ["--macs 8", "--macs 8"]
    kept = Results.read(tmp_path / "page.json")
    assert (len(kept.rows), len(kept.int8)) == (1, len(asks))
