"""Gates as Markdown, for the summary page of a CI job."""

from __future__ import annotations

import re
from pathlib import Path

from converter.errors import ConfigError
from converter.gates import Verdict
from converter.report.words import printable

__all__ = ["append_summary", "verdict_markdown"]


def verdict_markdown(verdict: Verdict) -> str:
    """Give a heading with the verdict, and a table of the gates."""
    count = len(verdict.failed)
    said = "all gates passed" if verdict.passed else f"{count} of {len(verdict.gates)} gates failed"
    rows = [
        f"| {gate.name} | {_cell(gate.bound)} | {_cell(gate.figure)} | "
        f"{'✅' if gate.passed else '❌'} {gate.status} | {_cell(gate.detail)} |"
        for gate in verdict.gates
    ]
    lines = [
        f"### Twofold: {_cell(verdict.converted.name)}, {said}",
        "",
        "| gate | wanted | found | verdict | |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def append_summary(path: Path, verdict: Verdict) -> None:
    """Append the table to a file that other steps of the job write to as well.

    Raises
    ------
    ConfigError
        Where the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + verdict_markdown(verdict))
    except OSError as error:
        raise ConfigError(
            f"the summary {path} cannot be written: {error.strerror}; "
            "unset GITHUB_STEP_SUMMARY or name another file"
        ) from error


def _cell(text: str) -> str:
    """Keep names from files out of the markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", printable(text))
