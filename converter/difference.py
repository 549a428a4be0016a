"""Two conversions side by side: what was asked, where it ran, what became of the layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import ConfigError

__all__ = ["Change", "Difference", "diff"]

LARGEST = 2**28
"""Bytes of the largest report that is read."""
DEEPEST = 32
"""Most lists and objects of a report that lie in each other."""


@dataclass(frozen=True)
class Change:
    """One thing that two runs do not have in common.

    Attributes
    ----------
    name : str
        A setting as "solver.iterations", a layer, or a figure.
    before, after : Any
        In the first and in the second run; None where a run does not have it.
    """

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Difference:
    """What two runs do not have in common, and their figures.

    Attributes
    ----------
    first, second : Path
        The reports.
    settings : tuple of Change
        What was asked for.
    machine : tuple of Change
        Processor, system and versions.
    hashes : tuple of Change
        SHA-256 of the source, the images and the result.
    layers : tuple of Change
        Layers that became something else, in words.
    figures : tuple of Change
        Sizes, times and the like, equal ones too: measured ones differ from run to run.
    """

    first: Path
    second: Path
    settings: tuple[Change, ...]
    machine: tuple[Change, ...]
    hashes: tuple[Change, ...]
    layers: tuple[Change, ...]
    figures: tuple[Change, ...]

    @property
    def alike(self) -> bool:
        """Whether nothing but figures differs."""
        return not (self.settings or self.machine or self.hashes or self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {"format": "twofold-difference-1", "alike": self.alike, **dataclasses.asdict(self)}


def diff(first: Path, second: Path) -> Difference:
    """Compare the reports of two conversions; see `converter.diff`."""
    paths = first, second
    one, other = (_report(path) for path in paths)
    return Difference(
        *paths,
        settings=_changes(_flat(one["settings"]), _flat(other["settings"])),
        machine=_changes(_flat(one["machine"]), _flat(other["machine"])),
        hashes=_changes(_hashes(one), _hashes(other)),
        layers=_changes(_layers(one), _layers(other)),
        figures=_changes(_figures(one), _figures(other), equal_too=True),
    )


_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_RULES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "format": {"type": "string", "pattern": "^twofold-conversion-[0-9]+$"},
        "settings": {"type": "object"},
        "machine": {"type": "object"},
        "calibration": {"type": "object"},
        "source_digest": _TEXT,
        "out_digest": _TEXT,
        "layers": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": _TEXT,
                    "scheme": _TEXT,
                    "ranks": {"type": "array"},
                    "support": _NUMBER,
                },
                "required": ["name", "scheme", "ranks", "support"],
            },
        },
        "stages": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"seconds": _NUMBER},
                "required": ["seconds"],
            },
        },
        "latency": {"type": ["object", "null"]},
        "answers": {"type": ["object", "null"]},
        "recovery": {"type": ["object", "null"]},
        "quantization": {"type": ["object", "null"]},
        "search": {"type": ["object", "null"]},
    },
    "required": [
        *("format", "settings", "machine", "calibration", "source_digest", "out_digest"),
        *("layers", "stages"),
    ],
}
"""What is read of a report."""


def _report(path: Path) -> dict[str, Any]:
    from jsonschema import Draft202012Validator

    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; correct the path") from error
    if len(data) > LARGEST:
        raise ConfigError(f"{path} is larger than {LARGEST} bytes; give a report of a conversion")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON; give a report of a conversion") from error
    if _deeper_than(content, DEEPEST):
        raise ConfigError(f"{path} is nested deeper than any report; give a report of a conversion")
    fault = next(Draft202012Validator(_RULES).iter_errors(content), None)
    if fault is not None:
        where = ".".join(map(str, fault.absolute_path)) or "its top"
        raise ConfigError(
            f"{path} is no report of a conversion, as {where} shows; give what `twofold convert` or "
            "`twofold run` wrote as --report"
        )
    found: dict[str, Any] = content
    return found


def _deeper_than(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` times; level by level."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _changes(
    one: Mapping[str, Any], other: Mapping[str, Any], *, equal_too: bool = False
) -> tuple[Change, ...]:
    names = dict.fromkeys([*one, *other])
    return tuple(
        Change(name, one.get(name), other.get(name))
        for name in names
        if equal_too or one.get(name) != other.get(name)
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Give nested settings as "solver.iterations"."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _hashes(report: Mapping[str, Any]) -> dict[str, Any]:
    images = {
        f"images of {name}": each.get("digest")
        for name, each in report["calibration"].items()
        if isinstance(each, Mapping) and "digest" in each
    }
    return {
        "source": report["source_digest"],
        "calibration images": report["calibration"].get("digest"),
        **images,
        "result": report["out_digest"],
    }


def _layers(report: Mapping[str, Any]) -> dict[str, str]:
    """Give what each layer became, as "sparse + channel 12, 30 channels"."""
    found = {}
    for layer in report["layers"]:
        ranks = "×".join(map(str, layer["ranks"]))
        channels = f"{layer['support']} channels" if layer["support"] else ""
        form = f"{layer['scheme']} {ranks}".strip()
        found[layer["name"]] = ", ".join(part for part in (form, channels) if part)
    return found


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: report.get(name)
        for name in ("macs_after", "macs_reduction", "params_after", "params_reduction")
    }
    found.update(_of(report.get("latency"), "original_ms", "converted_ms", "speedup"))
    off = _of(report.get("answers"), "error", "agreement")
    found.update({f"{name} of answers": value for name, value in off.items()})
    recovery = report.get("recovery") or {}
    for state in ("before", "after"):
        judged = _of(recovery.get(state), "loss", "agreement")
        found.update({f"{name} {state} recovery": value for name, value in judged.items()})
    found.update(_quantized_figures(report.get("quantization") or {}))
    found["seconds"] = sum(each["seconds"] for each in report["stages"])
    found["peak_memory_mib"] = report.get("peak_memory_mib")
    return {name: value for name, value in found.items() if value is not None}


def _quantized_figures(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Give the figures of a quantization, whose model may not be the one that was written."""
    found = {"quantized model written": quantization.get("shipped")}
    for state in ("before", "after"):
        judged = _of(quantization.get(state), "error", "agreement")
        judged["bytes"] = quantization.get(f"bytes_{state}")
        found.update({f"{name} {state} quantization": value for name, value in judged.items()})
    latency = _of(quantization.get("latency"), "quantized_ms", "speedup", "over_float")
    found["quantized_ms"] = latency.get("quantized_ms")
    for name, ratio in (("speedup", "speedup"), ("speedup over float", "over_float")):
        found[f"{name} after quantization"] = _of(latency.get(ratio), "ratio").get("ratio")
    alone = _of(_of(quantization.get("alone"), "speedup").get("speedup"), "ratio")
    found["speedup over the original quantized"] = alone.get("ratio")
    return found


def _of(part: Any, *names: str) -> dict[str, Any]:
    return {name: part.get(name) for name in names} if isinstance(part, Mapping) else {}
