"""The whole way, once: train a small network on handwritten digits, convert it, compare the two.

    python -m tools.demo

Every step is a command that anyone can type, and is shown before it runs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "commands"]

ROOT = Path(__file__).resolve().parent.parent
_PREPARED = ("--channels", "gray", "--preset", "unit")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def commands(
    folder: Path, *, epochs: int, macs: float, seconds: float, solver: str = "admm"
) -> list[list[str]]:
    """Return what the demo runs, in order, with all files in `folder`."""
    programs = Path(sys.executable).parent
    python = _as_typed(Path(sys.executable))
    twofold = _as_typed(programs / "twofold")
    original, converted = str(folder / "digits.onnx"), str(folder / "digits-small.onnx")
    return [
        [python, "-m", "models", "digits", "--out", str(folder), "--epochs", str(epochs)],
        [twofold, "inspect", original],
        [
            *(twofold, "convert", original, "--calib", str(folder / "calib"), *_PREPARED),
            *("--out", converted, "--macs", f"{macs:g}", "--solver", solver),
        ],
        [
            *(twofold, "validate", original, converted, "--data", str(folder / "val"), *_PREPARED),
            *("--seconds", f"{seconds:g}", "--json", str(folder / "validation.json")),
        ],
    ]


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where all files go.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the train images.")] = 4,
    macs: Annotated[float, typer.Option(help="Divide the multiply-accumulates by so much.")] = 3,
    seconds: Annotated[float, typer.Option(help="Timed seconds for each model and batch.")] = 2,
    solver: Annotated[str, typer.Option(help="As in twofold convert.")] = "admm",
) -> None:
    """Train a small network on handwritten digits, convert it, and compare the two."""
    for command in commands(folder, epochs=epochs, macs=macs, seconds=seconds, solver=solver):
        print(f"\n$ {shlex.join(command)}", flush=True)
        _run(command)
    print(
        f"\nEverything is in {folder}: digits.onnx is the original, digits-small.onnx the result,"
    )
    print("digits-small.json the report of the conversion, validation.json that of the comparison.")


def _run(command: Sequence[str]) -> None:
    """Run a command in the repository; end the demo with its exit code where it fails."""
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        print(f"the demo stops here: the command above ended with exit code {code}", flush=True)
        raise typer.Exit(code)


def _as_typed(program: Path) -> str:
    """Return a program's path from the repository, where that is shorter."""
    return min((os.path.relpath(program, ROOT), str(program)), key=len)


if __name__ == "__main__":
    app(prog_name="python -m tools.demo")
