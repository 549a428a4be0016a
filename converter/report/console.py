"""Tables and progress on the terminal; plain lines where it is none.

Tables go to standard output, progress and messages to standard error, so that either can be
redirected by itself. Names come from files that nobody vouches for: whatever is not printable in
them is replaced, and nothing in them is taken for markup.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from converter.progress import Advance
from converter.report.words import (
    count,
    effect,
    factor,
    mebibytes,
    milliseconds,
    printable,
    shape,
    signed_points,
    visible,
)

if TYPE_CHECKING:
    from converter.difference import Change, Difference
    from converter.front import Front, FrontPoint
    from converter.gates import Verdict
    from converter.inspection import Inspection
    from converter.outcome import Conversion, Latency, LayerOutcome, Probe, Search
    from converter.quantization.quantizing import Quantized
    from converter.refine.recovery import Recovered
    from converter.validation.findings import Latency as Comparison
    from converter.validation.findings import OutputComparison, Validation

__all__ = [
    "ConsoleProgress",
    "output_console",
    "print_conversion",
    "print_difference",
    "print_front",
    "print_inspection",
    "print_message",
    "print_quantization",
    "print_recovery",
    "print_validation",
    "print_verdict",
    "print_written",
    "printable",
]

_PIPE_WIDTH = 240
"""Columns where output is no terminal: enough that no table is folded."""
_QUIET_SECONDS = 10.0
"""Where there is no terminal, a long stage says how far it is this often."""
_LOOK_BACK_SECONDS = 3600.0


def output_console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or error as it is now."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_message(text: str) -> None:
    """Print one line to standard error, never folded."""
    output_console(stderr=True).print(Text(f"twofold: {printable(text)}"), soft_wrap=True)


# Progress ------------------------------------------------------------------------------------


class ConsoleProgress:
    """Shows stages as they go: bars on a terminal, a few plain lines elsewhere.

    Parameters
    ----------
    console : Console
        Where to; `output_console(stderr=True)` as a rule.
    clock : callable, default time.monotonic
        Seconds that go on.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Show a stage of `total` steps; one may be opened within another.

        A stage of one step gets a line on a terminal too: bars are drawn by a thread, and such a
        stage may be a timing, which nothing must disturb.
        """
        shown = self._bar if self._console.is_terminal and total > 1 else self._lines
        with shown(printable(title), total) as advance:
            yield advance

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Advance]:
        with self._live() as bars:
            task = bars.add_task(title, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                bars.update(task, advance=steps, note=printable(note))

            yield advance
            bars.update(task, completed=total, note="")

    @contextmanager
    def _live(self) -> Iterator[Progress]:
        """Give the bars that are shown now; a stage within another shares them."""
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
        )
        # a layer may take minutes: the estimate looks back further than that
        with Progress(
            *columns, console=self._console, speed_estimate_period=_LOOK_BACK_SECONDS
        ) as self._bars:
            try:
                yield self._bars
            finally:
                self._bars = None

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Advance]:
        begun = said = self._clock()
        done = 0
        self._line(f"{title} ...")

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done, said
            done += steps
            now = self._clock()
            if now - said >= _QUIET_SECONDS:
                said = now
                left = f", {_duration((now - begun) / done * (total - done))} left" if done else ""
                self._line(f"{title}: {done}/{total}{left} {printable(note)}".rstrip())

        yield advance
        self._line(f"{title}: done in {self._clock() - begun:.1f} s")

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


# Tables --------------------------------------------------------------------------------------


def print_conversion(
    conversion: Conversion, reports: Sequence[Path] = (), console: Console | None = None
) -> None:
    """Print what became of each layer, of the whole, and where the files lie."""
    console = console or output_console()
    sparse = any(layer.support for layer in conversion.layers)
    table = _table(
        *("layer", "weight", "scheme", ">rank", *([">channels"] if sparse else [])),
        *(">MACs", ">after", ">error", "status"),
    )
    for layer in conversion.layers:
        table.add_row(*_texts(_layer_cells(layer, sparse=sparse)))
    console.print(table)
    _print_lines(console, list(_kept_lines(conversion.layers)))
    if conversion.search is not None:
        _print_search(console, conversion.search)
    _print_lines(
        console,
        [
            *_latency_lines(conversion.latency),
            *_recovery_lines(conversion.recovery),
            f"MACs        {count(conversion.macs_before)} → {count(conversion.macs_after)}"
            f"  (÷ {conversion.macs_reduction:.2f})",
            f"parameters  {count(conversion.params_before)} → {count(conversion.params_after)}"
            f"  (÷ {conversion.params_reduction:.2f})",
            f"took        {sum(stage.seconds for stage in conversion.stages):.1f} s, "
            f"{conversion.peak_memory_mib:,.0f} MiB of memory at most",
            "error: squared error of the layer's response after its activation, relative to the "
            "response, on patches that the fit did not see",
        ],
    )
    if conversion.quantization is not None:
        _print_quantization(console, conversion.quantization)
    _print_notes(console, conversion.notes)
    files = [f"report      {path}" for path in reports]
    _print_lines(console, [f"model       {conversion.out}", *files])


def print_recovery(recovered: Recovered, out: Path, console: Console | None = None) -> None:
    """Print what a recovery has come to, and where the model lies."""
    console = console or output_console()
    lines = list(_recovery_lines(recovered.to_dict()))
    if not recovered.improved:
        lines.append("            the model was written as it was given")
    _print_lines(console, lines)
    _print_notes(console, recovered.notes)
    _print_lines(console, [f"model       {out}"])


def _recovery_lines(recovery: Mapping[str, Any] | None) -> Iterator[str]:
    """Say how far the model was from its original on the held-out images, before and after."""
    if recovery is None:
        return
    before, after = recovery["before"], recovery["after"]
    agreement = ""
    if before["agreement"] is not None:
        agreement = (
            f", the same best class for {100 * before['agreement']:.2f} → "
            f"{100 * after['agreement']:.2f} %"
        )
    verdict = "" if recovery["improved"] else " (not better: nothing was changed)"
    yield (
        f"recovered   loss {before['loss']:.4g} → {after['loss']:.4g}{agreement} of "
        f"{recovery['held_out']:,} held-out images{verdict}"
    )
    yield (
        f"            {recovery['epochs']:.1f} epochs of {recovery['images']:,} images in "
        f"{recovery['seconds']:.0f} s, {recovery['precision']}: {recovery['status']}"
    )


def print_quantization(quantized: Quantized, out: Path, console: Console | None = None) -> None:
    """Print what was tried, what a quantization has come to, and where the model lies."""
    console = console or output_console()
    _print_quantization(console, quantized.to_dict())
    _print_lines(console, [f"model       {out}"])


def _print_quantization(console: Console, quantized: Mapping[str, Any]) -> None:
    timed = any(trial["time"] is not None for trial in quantized["trials"])
    table = _table(
        *("quantized", ">in float", ">error", ">same class"), *([">time"] if timed else [])
    )
    for trial in quantized["trials"]:
        table.add_row(*_texts(_trial_cells(trial)[: len(table.columns)]))
    console.print()
    console.print(table)
    beside = "error, same class and time are beside the float model"
    _print_lines(console, [beside, "", *_quantization_lines(quantized)])
    _print_notes(console, quantized["notes"])


def _trial_cells(trial: Mapping[str, Any]) -> list[str]:
    agreement, time = trial["agreement"], trial["time"]
    return [
        trial["name"],
        str(trial["left"] or "–"),
        effect(trial["error"]),
        "–" if agreement is None else f"{100 * agreement:.1f} %",
        "–" if time is None else f"× {time:.2f}",
    ]


def _quantization_lines(quantized: Mapping[str, Any]) -> Iterator[str]:
    """Say in what form the model is, how far that is from the original, and what it takes."""
    how = quantized["precision"]
    if quantized["types"]:
        how += (
            f", activations × weights {quantized['types']}, ranges by {quantized['ranges']} of "
            f"{quantized['images']:,} images"
        )
    verdict = "" if quantized["shipped"] else " (not written)"
    yield f"quantized   {how}{verdict}"
    if quantized["balanced"]:
        yield f"balanced    channels between factors, {quantized['balanced']} times"
    if quantized["left"]:
        names = [printable(name) for each in quantized["left"] for name in each["layers"]]
        yield f"in float    {len(names)} of {quantized['layers']} layers: {', '.join(names)}"
    before, after = quantized["before"], quantized["after"]
    agreement = ""
    if before["agreement"] is not None and after["agreement"] is not None:
        agreement = (
            f", the same best class for {100 * before['agreement']:.2f} → "
            f"{100 * after['agreement']:.2f} %"
        )
    yield (
        f"off by      {effect(before['error'])} → {effect(after['error'])} from the original"
        f"{agreement} of {quantized['held_out']:,} held-out images"
    )
    small, large = quantized["bytes_after"], quantized["bytes_before"]
    yield f"size        {large / 2**20:.2f} → {small / 2**20:.2f} MiB  (÷ {large / small:.2f})"
    latency = quantized["latency"]
    if latency is None:
        return
    yield (
        f"latency     original {milliseconds(latency['original_ms'])}, "
        f"float {milliseconds(latency['float_ms'])}, "
        f"quantized {milliseconds(latency['quantized_ms'])}  "
        f"(batch {latency['batch']}, {latency['provider']}, {_threads(latency['threads'])})"
    )
    yield (
        f"            {_times(latency['speedup'])} times as fast as the original, "
        f"{_times(latency['over_float'])} times as the float model"
    )


def _times(gained: Mapping[str, float]) -> str:
    return f"{gained['ratio']:.2f} ({gained['low']:.2f}–{gained['high']:.2f})"


def _layer_cells(layer: LayerOutcome, *, sparse: bool) -> list[str]:
    channels = f"{layer.support}/{layer.shape[1]}" if layer.support else "–"
    return [
        layer.name,
        shape(layer.shape),
        layer.scheme,
        "×".join(map(str, layer.ranks)) or "–",
        *([channels] if sparse else []),
        count(layer.macs_before),
        count(layer.macs_after),
        "–" if layer.error is None else f"{100 * layer.error:.3g} %",
        layer.status,
    ]


def _kept_lines(layers: Iterable[LayerOutcome]) -> Iterator[str]:
    """Say why layers were kept, each reason once."""
    kept: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason is not None:
            kept.setdefault(layer.reason, []).append(printable(layer.name))
    for reason, names in kept.items():
        yield f"kept        {', '.join(names)}: {printable(reason)}"


def _latency_lines(latency: Latency | None) -> Iterator[str]:
    if latency is None:
        return
    yield (
        f"latency     {milliseconds(latency.original_ms)} → {milliseconds(latency.converted_ms)}"
        f"  ({latency.speedup:.2f} times faster, {latency.low:.2f}–{latency.high:.2f}; "
        f"batch {latency.batch}, {latency.provider}, {_threads(latency.threads)})"
    )
    yield f"predicted   {milliseconds(latency.predicted_ms)}, off by {100 * latency.off:+.0f} %"


def _print_search(console: Console, search: Search) -> None:
    """Print the budgets that were tried for a tolerance."""
    console.print()
    timed = any(probe.latency is not None for probe in search.probes)
    table = _table(
        *(">tried", *([">speed-up"] if timed else []), ">÷ MACs", ">error, predicted"),
        *(">drop", ""),
    )
    for probe in search.probes:
        table.add_row(*_texts(_probe_cells(probe)))
    console.print(table)
    _print_lines(console, [f"tolerance   {search.max_drop:g}, on {search.images}", ""])


def _probe_cells(probe: Probe) -> list[str]:
    return [
        f"{probe.asked:.2f}",
        *([] if probe.latency is None else [_measured(probe.latency)]),
        f"{probe.macs_reduction:.2f}",
        effect(probe.effect),
        str(probe.drop),
        "within" if probe.within else "",
    ]


def print_front(front: Front, files: Sequence[Path] = (), console: Console | None = None) -> None:
    """Print the best plans, what they gave where they were carried out, and where the files lie."""
    console = console or output_console()
    timed = (">ms", ">speed-up") if front.timed else ()
    measured = (">measured", ">drop") if front.judged_on is not None else ()
    table = _table(*timed, ">÷ MACs", ">÷ params", ">error", *measured)
    for point in front.points:
        cells = _front_cells(point)
        table.add_row(*_texts(cells if measured else cells[: len(table.columns)]))
    console.print(table)
    lines = [
        "error: predicted squared error of the network's output, relative to its variance",
        f"took        {sum(stage.seconds for stage in front.stages):.1f} s",
    ]
    if front.judged_on is not None:
        lines.insert(1, f"drop        measured on {front.judged_on}")
    _print_lines(console, lines)
    _print_notes(console, front.notes)
    print_written(files, console)


def _front_cells(point: FrontPoint) -> list[str]:
    cells = [
        f"{point.macs_reduction:.2f}",
        f"{point.params_reduction:.2f}",
        effect(point.effect),
    ]
    if point.ms is not None and point.speedup is not None:
        cells = [milliseconds(point.ms).removesuffix(" ms"), f"{point.speedup:.2f}", *cells]
    done = point.verified
    if done is None:
        return [*cells, "", ""]
    shown = f"÷ {done.macs_reduction:.2f}" if done.latency is None else _measured(done.latency)
    return [*cells, shown, str(done.drop)]


def _measured(latency: Latency) -> str:
    return f"{latency.speedup:.2f} ({latency.low:.2f}–{latency.high:.2f})"


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print every linear layer and the totals."""
    console = console or output_console()
    table = _table(
        "layer", "op", "weight", "output", ">MACs", ">parameters", "activation", "convertible"
    )
    for layer in inspection.layers:
        table.add_row(
            *_texts(
                [
                    layer.name,
                    layer.op,
                    shape(layer.weight_shape),
                    shape(layer.output_shape),
                    count(layer.macs),
                    count(layer.params),
                    layer.activation,
                    "yes" if layer.reason is None else f"no: {layer.reason}",
                ]
            )
        )
    if inspection.layers:
        console.print(table)
    inputs = ", ".join(
        f"{each.name} {each.dtype} {shape(each.shape)}" for each in inspection.inputs
    )
    share = inspection.convertible_macs / inspection.macs if inspection.macs else 0.0
    _print_lines(
        console,
        [
            f"inputs      {inputs}",
            f"MACs        {count(inspection.macs)}, {share:.1%} of them in the "
            f"{len(inspection.convertible)} of {len(inspection.layers)} layers that can be "
            "converted",
            f"parameters  {count(inspection.params)}",
        ],
    )
    if inspection.folded:
        _print_lines(
            console, [f"folded      {inspection.folded} changes by folding BatchNormalization"]
        )
    _print_notes(console, inspection.notes)


