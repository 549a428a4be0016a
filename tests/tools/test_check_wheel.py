"""The check of the wheel's content: it must see what is missing and what is too much."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tools.check_wheel import PACKAGES, ROOT, WheelError, check_content


def wheel(folder: Path, names: Iterable[str]) -> Path:
    path = folder / "twofold-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


@pytest.fixture
def complete() -> list[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    wanted = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    return [path.relative_to(ROOT).as_posix() for path in wanted] + ["twofold-0.dist-info/RECORD"]


def test_complete_wheel_passes(tmp_path: Path, complete: list[str]) -> None:
    check_content(wheel(tmp_path, complete))


@pytest.mark.parametrize(
    "lost",
    ["converter/report/console/output.py", "passes/py.typed", "converter/report/page/page.css"],
)
def test_missing_file(tmp_path: Path, complete: list[str], lost: str) -> None:
    complete.remove(lost)
    with pytest.raises(WheelError, match=lost):
        check_content(wheel(tmp_path, complete))


@pytest.mark.parametrize("foreign", ["tools/demo.py", "models/__init__.py", "tests/conftest.py"])
def test_foreign_file(tmp_path: Path, complete: list[str], foreign: str) -> None:
    with pytest.raises(WheelError, match=foreign):
        check_content(wheel(tmp_path, [*complete, foreign]))
