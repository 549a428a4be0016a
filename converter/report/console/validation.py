"""Two models side by side, and whether gates were passed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from converter.report.console.output import (
    headed,
    output_console,
    print_lines,
    print_notes,
    print_written,
    texts,
)
from converter.report.words import count, factor, mebibytes, signed_points

if TYPE_CHECKING:
    from converter.gates import Verdict
    from converter.validation.findings import Latency, OutputComparison, Validation

__all__ = ["print_validation", "print_verdict"]


def print_validation(validation: Validation, console: Console | None = None) -> None:
    """Print the two models side by side, and how far their outputs differ."""
    console = console or output_console()
    table = headed("", ">original", ">converted", ">change")
    for cells in _comparison_rows(validation):
        table.add_row(*texts(cells))
    console.print(table)
    outputs = headed("output", ">max error", ">mean", ">p99", ">max, of range", ">L2, relative")
    for each in validation.outputs:
        outputs.add_row(*texts(_output_cells(each)))
    console.print(outputs)
    lines = [f"images      {validation.images:,}"]
    if validation.agreement is not None:
        agreement = validation.agreement
        top5 = "" if agreement.top5 is None else f", top-5 {agreement.top5:.2%}"
        lines.append(f"agreement   top-1 {agreement.top1:.2%}{top5}, without labels")
    print_lines(console, [*lines, *_timed(validation)])
    print_notes(console, validation.notes)


def _comparison_rows(validation: Validation) -> Iterator[list[str]]:
    before, after = validation.original, validation.converted
    yield [
        "size",
        mebibytes(before.bytes),
        mebibytes(after.bytes),
        factor(validation.bytes_reduction),
    ]
    yield [
        "parameters",
        count(before.params),
        count(after.params),
        factor(validation.params_reduction),
    ]
    yield ["MACs", count(before.macs), count(after.macs), factor(validation.macs_reduction)]
    if validation.accuracy is not None:
        accuracy = validation.accuracy
        yield [
            "accuracy",
            f"{accuracy.original:.2%}",
            f"{accuracy.converted:.2%}",
            signed_points(accuracy.drop_points, accuracy.standard_error_points),
        ]
    for latency in validation.latencies:
        yield from _latency_row(latency)


def _latency_row(latency: Latency) -> Iterator[list[str]]:
    original, converted, ratio = latency.original, latency.converted, latency.speedup
    if original is None or converted is None or ratio is None:
        return
    yield [
        f"latency, batch {latency.batch}",
        f"{original.median_ms:.3f} ms",
        f"{converted.median_ms:.3f} ms",
        f"speed-up {ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
    ]


def _timed(validation: Validation) -> Iterator[str]:
    """Say how it was timed, and what was not."""
    timing = next((each.original for each in validation.latencies if each.original), None)
    if timing is not None:
        yield (
            f"latency     median of runs in turns, {timing.provider}, threads: {timing.threads}; "
            "speed-up with its 95 % interval"
        )
    for each in validation.latencies:
        if each.skipped is not None:
            yield f"batch {each.batch}: not timed, {each.skipped}"


def _output_cells(output: OutputComparison) -> list[str]:
    numbers = (output.max_abs, output.mean_abs, output.p99_abs)
    shares = (output.max_relative, output.relative_l2)
    return [
        output.name,
        *("–" if number is None else f"{number:.3g}" for number in numbers),
        *("–" if share is None else f"{share:.3%}" for share in shares),
    ]


def print_verdict(
    verdict: Verdict, files: Sequence[Path] = (), console: Console | None = None
) -> None:
    """Print each gate on a line, and where the files lie."""
    console = console or output_console()
    table = headed("|gate", "wanted", ">found", "|", "")
    for gate in verdict.gates:
        table.add_row(
            *texts([gate.name, gate.bound, gate.figure, gate.status, gate.detail]),
            style="" if gate.passed else "bold red",
        )
    console.print(table)
    print_lines(console, [f"images      {verdict.validation.images:,}"])
    print_notes(console, verdict.validation.notes)
    print_written(files, console)
