"""What the docs hold of the code, and that it is all there."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest

pytest.importorskip("griffe", reason="the docs need the extra docs, and that Python 3.11")
pytest.importorskip("latex2mathml", reason="the docs need the extra docs")
pytest.importorskip("mkdocs", reason="the docs need the extra docs")

import typer
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError

from converter.cli import app, project_settings
from tools import pages

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"


def commands() -> dict[str, typing.Any]:
    group: typing.Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_a_command_is_in_its_section(name: str) -> None:
    section = pages.command_line().split(f"## twofold {name}\n")[1].split("\n## ")[0]
    command = commands()[name]
    assert command.help.splitlines()[0] in section
    for parameter in command.params:
        assert parameter.help
        assert parameter.help in section
        for option in (*parameter.opts, *parameter.secondary_opts):
            if parameter.param_type_name == "option":
                assert re.search(rf"`[^`\n]*(?<![\w-]){option}(?![\w-])", section), option
            else:
                assert f"`{parameter.metavar}` · required" in section


def test_defaults_are_those_of_the_program() -> None:
    text = pages.command_line()
    assert "`--patches <int>` · default `16384`" in text
    assert "`--timing / --no-timing` · default `--timing`" in text
    assert "`--calib <path>` · required" in text
    assert re.search(r"^`-q, --quiet`$", text, re.MULTILINE)


def test_every_setting_is_in_its_table() -> None:
    text = pages.settings()
    for setting in project_settings():
        heading = f"## `[{setting.table}]`" if setting.table else "## At the top"
        section = text.split(f"{heading}\n")[1].split("\n## ")[0]
        assert f"`{setting.name}` · " in section
        assert setting.description in section
    assert "`augment` · text or list · default `flip,shift`" in text
    assert "`provider` · `cpu` or `cuda` · default `cpu`" in text


def test_every_part_of_a_report_is_described() -> None:
    """Whatever dataclass a field holds is one of the listed ones, so no field is left to guess."""
    listed = {kind.__name__ for report in pages.REPORTS for kind in report.classes}
    plain = {"Any", "None", "Path", "Literal", "Provider", "Status"}
    for report in pages.REPORTS:
        for kind in report.classes:
            for field in dataclasses.fields(kind):
                if field.name not in report.omitted:
                    names = set(re.findall(r"\b[A-Z]\w+", str(field.type)))
                    assert names - plain <= listed, f"{kind.__name__}.{field.name}"


def test_rows_hold_what_docstrings_say() -> None:
    text = pages.report_fields()
    assert "| `out` | `str` | The model that was read, and the one that was written. |" in text
    assert "| `layers` | `list[LayerOutcome]` | In graph order, the kept ones too. |" in text
    assert '| `status` | `{"passed", "failed", "cannot be judged"}` |' in text
    assert "| `off` | `float` | By how much the predicted latency" in text
    quantization = text.split("## twofold-quantization-1")[1]
    assert "| `model` |" not in quantization


def test_pages_ask_for_parts_that_are_there() -> None:
    asked = [
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"<!-- made of the code: (.*?) -->", page.read_text("utf-8"))
    ]
    assert sorted(asked) == sorted(pages.PARTS)
    assert pages.on_page_markdown("a\n<!-- made of the code: settings -->\n").startswith("a\n## At")
    with pytest.raises(PluginError, match="'nothing'"):
        pages.on_page_markdown("<!-- made of the code: nothing -->")


def test_options_in_code_do_not_break_at_their_hyphens() -> None:
    html = (
        '<a href="--x">--no-timing</a><code><span class="w--k">convert</span> --no-timing -q</code>'
    )
    marked = '<span class="option">--no-timing</span>'
    assert pages.on_page_content(html) == html.replace("> --no-timing", f"> {marked}")


def test_formulas_become_mathml() -> None:
    drawn = pages.formula(r"\frac{a}{b}" + "\n\nc")
    assert drawn.count("<math") == 2
    assert "<mfrac>" in drawn
    assert "\\" not in drawn


def test_no_formula_of_the_docs_keeps_a_command_of_latex() -> None:
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"```math\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            assert "\\" not in pages.formula(block), block


def test_the_navigation_has_every_page_once() -> None:
    config = pages.on_config(load_config(str(ROOT / "mkdocs.yml")))
    assert config.nav is not None
    found: list[str] = []

    def gather(entry: object) -> None:
        if isinstance(entry, str):
            found.append(entry)
        elif isinstance(entry, dict):
            gather(list(entry.values()))
        elif isinstance(entry, list):
            for each in entry:
                gather(each)

    gather(config.nav)
    assert sorted(found) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_program_has_docstrings_for_its_pages() -> None:
    for report in pages.REPORTS:
        for kind in report.classes:
            assert inspect.getdoc(kind), kind
