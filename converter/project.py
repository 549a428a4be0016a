"""`twofold.toml`: the options of `twofold run` in a file beside the model.

There is one list of settings, the options of the command line. Whatever is an option of `run` is a key of
the file, in a table by the heading that `--help` shows it under; gates are keys of the table `gates`. The
schema that editors complete by is made of that list, and is also what a file is checked by.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from converter.config import Gates, nearest
from converter.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema import ValidationError as Fault

    from converter.inspection import Inspection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "PROJECT_FILE",
    "SCHEMA_FILE",
    "Setting",
    "read_project",
    "schema",
    "settings_of",
    "starter",
]

PROJECT_FILE = "twofold.toml"
SCHEMA_FILE = "twofold.schema.json"
LARGEST = 2**20
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class Setting:
    """One key of `twofold.toml`.

    Attributes
    ----------
    name : str
        Of the key, and of the option where `-` stands for `_`.
    table : str
        "" for those at the top.
    kind : type
        bool, int, float, str or Path; what an option of that name is read as.
    metavar : str or None
        What the option's help shows: "cpu|cuda" lists all values, "NAME,NAME" is a list.
    description : str
    default : bool, int, float, str or None
    gate : bool, default False
        Whether it is a gate rather than an option.
    """

    name: str
    table: str
    kind: type
    metavar: str | None
    description: str
    default: Any
    gate: bool = False


def settings_of(command: Callable[..., None], tables: Mapping[str, str]) -> tuple[Setting, ...]:
    """List the options of a command as keys, and gates in place of its option `gate`.

    Parameters
    ----------
    command : callable
        Its parameters are `Annotated` with what typer shows.
    tables : mapping of str to str
        Table by the heading of an option, for every heading that there is.
    """
    found: list[Setting] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in _TYPED_ONLY:
            continue
        hint, shown = get_args(parameter.annotation)[:2]
        heading = shown.rich_help_panel
        table = tables[heading] if heading else ""
        if name == "gate":
            found += _gates(table)
            continue
        kind = next((each for each in get_args(hint) if each is not type(None)), hint)
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        found.append(Setting(name, table, kind, shown.metavar, shown.help or "", default))
    order = ["", *tables.values()]
    return tuple(sorted(found, key=lambda each: order.index(each.table)))


_TYPED_ONLY = ("config", "quiet")
"""Options that say nothing about a project."""


def _gates(table: str) -> Iterator[Setting]:
    """Give one key for each gate, with its description from the docstring."""
    said = inspect.getdoc(Gates) or ""
    for each in fields(Gates):
        found = re.search(rf"^{each.name} : .*\n((?:    .*\n?)+)", said, re.MULTILINE)
        text = " ".join(found[1].split()) if found else ""
        yield Setting(each.name, table, float, None, text, None, gate=True)


# Reading -----------------------------------------------------------------------------------------


def read_project(path: Path, settings: Sequence[Setting]) -> dict[str, Any]:
    """Read the file as values of options.

    Parameters
    ----------
    path : Path
        Paths in the file are relative to its folder.
    settings : sequence of Setting
        All that the file may hold.

    Returns
    -------
    dict of str to Any
        By option, as if it were typed; "gate" lists gates as "min_speedup=1.8".

    Raises
    ------
    ConfigError
        Where the file cannot be read, a key is unknown, or a value is of the wrong kind.
    """
    content = _parsed(path)
    _check(content, schema(settings), path)
    values: dict[str, Any] = {}
    gates: list[str] = []
    for setting in settings:
        table = content.get(setting.table, {}) if setting.table else content
        if setting.name not in table:
            continue
        value = table[setting.name]
        if setting.gate:
            gates.append(f"{setting.name}={value}")
        else:
            values[setting.name] = _typed(value, setting, path.parent)
    if gates:
        values["gate"] = gates
    return values


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; `twofold init MODEL` writes one, and --config "
            "names another"
        ) from error
    if len(data) > LARGEST:
        raise ConfigError(f"{path} is larger than {LARGEST} bytes; settings are shorter")
    try:
        content: dict[str, Any] = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # TOML and UTF-8
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is no TOML: {reason}; correct it") from error
    return content


def _check(content: Mapping[str, Any], rules: Mapping[str, Any], path: Path) -> None:
    """Refuse the first key that is unknown or whose value is of another kind."""
    from jsonschema import Draft202012Validator

    for fault in Draft202012Validator(rules).iter_errors(content):
        where = ".".join(map(str, fault.absolute_path))
        if fault.validator == "additionalProperties":
            raise ConfigError(f"{path}: {_unknown(fault, where, rules)}")
        wanted = fault.schema
        if "items" in fault.relative_schema_path:  # the list's own rule says more than its item's
            where = ".".join(str(part) for part in fault.absolute_path if isinstance(part, str))
        raise ConfigError(
            f"{path}: {where} is {_shown(fault.instance)}, and {_wanted(wanted)} is wanted; correct it"
        )


def _unknown(fault: Fault, where: str, rules: Mapping[str, Any]) -> str:
    """Say what is meant by a key that is not known: one of the same table, or of another."""
    known = fault.schema["properties"]
    name = next(key for key in fault.instance if key not in known)
    place = f" in [{where}]" if where else ""
    homes = _homes(rules)
    if name in homes:
        return f"the key {name!r}{place} belongs {_home(homes[name])}; move it there"
    near = nearest(name, known) if where else nearest(name, [*known, *homes])
    near = near or nearest(name, homes)
    if near is None:
        return f"there is no key {name!r}{place}; give one of {', '.join(known)}"
    elsewhere = "" if near in known else f", {_home(homes[near])}"
    return f"there is no key {name!r}{place}; did you mean {near!r}{elsewhere}?"


def _home(table: str) -> str:
    return f"into [{table}]" if table else "to the top, before all tables"


def _homes(rules: Mapping[str, Any]) -> dict[str, str]:
    """Table of each key."""
    homes: dict[str, str] = {}
    for name, rule in rules["properties"].items():
        if rule.get("type") == "object":
            homes.update(dict.fromkeys(rule["properties"], name))
        else:
            homes[name] = ""
    return homes


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text in quotes",
    "array": "a list",
    "object": "a table",
}


def _wanted(rule: Mapping[str, Any]) -> str:
    if "enum" in rule:
        return "one of " + ", ".join(rule["enum"])
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    return " or ".join(_WORDS[kind] for kind in kinds)


def _typed(value: Any, setting: Setting, folder: Path) -> Any:
    """Give a value as it would be typed."""
    if setting.kind is Path:
        return str(folder / value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value


# The schema --------------------------------------------------------------------------------------


def schema(settings: Sequence[Setting]) -> dict[str, Any]:
    """Describe the file as JSON Schema, draft 2020-12."""
    properties: dict[str, Any] = {}
    for setting in settings:
        place = properties
        if setting.table:
            table = properties.setdefault(
                setting.table, {"type": "object", "additionalProperties": False, "properties": {}}
            )
            place = table["properties"]
        place[setting.name] = _rule(setting)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": PROJECT_FILE,
        "description": "Settings of `twofold run` and `twofold check`.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _rule(setting: Setting) -> dict[str, Any]:
    rule: dict[str, Any] = {"description": setting.description, **_type_of(setting)}
    if setting.default is not None:
        rule["default"] = setting.default
    return rule


def _type_of(setting: Setting) -> dict[str, Any]:
    plain = {bool: "boolean", int: "integer", float: "number"}.get(setting.kind)
    if plain is not None:
        return {"type": plain}
    metavar = setting.metavar or ""
    if re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", metavar):
        return {"type": "string", "enum": metavar.split("|")}
    if "," in metavar:
        items = {"type": ["string", "number"]}
        return {"type": ["string", "array"], "items": items}
    if metavar.startswith("H["):  # 224 as well as "224x256"
        return {"type": ["string", "integer"]}
    return {"type": "string"}


# A first file ------------------------------------------------------------------------------------


def starter(
    inspection: Inspection,
    model: str,
    settings: Sequence[Setting],
    *,
    size: tuple[int, int] | None = None,
) -> str:
    """Write a first file for a model: what must be said, and all else as comments.

    Parameters
    ----------
    inspection : Inspection
    model : str
        Its path from the file's folder, with `/`.
    settings : sequence of Setting
    size : tuple of (int, int) or None, default None
        Height and width of the images, where the model leaves them free.
    """
    stem = model.removesuffix(".onnx")
    given: dict[tuple[str, str], Any] = {
        ("", "model"): model,
        ("", "calib"): "calib",
        ("", "out"): f"{stem}-fast.onnx",
        ("budget", "speedup"): 2.0,
        ("gates", "data"): "val",
        ("gates", "min_speedup"): 1.5,
        ("gates", "min_agreement"): 97.0,
    }
    given.update({("preprocessing", name): value for name, value in _layout(inspection).items()})
    if size is not None:
        given["preprocessing", "size"] = f"{size[0]}x{size[1]}"
    lines = [f"#:schema ./{SCHEMA_FILE}", "#", *_facts(inspection), "#"]
    lines += [
        "# Paths are relative to this file. What is commented out has the value that is shown, or none.",
        "# Options of `twofold run` override it. Say at least where the images are, and under",
        "# [preprocessing] how they were prepared in training.",
    ]
    table = ""
    for setting in settings:
        if setting.table != table:
            table = setting.table
            lines += ["", f"[{table}]"]
        said = setting.description + (f" ({setting.metavar})" if setting.metavar else "")
        lines += ["", *(f"# {line}" for line in textwrap.wrap(said, 98))]
        value = given.get((table, setting.name))
        if value is not None:
            lines.append(f"{setting.name} = {_toml(value)}")
        else:
            lines.append(f"# {setting.name} = {_toml(setting.default)}".rstrip())
    return "\n".join(lines) + "\n"


def _facts(inspection: Inspection) -> Iterator[str]:
    """Say what the model is."""
    for each in inspection.inputs:
        sides = "×".join("?" if side is None else str(side) for side in each.shape or ())
        yield f"# input {_comment(each.name)}: {each.dtype} {sides}"
    yield (
        f"# {len(inspection.convertible)} of {len(inspection.layers)} layers can be converted; "
        f"{inspection.macs / 1e6:,.3g} M multiply-accumulates, "
        f"{inspection.params / 1e6:,.3g} M parameters"
    )


def _layout(inspection: Inspection) -> dict[str, str]:
    """Read off the input what it tells of layout and channels."""
    if len(inspection.inputs) != 1:
        return {}
    shape = inspection.inputs[0].shape or ()
    if len(shape) != 4:
        return {}
    found = {}
    channels = shape[1]
    if shape[1] not in (1, 3) and shape[3] in (1, 3):
        found["layout"], channels = "nhwc", shape[3]
    if channels == 1:
        found["channels"] = "gray"
    return found


def _comment(text: str) -> str:
    """Keep a name from a model file on one line of comment."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _toml(value: Any) -> str:
    """Write a value as TOML; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + _comment(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
