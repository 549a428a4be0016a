"""Gates as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from converter.gates import Verdict
from converter.output_file import write_bytes_atomically
from converter.report.words import printable

__all__ = ["write_junit"]


def write_junit(path: Path, verdict: Verdict) -> None:
    """Write one test case for each gate, whole or not at all.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    """
    suite = TestSuite("twofold")
    for gate in verdict.gates:
        case = TestCase(gate.name, classname=printable(verdict.converted.name))
        line = printable(f"{gate.figure}, {gate.bound} is wanted; {gate.detail}".rstrip("; "))
        if gate.passed:
            case.system_out = line
        else:
            case.result = [Failure(line, gate.status)]
        suite.add_testcase(case)
    xml: Any = JUnitXml()  # typed in part only
    xml.add_testsuite(suite)
    xml.update_statistics()
    write_bytes_atomically(path, xml.tostring())
