"""What the docs hold of the code: options, settings, fields of reports; and their formulas.

MkDocs calls this as a hook (`mkdocs.yml`). A line `<!-- made of the code: NAME -->` in a page gives way to
the text that `PARTS` has for the name, so that nothing is written down twice. A block of ```` ```math ````
becomes MathML, which browsers draw by themselves: no script, and no font from elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe
import typer.main
from latex2mathml.converter import convert as to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

import converter
from converter.calibration.sets import ModelInput
from converter.cli import app, project_settings
from converter.latency import Speedup, Timing
from converter.outcome import Answers, Latency, Stage
from converter.project import schema
from converter.quantization.quantizing import Alone, InTurns
from converter.quantization.search import LeftInFloat, Trial
from converter.refine.judge import Judgement
from converter.solver.solution import Iteration
from converter.validation.findings import Accuracy, Agreement, OutputComparison, Size
from converter.validation.findings import Latency as Compared
from converter.worst import WorstImage
from passes.base import Change as PassChange
from passes.base import PassResult, Skip

__all__ = ["PARTS", "REPORTS", "Report", "command_line", "formula", "report_fields", "settings"]


# What MkDocs calls -------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages in the place of patterns such as `adr/*.md`."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(nav: Any, docs: Path) -> Any:
    if isinstance(nav, Mapping):
        return {title: _expanded(entry, docs) for title, entry in nav.items()}
    if isinstance(nav, str) and "*" in nav:
        return sorted(page.relative_to(docs).as_posix() for page in docs.glob(nav))
    if isinstance(nav, list):
        entries = [(entry, _expanded(entry, docs)) for entry in nav]
        return [
            page
            for entry, pages in entries
            for page in (pages if isinstance(entry, str) and "*" in entry else [pages])
        ]
    return nav


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put what is made of the code in its place."""
    return re.sub(r"<!-- made of the code: (.*?) -->", lambda found: _part(found[1]), markdown)


def on_page_content(html: str, **_: object) -> str:
    """Mark options in code, so that lines do not break at their hyphens."""
    return re.sub(
        r"(?<=<code>).*?(?=</code>)",
        lambda found: re.sub(
            r"(?<![\w-])(--[a-z][\w-]*)(?![^<]*>)", r'<span class="option">\1</span>', found[0]
        ),
        html,
        flags=re.DOTALL,
    )


def _part(name: str) -> str:
    if name not in PARTS:
        raise PluginError(f"nothing is made of the code by the name {name!r}; see tools/pages.py")
    return PARTS[name]()


def formula(source: str, *_: object, **__: object) -> str:
    """Give a block of LaTeX as MathML, line by line where lines are empty between."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", source) if block.strip()]
    drawn = [to_mathml(block, display="block") for block in blocks]
    return f'<div class="math">{"".join(drawn)}</div>'


# The command line --------------------------------------------------------------------------------


def command_line() -> str:
    """List each command with its usage, arguments and options, under the headings of `--help`."""
    program: Any = typer.main.get_command(app)  # a group
    root = typer.Context(program, info_name="twofold")
    lines = [f"`twofold {each.opts[0]}`\n:   {each.help}\n" for each in program.params]
    for name, command in program.commands.items():
        context = typer.Context(command, parent=root, info_name=name)
        lines += [f"## twofold {name}", "", command.help or "", ""]
        lines += ["```text", command.get_usage(context).removeprefix("Usage: "), "```", ""]
        headings: dict[str, list[Any]] = {}
        for parameter in command.params:
            plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
            headings.setdefault(parameter.rich_help_panel or plain, []).append(parameter)
        for heading in sorted(headings, key=lambda each: each not in ("Arguments", "Options")):
            lines += [f"**{heading}**", ""]
            for parameter in headings[heading]:
                lines += [_option(parameter, context), f":   {parameter.help}", ""]
    return "\n".join(lines)


def _option(parameter: Any, context: typer.Context) -> str:
    """Give the line above an option's help: its names, what it takes, and its default."""
    if parameter.param_type_name == "argument":
        return _line(parameter.metavar, "", parameter.default, parameter.required)
    default = parameter.default
    if parameter.is_flag and isinstance(default, bool):
        # a flag that is off by default says so by being there
        default = parameter.opts[0] if default and parameter.secondary_opts else None
    return _line(parameter.get_help_record(context)[0], "", default, parameter.required)


def _line(name: str, kind: str, default: object, required: bool = False) -> str:
    said = [f"`{name}`"]
    if kind:
        said.append(kind)
    if required:
        said.append("required")
    elif default is not None:
        said.append(f"default `{default}`")
    return " · ".join(said)


# The settings ------------------------------------------------------------------------------------


def settings() -> str:
    """List the keys of `twofold.toml`, table by table, as its schema has them."""
    rules = schema(project_settings())["properties"]
    tables = {"": {key: rule for key, rule in rules.items() if rule.get("type") != "object"}}
    tables |= {key: rule["properties"] for key, rule in rules.items() if key not in tables[""]}
    lines: list[str] = []
    for table, keys in tables.items():
        lines += [f"## `[{table}]`" if table else "## At the top", ""]
        for key, rule in keys.items():
            lines += [
                _line(key, _kind(rule), rule.get("default")),
                f":   {rule['description']}",
                "",
            ]
    return "\n".join(lines)


