"""What `tools.reference` has measured, row by row, and the page that is made of it.

Rows are kept in `docs/results.json`, each with the machine and the day it was measured on, so that one row
can be measured anew and the page be written again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from converter.output_file import write_text_atomically
from converter.runtime import machine

__all__ = ["Int8Row", "Results", "Row", "Run", "page", "this_machine"]


@dataclass(frozen=True)
class Published:
    """A paper's result on CIFAR-10, retrained with labels: percent that is gone, and top-1 change."""

    network: str
    method: str
    params: float
    macs: float
    change: float


PUBLISHED = (
    Published("VGG-16", "ALDS", 95.8, 86.2, -0.11),
    Published("VGG-16", "CHIP", 87.3, 78.6, -0.78),
    Published("ResNet-20", "ALDS", 74.9, 67.9, -0.47),
    Published("ResNet-20", "SPARK (sparse + low rank)", 70.4, 71.1, 1.25),
    Published("ResNet-56", "CHIP", 70.0, 74.1, -0.83),
    Published("ResNet-56", "SPARK (sparse + low rank)", 65.6, 66.0, 0.64),
)


@dataclass(frozen=True)
class Run:
    """Where and when a row was measured, and what a reader must know of it."""

    machine: str
    day: str
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """One conversion, measured.

    `off` is by how much the predicted latency was off. Where that is more than a tenth, `at_pace` is the same
    at the pace that the machine had by then (`Latency.pace`); None where it was not, or was not looked at.
    """

    model: str
    budget: str
    run: Run
    allowed: float | None
    macs: float
    params: float
    images: int
    before: float
    after: float
    error: float
    batch_1: str
    batch_32: str
    off: float
    seconds: float
    memory_mib: float
    at_pace: float | None = None

    @property
    def predicted(self) -> str:
        """Say how far the prediction was off, and how far at the pace of the measurement."""
        off = f"{100 * self.off:+.0f} %"
        return off if self.at_pace is None else f"{off} ({100 * self.at_pace:+.0f} %)"


@dataclass(frozen=True)
class Int8Row:
    """A conversion in int8, beside the original in float32 and in int8.

    Accuracies are in percent; `allowed` are the points that may be lost of the original's in int8. Speed-ups
    (batch 1, batch 32) are those of the quantized conversion; `file` is the size of the original in int8 over
    its own.
    """

    model: str
    budget: str
    run: Run
    images: int
    original: float
    original_int8: float
    converted_int8: float
    over_original: tuple[str, str]
    over_int8: tuple[str, str]
    asked: tuple[float, float]
    file: float
    settings: str
    seconds: float
    allowed: float | None = None


