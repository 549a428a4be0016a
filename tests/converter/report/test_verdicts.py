"""JUnit XML and Markdown of gates."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from converter.errors import ConfigError
from converter.gates import GateResult, Verdict
from converter.report.console.validation import print_verdict
from converter.report.junit import write_junit
from converter.report.markdown import append_summary, verdict_markdown
from converter.validation.findings import Size, Validation

SIZE = Size(1, 1, 1, ())
VERDICT = Verdict(
    original=Path("a.onnx"),
    converted=Path("b|<x>.onnx"),
    gates=(
        GateResult("min_speedup", 1.8, 2.0, "passed", "", "1.9 to 2.1 with 95 %"),
        GateResult("max_latency_ms", 1.5, 2.0, "failed", "ms", ""),
        GateResult(
            "min_accuracy", 90, None, "cannot be judged", "%", "no <labels> & none | at all"
        ),
    ),
    validation=Validation(1, (), None, None, (), SIZE, SIZE),
    data={},
    original_digest="",
    converted_digest="",
    settings={},
    machine={},
)


def test_junit_has_a_case_for_each_gate(tmp_path: Path) -> None:
    write_junit(tmp_path / "j.xml", VERDICT)
    root = ElementTree.parse(tmp_path / "j.xml").getroot()
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    cases = {each.get("name"): each.find("failure") for each in suite.findall("testcase")}
    assert cases["min_speedup"] is None
    failure = cases["max_latency_ms"]
    assert failure is not None
    assert failure.get("message") == "2 ms, at most 1.5 ms is wanted"
    unjudged = cases["min_accuracy"]
    assert unjudged is not None
    assert unjudged.get("type") == "cannot be judged"
    assert "no <labels> & none" in (unjudged.get("message") or "")


def test_junit_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_junit(tmp_path / "none" / "j.xml", VERDICT)
    assert list(tmp_path.iterdir()) == []


def test_a_narrow_terminal_shows_names_of_gates_whole() -> None:
    stream = io.StringIO()
    gate = GateResult("min_macs_reduction", 1.9, 2.2, "passed", "", "long words " * 5)
    print_verdict(replace(VERDICT, gates=(gate,)), console=Console(file=stream, width=60))
    assert "min_macs_reduction " in stream.getvalue()


def test_markdown_says_what_failed_first() -> None:
    text = verdict_markdown(VERDICT)
    head, _, _, _, *rows = text.splitlines()
    assert head == r"### Twofold: b\|\<x\>.onnx, 2 of 3 gates failed"
    assert len(rows) == 3
    assert rows[0].startswith("| min_speedup | at least 1.8 | 2 | ✅ passed | 1.9 to 2.1")
    assert "❌ failed" in rows[1]
    assert r"no \<labels\> & none \| at all" in rows[2]  # a bar would end the cell


def test_the_summary_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n", encoding="utf-8")
    append_summary(path, VERDICT)
    assert path.read_text(encoding="utf-8") == "before\n\n" + verdict_markdown(VERDICT)
    with pytest.raises(ConfigError, match="summary"):
        append_summary(tmp_path, VERDICT)