_KINDS = {"boolean": "true or false", "integer": "whole number", "string": "text", "array": "list"}


def _kind(rule: Mapping[str, Any]) -> str:
    if "enum" in rule:
        return " or ".join(f"`{value}`" for value in rule["enum"])
    types: list[str] = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    return " or ".join(_KINDS.get(each, each) for each in types)


# The reports -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One JSON report: what it is called, what writes it, and the classes whose fields it holds.

    Attributes
    ----------
    format : str
        Value of its key `format`.
    written_by : str
        Commands, in Markdown.
    classes : tuple of type
        The whole first, then its parts that no report before has.
    derived : dict of str to tuple of str
        By class: properties that are written beside the fields.
    omitted : tuple of str
        Fields that are not written.
    """

    format: str
    written_by: str
    classes: tuple[type, ...]
    derived: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    omitted: tuple[str, ...] = ()


REPORTS = (
    Report(
        "twofold-inspection-1",
        "`inspect --json`",
        (converter.Inspection, ModelInput, converter.LayerInspection),
        {"Inspection": ("convertible_macs",), "LayerInspection": ("convertible",)},
    ),
    Report(
        "twofold-conversion-2",
        "`convert`, `run`",
        (
            *(converter.Conversion, converter.LayerOutcome, Iteration, Latency, Stage),
            *(PassResult, PassChange, Skip, converter.FrontPoint, converter.Search),
            *(converter.Probe, converter.Drop, Answers),
        ),
        {"Conversion": ("macs_reduction", "params_reduction"), "Latency": ("off", "off_at_pace")},
    ),
    Report("twofold-front-1", "`plan --json`", (converter.Front, converter.Verified)),
    Report(
        "twofold-validation-1",
        "`validate --json`",
        (
            *(converter.Validation, OutputComparison, Agreement, Accuracy, Compared),
            *(Timing, Speedup, Size, WorstImage),
        ),
        {"Validation": ("macs_reduction", "params_reduction", "bytes_reduction", "finite")},
    ),
    Report(
        "twofold-verdict-1",
        "`check --json`, `run --json`",
        (converter.Verdict, converter.GateResult),
        {"Verdict": ("passed", "speedup"), "GateResult": ("passed", "bound", "figure")},
    ),
    Report(
        "twofold-recovery-1",
        "`recover --json`",
        (converter.Recovered, Judgement),
        omitted=("model",),
    ),
    Report(
        "twofold-quantization-1",
        "`quantize --json`",
        (converter.Quantized, Answers, Trial, LeftInFloat, InTurns, Alone),
        omitted=("model",),
    ),
    Report(
        "twofold-difference-1",
        "`diff --json`",
        (converter.Difference, converter.Change),
        {"Difference": ("alike",)},
    ),
)
"""Every report that commands write."""


def report_fields() -> str:
    """List the fields of each report, class by class."""
    lines: list[str] = []
    for report in REPORTS:
        lines += [f"## {report.format}", "", f"Written by {report.written_by}.", ""]
        for kind in report.classes:
            lines += [f"### {kind.__name__}", "", _first_line(kind), ""]
            lines += ["| field | type | meaning |", "|---|---|---|"]
            lines += _rows(kind, report)
            lines.append("")
    return "\n".join(lines)


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def _rows(kind: Any, report: Report) -> Iterator[str]:
    said = _attributes(kind)
    for field in dataclasses.fields(kind):
        if field.name not in report.omitted:
            choices, meaning = said.get(field.name, ("", ""))
            yield _row(field.name, choices or str(field.type), meaning)
    for name in report.derived.get(kind.__name__, ()):
        getter = getattr(kind, name).fget
        yield _row(name, str(inspect.get_annotations(getter)["return"]), _first_line(getter))


def _row(name: str, kind: str, meaning: str) -> str:
    """Give a row of a table, with the type as JSON has it."""
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list[\1]", kind).replace("Path", "str")
    plain = " ".join(meaning.split()).replace("|", "\\|")
    return f"| `{name}` | `{kind}` | {plain} |"


def _attributes(kind: type) -> dict[str, tuple[str, str]]:
    """Give what the docstring says of each attribute: its values where they are listed, and its meaning."""
    text = griffe.Docstring(inspect.getdoc(kind) or "")
    return {
        name: (
            str(each.annotation) if str(each.annotation).startswith("{") else "",
            each.description,
        )
        for section in griffe.parse_numpy(text, warnings=False)
        if section.kind is griffe.DocstringSectionKind.attributes
        for each in section.value
        for name in each.name.split(", ")  # numpydoc has several that share a line
    }


PARTS: Mapping[str, Callable[[], str]] = {
    "command line": command_line,
    "settings": settings,
    "report fields": report_fields,
}
"""Text by the name that pages ask for it with."""