def print_validation(validation: Validation, console: Console | None = None) -> None:
    """Print the two models side by side, and how far their outputs differ."""
    console = console or output_console()
    table = _table("", ">original", ">converted", ">change")
    for cells in _comparison_rows(validation):
        table.add_row(*_texts(cells))
    console.print(table)
    outputs = _table("output", ">max error", ">mean", ">p99", ">max, of range", ">L2, relative")
    for each in validation.outputs:
        outputs.add_row(*_texts(_output_cells(each)))
    console.print(outputs)
    lines = [f"images      {validation.images:,}"]
    if validation.agreement is not None:
        agreement = validation.agreement
        top5 = "" if agreement.top5 is None else f", top-5 {agreement.top5:.2%}"
        lines.append(f"agreement   top-1 {agreement.top1:.2%}{top5}, without labels")
    _print_lines(console, [*lines, *_timed(validation)])
    _print_notes(console, validation.notes)


def print_verdict(
    verdict: Verdict, files: Sequence[Path] = (), console: Console | None = None
) -> None:
    """Print each gate on a line, and where the files lie."""
    console = console or output_console()
    table = _table("|gate", "wanted", ">found", "|", "")
    for gate in verdict.gates:
        table.add_row(
            *_texts([gate.name, gate.bound, gate.figure, gate.status, gate.detail]),
            style="" if gate.passed else "bold red",
        )
    console.print(table)
    _print_lines(console, [f"images      {verdict.validation.images:,}"])
    _print_notes(console, verdict.validation.notes)
    print_written(files, console)


