"""Build the wheel, install it into an environment of its own, and try it outside the repository.

    python -m tools.check_wheel

The wheel goes to `dist/`. Arguments are passed on to pip where it installs the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PACKAGES", "WheelError", "build_wheel", "check_content", "try_installed"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("converter", "passes")

_IMPORT_ALL = """
import importlib, pkgutil, sys
import converter, passes
assert all(getattr(converter, name) is not None for name in converter.__all__)
for package in (converter, passes):
    assert "site-packages" in package.__file__, package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for name in ("models", "tools", "tests"):
    assert importlib.util.find_spec(name) is None, name
"""
"""Imports every module: none may need the repository or what only developers install."""

_MODEL = "import onnx; print(onnx.__path__[0])"
_MODEL_PATH = "backend/test/data/light/light_squeezenet.onnx"

_REPORT = '{"format": "twofold-validation-1"}'


class WheelError(Exception):
    """A wheel that is not what it should be."""


def build_wheel(out: Path) -> Path:
    """Build the wheel of this repository into the folder `out` and return its path."""
    # What an earlier build left behind would end up in the wheel.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    for old in out.glob("*.whl"):
        old.unlink()
    _run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)])
    return next(out.glob("*.whl"))


def check_content(wheel: Path) -> None:
    """Raise `WheelError` where the wheel has too much or too little in it."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    own = tuple(f"{package}/" for package in PACKAGES)
    foreign = sorted(name for name in held if not name.startswith(own) and "-info/" not in name)
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = sorted(wanted - held)
    if foreign or missing:
        raise WheelError(f"{wheel.name}: not wanted {foreign[:5]}, missing {missing[:5]}")


def try_installed(wheel: Path, pip_arguments: Sequence[str] = ()) -> None:
    """Install `wheel` into a clean environment in a temporary folder, and try it there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        programs = folder / "env" / "bin"
        python, twofold = str(programs / "python"), str(programs / "twofold")
        constraints = str(ROOT / "constraints.txt")
        pip = [python, "-m", "pip", "install", "-q", "--constraint", constraints]
        _run([*pip, *pip_arguments, str(wheel)], folder)
        _run([python, "-c", _IMPORT_ALL], folder)
        data = Path(_run([python, "-c", _MODEL], folder).strip())
        for arguments in (["--help"], ["--version"], ["inspect", str(data / _MODEL_PATH)]):
            _run([twofold, *arguments], folder)
        _run([python, "-m", "converter", "--version"], folder)
        (folder / "report.json").write_text(_REPORT, encoding="utf-8")
        _run([twofold, "report", "report.json", "--out", "report.html"], folder)


def _run(command: Sequence[str], folder: Path = ROOT) -> str:
    """Run a command without this program's own paths, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WheelError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Build, check and try; end with exit code 1 where something is wrong."""
    try:
        wheel = build_wheel(ROOT / "dist")
        check_content(wheel)
        try_installed(wheel, sys.argv[1:])
    except WheelError as error:
        sys.exit(f"the wheel is not right: {error}")
    print(f"{wheel} is built, installed and tried")


if __name__ == "__main__":
    main()
