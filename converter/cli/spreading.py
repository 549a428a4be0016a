"""Groups of options: dataclasses that become one option of a command for each of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar, get_type_hints

__all__ = ["extending", "group", "grouped"]

_T = TypeVar("_T")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread each parameter that is a dataclass into one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters = []
    for name, given in signature(command).parameters.items():
        if name not in groups:
            plain = given.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters.append(plain)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        parameters += [
            Parameter(
                each.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if each.default is MISSING else each.default,
                annotation=types[each.name],
            )
            for each in fields(groups[name])
        ]

    @wraps(command)
    def spread(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{each.name: values.pop(each.name) for each in fields(kind)})
        command(**values)

    _show(spread, parameters)
    return spread


def extending(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options of another one too; it gets them together, as `asked`."""

    def extended(command: Callable[..., None]) -> Callable[..., None]:
        taken = signature(base).parameters
        own = [each for name, each in signature(command).parameters.items() if name != "asked"]

        @wraps(command)
        def spread(**values: Any) -> None:
            command(asked={name: values.pop(name) for name in taken}, **values)

        _show(spread, [*taken.values(), *own])
        return spread

    return extended


def _show(command: Any, parameters: list[Parameter]) -> None:
    """Let typer read these parameters."""
    command.__signature__ = Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}


def group(kind: type[_T], values: dict[str, Any]) -> _T:
    """Make a group of options of those that a command was given."""
    return kind(**{name: values[name] for name in signature(kind).parameters})