def print_written(files: Sequence[Path], console: Console | None = None) -> None:
    """Print where files lie."""
    _print_lines(console or output_console(), [f"written     {path}" for path in files])


def print_difference(difference: Difference, console: Console | None = None) -> None:
    """Print what two runs do not have in common, then their figures."""
    console = console or output_console()
    table = _table("", "A", "B")
    for heading, changes in (
        ("settings", difference.settings),
        ("machine", difference.machine),
        ("hashes", difference.hashes),
        ("layers", difference.layers),
        ("figures", difference.figures),
    ):
        if changes:
            table.add_row(Text(heading, style="bold"))
        for change in changes:
            table.add_row(*_texts(_change_cells(change)))
    console.print(table)
    if difference.alike:
        _print_lines(console, ["settings, machine, hashes and layers are the same"])


def _change_cells(change: Change) -> list[str]:
    values = [
        "–" if each is None else f"{each:.6g}" if isinstance(each, float) else str(each)
        for each in (change.before, change.after)
    ]
    return [f"  {change.name}", *values]


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


def _latency_row(latency: Comparison) -> Iterator[list[str]]:
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


# Words and numbers ---------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """Return an empty table; heads begin with ">" to align a column to the right, "|" to keep it whole."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column.lstrip(">|"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column.startswith("|"),
        )
    return table


def _texts(cells: Iterable[str]) -> list[Text]:
    return [Text(printable(cell)) for cell in cells]


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(visible(line)), soft_wrap=True)


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    _print_lines(console, [f"note: {note}" for note in notes])


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    """Say about how long something takes."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
