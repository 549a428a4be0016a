"""A report as a page: one HTML file that needs nothing else, made of what the JSON reports hold.

The page is a function of these reports alone, so that any that was saved can be shown later. Everything
in them is escaped. The page names no other file and asks no network: its style and its script are
within, and its content security policy lets the browser run these two and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from converter.errors import ConfigError
from converter.output_file import write_text_atomically
from converter.report.page.front import show_front
from converter.report.page.layers import show_depth, show_layers
from converter.report.page.made import show_made, show_passes, show_recovery
from converter.report.page.quantization import show_quantization
from converter.report.page.record import COMPARISONS, Record, kind_of, read_report
from converter.report.page.seen import show_outputs, show_worst
from converter.report.page.verdict import figures, read_gates, verdict

__all__ = ["read_report", "render_page", "write_page"]


def write_page(
    path: Path,
    report: Mapping[str, Any],
    *,
    validation: Mapping[str, Any] | None = None,
) -> None:
    """Render a page and write it, whole or not at all.

    Parameters
    ----------
    path : Path
    report, validation
        As for `render_page`.

    Raises
    ------
    ConfigError
        As `render_page`, or where the file cannot be written.
    """
    write_text_atomically(path, render_page(report, validation=validation))


def render_page(
    report: Mapping[str, Any],
    *,
    validation: Mapping[str, Any] | None = None,
) -> str:
    """Make a page of reports.

    Parameters
    ----------
    report : mapping
        What `convert`, `plan`, `validate` or `check` wrote as JSON, as `read_report` gives it.
    validation : mapping or None, default None
        What `validate` or `check` wrote of the model that `report` is about.

    Returns
    -------
    str
        An HTML document.

    Raises
    ------
    ConfigError
        Where a report is of none of these, or the validation compared other models.
    """
    kind = kind_of(report, "the report")
    run, compared = Record(report), Record(validation)
    if validation is not None and (
        kind in COMPARISONS or kind_of(validation, "the validation") not in COMPARISONS
    ):
        raise ConfigError(
            "a page takes a report of convert or plan, and beside it one of validate or check; give "
            "them so"
        )
    if kind in COMPARISONS:
        run, compared = Record(), run
    gates = read_gates(compared.records("gates"))
    compared = compared.record("validation") or compared  # `check` holds what it judged
    if validation is not None:
        _check_same(run, compared)
    style, script = _asset("page.css"), _asset("page.js")
    return _template().render(
        kind=kind,
        name=_name(run, compared),
        style=Markup(style),  # a file of this package
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        verdict=verdict(run, compared, gates),
        figures=figures(run, compared),
        gates=gates,
        notes=(
            *run.texts("notes"),
            *run.record("quantization").texts("notes"),
            *compared.texts("notes"),
        ),
        front=show_front(run),
        depth=show_depth(run),
        layers=show_layers(run),
        worst=show_worst(compared),
        outputs=show_outputs(compared),
        made=(
            *filter(None, (show_recovery(run), show_quantization(run))),
            *show_made(run, compared),
        ),
        passes=show_passes(run),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html")


def _check_same(run: Record, validation: Record) -> None:
    """Refuse a validation of other models; a report without digests cannot tell."""
    for digest, role in (("source_digest", "original"), ("out_digest", "converted")):
        made, seen = run.text(digest), validation.record(role).text("digest")
        if made and seen and made != seen:
            raise ConfigError(
                f"the validation compared another {role} model than the one of the report; validate "
                "the models of the report"
            )


def _name(run: Record, validation: Record) -> tuple[str, str]:
    """Name the files of both models; "" where one is not known."""
    before = run.text("source") or validation.record("original").text("file")
    after = run.text("out") or validation.record("converted").text("file")
    return _last(before), _last(after)


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression of a content security policy that allows just this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
