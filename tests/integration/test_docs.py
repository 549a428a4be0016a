"""The docs say what is so: their commands and Python are those of the program, and they are whole."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import converter
from converter.cli import app
from converter.cli.terminal import INTERNAL, INTERRUPTED
from converter.config import Gates
from converter.errors import ConverterError

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUN = "<!-- run by the tests -->\n"


def blocks(page: Path, language: str) -> list[str]:
    """Give the code blocks of a page that are in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


def shown(page: Path) -> Iterator[list[str]]:
    """Give the command lines that a page shows, as the words of each."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def twofold(page: Path) -> list[list[str]]:
    """Give what the commands of a page hand to the program."""
    return [words[1:] for words in shown(page) if Path(words[0]).name == "twofold"]


GROUP: Any = typer.main.get_command(app)
COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)} {shlex.join(words)}")
    for page in PAGES
    for words in twofold(page)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option is there, each value of its type, and nothing that is required is missing."""
    project = 'model = "model.onnx"\ncalib = "images"\nout = "fast.onnx"\n'
    (tmp_path / "twofold.toml").write_text(project, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    name, *arguments = words
    GROUP.commands[name].make_context(name, arguments)


def test_a_command_that_is_wrong_is_not_understood() -> None:
    for wrong in (["--sped", "2"], ["--speedup", "fast"], []):
        with pytest.raises(Exception, match=r"(?i)sped|a valid number|not a valid float|missing"):
            GROUP.commands["convert"].make_context("convert", ["a.onnx", "--calib", "b", *wrong])


def test_commands_of_other_programs_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        for words in shown(page):
            program, rest = Path(words[0]).name, words[1:]
            if program == "make":
                assert rest[0] in targets, words
            elif program == "python" and rest[0] == "-m" and rest[1] != "pytest":
                assert importlib.util.find_spec(rest[1]), words
            else:
                assert program in {"twofold", "python", "pip", "source", "run"}, words


def test_every_command_is_shown_by_a_how_to() -> None:
    guides = [DOCS / "index.md", DOCS / "ci.md", *(DOCS / "how-to").glob("*.md")]
    used = {words[0] for page in guides for words in twofold(page)}
    assert used == set(GROUP.commands)


QUICK = {
    "digits": ["--epochs", "1"],
    # what ADMM does, and does on many images, is tested elsewhere
    "convert": ["--solver", "data-svd", "--images", "128", "--patches", "512", "--no-timing"],
    "validate": ["--seconds", "0.05"],
    "check": ["--seconds", "0.05", "--gate", "max_accuracy_drop=90"],  # after a single epoch
}
"""What is typed behind a command of the quick start, so that it takes seconds."""


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the quick start, in a folder of its own."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    folder = tmp_path_factory.mktemp("quick-start")
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    marked = re.findall(rf"{RUN}```sh\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line) for block in marked for line in block.splitlines()]
    assert len(lines) == 5
    for words in lines:
        more = next((more for name, more in QUICK.items() if name in words), [])
        start = {"python": [sys.executable], "twofold": [sys.executable, "-m", "converter"]}
        done = subprocess.run(
            [*start[words[0]], *words[1:], *more],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return folder


def test_the_quick_start_runs(quick_start: Path) -> None:
    assert (quick_start / "demo/fast.onnx").exists()


def test_all_fields_of_a_report_are_documented(quick_start: Path) -> None:
    pytest.importorskip("griffe", reason="the page of the reports needs the extra docs")
    from tools.pages import report_fields

    report = json.loads((quick_start / "demo/fast.json").read_text(encoding="utf-8"))
    section = report_fields().split(f"## {report['format']}\n")[1].split("\n## ")[0]
    tables = re.split(r"^### ", section, flags=re.MULTILINE)[1:]
    fields = {
        table.partition("\n")[0]: set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
        for table in tables
    }
    assert set(report) == fields["Conversion"]
    assert set(report["layers"][0]) == fields["LayerOutcome"]
    assert set(report["front"][0]) == fields["FrontPoint"]


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference/python.md").read_text(encoding="utf-8")
    for name in converter.__all__:
        assert re.search(rf"(::: |`)converter\.{name}\b", text), name
        assert name in ("SILENT", "PRESETS", "__version__") or inspect.getdoc(
            getattr(converter, name)
        )


def test_every_exit_code_is_in_the_reference() -> None:
    text = (DOCS / "reference/exit-codes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE))
    kinds = ConverterError.__subclasses__()
    codes = {kind.exit_code for kind in kinds} | {0, INTERNAL, INTERRUPTED}
    assert {int(code) for code in rows} == codes
    for name in converter.__all__:
        kind = getattr(converter, name)
        if (
            inspect.isclass(kind)
            and issubclass(kind, ConverterError)
            and kind is not ConverterError
        ):
            assert f"`{name}`" in rows[str(kind.exit_code)]


def test_every_gate_is_described() -> None:
    text = (DOCS / "ci.md").read_text(encoding="utf-8")
    for name in vars(Gates()):
        assert f"`{name}`" in text.split("## 2. Gates")[1]


PYTHON = [
    pytest.param(block, id=f"{page.relative_to(ROOT)} {number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_is_that_of_the_package(block: str) -> None:
    """It compiles, what it imports and names is there, and its calls fit the signatures."""
    tree = ast.parse(block)
    compile(tree, "docs", "exec")
    modules: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                modules[each.asname or each.name] = importlib.import_module(each.name)
    assert "converter" in modules
    calls = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _named(node, modules)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = _named(node.func, {"converter": converter})
            if called is not None:
                named = {each.arg: None for each in node.keywords if each.arg}
                inspect.signature(called).bind(*node.args, **named)
                calls += 1
    assert calls


def _named(node: ast.expr, modules: dict[str, Any]) -> Any:
    """Give what an expression such as `converter.Budget` names; None where it is no such."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _named(node.value, modules)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target
