"""The page docs/reliability.md: one section for each script that checks something, written by that script."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converter.output_file import write_text_atomically
from converter.runtime import machine

__all__ = ["FIGURES", "PAGE", "load_figures", "machine_line", "save_figures", "write_section"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "references" / "reliability"
"""Where scripts keep what they found, so that a run that was interrupted goes on from there."""

SECTIONS = ("Real graphs", "Random graphs", "Damaged files", "Faults", "A model over 2 GB")
HEAD = """# Reliability

What was tried on Twofold beside its tests, and how it ended. Each section is written by the command that it
names; a command that was interrupted goes on where it was.
"""


def load_figures(name: str, *, fresh: bool = False) -> dict[str, Any]:
    """Give what a script found so far, by what it was found on."""
    path = FIGURES / f"{name}.json"
    if fresh or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def save_figures(name: str, figures: dict[str, Any]) -> None:
    """Keep them."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    write_text_atomically(FIGURES / f"{name}.json", json.dumps(figures, indent=1) + "\n")


def machine_line() -> str:
    """Say where figures were measured."""
    here = machine()
    versions = here["versions"]
    return (
        f"{here['processor']}, {here['usable_cores']} cores; onnx {versions['onnx']}, "
        f"onnxruntime {versions['onnxruntime']}, torch {versions['torch']}"
    )


def write_section(title: str, lines: Sequence[str], page: Path = PAGE) -> None:
    """Put a section in its place on the page, and leave the others as they are.

    Parameters
    ----------
    title : str
        One of `SECTIONS`.
    lines : sequence of str
        What stands under the heading.
    page : Path, default PAGE
    """
    if title not in SECTIONS:
        raise ValueError(f"the page has no section {title!r}")
    text = page.read_text() if page.exists() else ""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    bodies[title] = "\n" + "\n".join(lines).strip() + "\n"
    written = [f"## {name}\n\n{bodies[name].strip()}\n" for name in SECTIONS if name in bodies]
    write_text_atomically(page, "\n".join([HEAD, *written]))