@dataclass
class Results:
    """All rows, by model and budget."""

    rows: dict[str, Row] = field(default_factory=dict)
    int8: dict[str, Int8Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` has written; nothing where the file is not there."""
        if not path.exists():
            return cls()
        kept = json.loads(path.read_text())
        return cls(
            {_key(each): Row(**_with_run(each)) for each in kept["rows"]},
            {_key(each): Int8Row(**_with_run(each)) for each in kept["int8"]},
        )

    def write(self, path: Path) -> None:
        """Keep the rows in a file."""
        kept = {
            "rows": [asdict(each) for each in self.rows.values()],
            "int8": [asdict(each) for each in self.int8.values()],
        }
        write_text_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['budget']}"


def _with_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values of a row as they are read, its run as such, and pairs as such."""
    plain = {name: tuple(each) if isinstance(each, list) else each for name, each in row.items()}
    return {**plain, "run": Run(**row["run"])}


def this_machine() -> str:
    """Describe in a line what times depend on: processor, vector unit, cores, versions."""
    import torch

    here = machine()
    vector = torch.backends.cpu.get_cpu_capability()
    versions = here["versions"]
    return (
        f"{here['processor']} ({vector}), {here['usable_cores']} cores; onnxruntime "
        f"{versions['onnxruntime']}, torch {versions['torch']}"
    )


def page(results: Results, asked: Mapping[str, bool]) -> str:
    """Write the page.

    Parameters
    ----------
    results : Results
    asked : mapping of str to bool
        What is asked for, by model and budget, in order; whether it is recovered.
    """
    order = {key: at for at, key in enumerate(asked)}
    rows = sorted(
        results.rows.values(),
        key=lambda row: (order.get(f"{row.model} {row.budget}", len(order)), row.model),
    )
    in_int8 = list(results.int8.values())
    runs = _Runs([*(row.run for row in rows), *(row.run for row in in_int8)])
    plain = [row for row in rows if "--recover" not in row.budget]
    recovered = [row for row in rows if "--recover" in row.budget]
    lines = [
        "# Results",
        "",
        "Written by `python -m tools.reference`; every row is one `twofold convert` on the calibration",
        "images and one `twofold validate` on the validation images. `make reference` measures them on",
        "your machine, into `references/results.md`.",
        "",
        "- Calibration: 2,000 unlabelled training images. Accuracy: top-1 on the validation images, with the",
        "  standard error of the paired difference. No number was swept on them, but the trials behind the",
        "  main designs (`docs/adr`) ran on ResNet-20 and VGG-16 with these images in sight.",
        "- Speed-up: median ratio of interleaved runs, two threads, with its 95 % interval.",
        "  Predicted: latency of the converted model as planned over as measured, less 1. Where that is more",
        "  than a tenth, the plan is timed once more as it was when it was made, with random weights; in",
        "  brackets, what is off at that pace.",
        "  Seconds and memory: the whole program `twofold convert`.",
        "- Allowed, asked: the project's own goals, which the program does not enforce; some rows miss them.",
        *runs.legend(),
        "",
        "## Converted, nothing retrained",
        "",
        *_table(plain, runs),
        *_not_run(asked, results, recovered=False),
        "",
        "## Recovered without labels, beside what is published",
        "",
        "Written by `python -m tools.reference --recovered`: the same with `--recover`, which learns from",
        "50,000 images without their labels for the time that is given.",
        "",
        *_table(recovered, runs),
        *_not_run(asked, results, recovered=True),
        "",
        *_published_lines(recovered),
    ]
    if in_int8:
        lines += _int8_lines(in_int8, runs)
    return "\n".join(lines) + "\n"


class _Runs:
    """Machines as letters and remarks as numbers, in the order of their appearance."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._machines = list(dict.fromkeys(run.machine for run in runs))
        self._remarks = list(dict.fromkeys(run.remark for run in runs if run.remark))

    def __getitem__(self, run: Run) -> str:
        remark = f" [{self._remarks.index(run.remark) + 1}]" if run.remark else ""
        return f"{self._letter(run.machine)} {run.day}{remark}"

    def _letter(self, name: str) -> str:
        return chr(ord("A") + self._machines.index(name))

    def legend(self) -> list[str]:
        """Say what the letters and numbers stand for."""
        return [
            "- Run: the machine, the day, and a remark. "
            + " ".join(f"{self._letter(name)}: {name}." for name in self._machines),
            *(f"- [{at}] {remark}" for at, remark in enumerate(self._remarks, 1)),
        ]


def _table(rows: Sequence[Row], runs: _Runs) -> list[str]:
    lines = [
        "| model | asked for | MACs ÷ | params ÷ | images | top-1 before | after | change | allowed | "
        "speed-up, batch 1 | batch 32 | predicted | seconds | peak MiB | run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | `{row.budget}` | {row.macs:.2f} | {row.params:.2f} | {row.images:,} | "
            f"{row.before:.2f} % | {row.after:.2f} % | {row.after - row.before:+.2f} ± {row.error:.2f} | "
            f"{_least(row.allowed)} | {row.batch_1} | {row.batch_32} | {row.predicted} | "
            f"{row.seconds:.0f} | {row.memory_mib:,.0f} | {runs[row.run]} |"
        )
    return lines if rows else []


def _least(allowed: float | None) -> str:
    """Say what a change must be at least, where so many points may be lost."""
    return "–" if allowed is None else f"≥ −{allowed:g}" if allowed else "≥ 0"


def _not_run(asked: Mapping[str, bool], results: Results, *, recovered: bool) -> list[str]:
    missing = [
        f"{key.replace(' --', ' `--', 1)}`"
        for key, is_recovered in asked.items()
        if key not in results.rows and is_recovered == recovered
    ]
    return ["", f"Not run yet: {', '.join(missing)}."] if missing else []


def _published_lines(recovered: Sequence[Row]) -> list[str]:
    """Set our rows beside those of papers, in their terms: what is gone in percent."""
    ours = [
        (row.model, f"Twofold, `{row.budget}`", "none", 1 - 1 / row.params, 1 - 1 / row.macs,
         f"{row.after - row.before:+.2f} ± {row.error:.2f}")
        for row in recovered
    ]  # fmt: skip
    theirs = [
        (
            each.network,
            each.method,
            "yes",
            each.params / 100,
            each.macs / 100,
            f"{each.change:+.2f}",
        )
        for each in PUBLISHED
    ]
    lines = [
        "In the terms of published results on CIFAR-10, which are retrained with labels, for far longer,",
        "from networks of their own (these images are recompressed: compare changes, not accuracies):",
        "",
        "| model | by | labels | parameters | MACs | top-1 change |",
        "|---|---|---|---|---|---|",
    ]
    for model, method, labels, params, macs, change in sorted(
        [*ours, *theirs], key=lambda each: each[0], reverse=True
    ):
        lines.append(
            f"| {model} | {method} | {labels} | −{100 * params:.1f} % | −{100 * macs:.1f} % | {change} |"
        )
    return lines


def _int8_lines(rows: Sequence[Int8Row], runs: _Runs) -> list[str]:
    lines = [
        "",
        "## In int8",
        "",
        "Written by `python -m tools.reference --int8`: conversions that end in int8, and the original by",
        "`twofold quantize --int8 --batch 32`. Where a row does not say `--int8`, that was done to a float",
        "conversion afterwards, and the seconds are of that alone. Speed-ups are over the original in",
        "float32 and in int8; file: the original in int8 over it; change: from the original in int8.",
        "",
        "| model | converted by | images | top-1 float32 | original int8 | converted int8 | change | "
        "allowed | over float32, batch 1 | batch 32 | over int8, batch 1 | asked | batch 32 | asked | "
        "file ÷ | seconds | settings | run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (slow, fast), (one, many) = row.over_original, row.over_int8
        lines.append(
            f"| {row.model} | `{row.budget}` | {row.images:,} | {row.original:.2f} % | "
            f"{row.original_int8:.2f} % | {row.converted_int8:.2f} % | "
            f"{row.converted_int8 - row.original_int8:+.2f} | {_least(row.allowed)} | {slow} | {fast} | "
            f"{one} | ≥ {row.asked[0]:g} | {many} | ≥ {row.asked[1]:g} | {row.file:.2f} | "
            f"{row.seconds:.0f} | {row.settings} | {runs[row.run]} |"
        )
    return lines
