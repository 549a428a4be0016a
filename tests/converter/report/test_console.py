"""What the terminal shows: tables, notes, and progress with and without a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from converter.front import Front, FrontPoint, Verified
from converter.inspection import Inspection, LayerInspection
from converter.latency import Speedup, Timing
from converter.outcome import Conversion, Drop, LayerOutcome, Probe, Search, Stage
from converter.outcome import Latency as Timed
from converter.quantization.quantizing import Quantized
from converter.report.console import (
    ConsoleProgress,
    output_console,
    print_conversion,
    print_front,
    print_inspection,
    print_message,
    print_quantization,
    print_validation,
    printable,
)
from converter.validation.findings import (
    Accuracy,
    Agreement,
    Latency,
    OutputComparison,
    Size,
    Validation,
)

LAYER = LayerOutcome(
    name="conv1",
    op="Conv",
    shape=(64, 32, 3, 3),
    activation="relu",
    scheme="sparse + channel",
    ranks=(16,),
    support=8,
    macs_before=18_874_368,
    macs_after=6_291_456,
    params_before=18_496,
    params_after=6_000,
    error=0.0123,
    status="converged",
)
KEPT = replace(
    LAYER,
    name="conv2",
    scheme="kept",
    ranks=(),
    support=0,
    error=None,
    status="",
    reason="depthwise",
)
CONVERSION = Conversion(
    source=Path("in.onnx"),
    out=Path("out.onnx"),
    macs_before=40_000_000,
    macs_after=20_000_000,
    params_before=270_000,
    params_after=135_000,
    layers=(LAYER, KEPT),
    passes=(),
    latency=None,
    stages=(Stage("record", 1.5), Stage("solve", 2.0)),
    notes=("the memory bound halved the patches",),
    settings={},
    calibration={},
    machine={},
    source_digest="",
    out_digest="",
    peak_memory_mib=512.0,
)
TIMED = Timed("cpu", 2, 1, 12.34, 4.111, 3.0, 2.9, 3.1, 4.2)
DROP = Drop("accuracy", 0.42, 0.1, 500)
FRONT = Front(
    source=Path("in.onnx"),
    points=(
        FrontPoint(0.0, 1.0, 1.0, 12.0, 1.0, {}),
        FrontPoint(0.012, 3.5, 2.5, 4.2, 2.86, {}, Verified(TIMED, 3.4, 2.4, DROP)),
    ),
    judged_on="500 images of val",
    stages=(Stage("record", 1.5),),
    notes=("a note",),
    settings={},
    calibration={},
    machine={},
    source_digest="",
)
SIZE = Size(bytes=2**20, params=1000, macs=10**6, uncounted=())
TIMING = Timing(4.0, 3.9, 4.1, 100, (4.0,), 1, "cpu", 2, spinning=True, settled=True)
VALIDATION = Validation(
    images=100,
    outputs=(
        OutputComparison("logits", 1000, 0.5, 0.1, 0.05, 0.4, 20.0, 0.025, 0.01, 0.2, None, 0, 0),
    ),
    agreement=Agreement("logits", 0.97, 0.999),
    accuracy=Accuracy(100, 0.9, 0.88, 2.0, 1.4, 3, 1),
    latencies=(
        Latency(1, TIMING, replace(TIMING, median_ms=2.0), Speedup(2.0, 1.9, 2.1)),
        Latency(32, skipped="the model has a fixed batch of 1"),
    ),
    original=SIZE,
    converted=replace(SIZE, macs=5 * 10**5),
)


def wide() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=200, markup=False, highlight=False), stream


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_conversion_table() -> None:
    console, stream = wide()
    print_conversion(CONVERSION, [Path("out.json")], console)
    text = stream.getvalue()
    converted = line_with(text, "conv1")
    for part in ("64×32×3×3", "sparse + channel", "16", "8/32", "18.9 M", "6.29 M", "1.23 %"):
        assert part in converted
    assert "converged" in converted
    assert line_with(text, "depthwise") == "kept        conv2: depthwise"
    assert "÷ 2.00" in line_with(text, "parameters")
    assert "out.onnx" in line_with(text, "model ")
    assert "out.json" in line_with(text, "report ")
    assert "note: the memory bound halved the patches" in text


def test_columns_without_content_are_left_out() -> None:
    console, stream = wide()
    layer = replace(LAYER, scheme="tucker", ranks=(16, 24), support=0)
    print_conversion(replace(CONVERSION, layers=(layer,)), (), console)
    assert "16×24" in line_with(stream.getvalue(), "conv1")
    assert "channels" not in stream.getvalue()
    assert "kept" not in stream.getvalue()
    assert "latency" not in stream.getvalue()


def test_quantization_shows_what_was_tried_and_what_came_of_it(quantized: Quantized) -> None:
    console, stream = wide()
    print_quantization(quantized, Path("q.onnx"), console)
    text = stream.getvalue()
    assert line_with(text, "u8 × s7, entropy").split()[-7:] == [
        *("1", "0.21", "%", "97.0", "%", "×", "0.80")
    ]
    assert (
        "quantized   int8, activations × weights u8 × s7, ranges by entropy of 1,800 images\n"
        "balanced    channels between factors, 1 times\n"
        "in float    1 of 2 layers: conv1\n"
        "off by      1 % → 1.2 % from the original, the same best class for 95.00 → 94.50 % of 200 held-out "
        "images\n"
        "size        4.00 → 1.00 MiB  (÷ 4.00)\n"
        "latency     original 12.0 ms, float 6.00 ms, quantized 4.00 ms  (batch 8, cpu, 1 thread)\n"
        "            3.00 (2.90–3.10) times as fast as the original, 1.50 (1.40–1.60) times as the float "
        "model\n"
        "note: a note\n"
        "model       q.onnx\n"
    ) in text


def test_quantization_is_part_of_a_conversion(quantized: Quantized) -> None:
    console, stream = wide()
    kept = replace(quantized, shipped=False, latency=None, left=())
    print_conversion(replace(CONVERSION, quantization=kept.to_dict()), (), console)
    assert line_with(stream.getvalue(), "of 1,800 images").endswith("(not written)")
    assert "\nin float" not in stream.getvalue()
    assert "times as" not in stream.getvalue()


def test_latency_measured_and_predicted() -> None:
    console, stream = wide()
    print_conversion(replace(CONVERSION, latency=TIMED), (), console)
    text = stream.getvalue()
    assert line_with(text, "latency") == (
        "latency     12.3 ms → 4.11 ms  (3.00 times faster, 2.90–3.10; batch 1, cpu, 2 threads)"
    )
    assert line_with(text, "predicted") == "predicted   4.20 ms, off by +2 %"


@pytest.mark.parametrize("timed", [True, False])
def test_the_search_for_a_tolerance(timed: bool) -> None:
    console, stream = wide()
    latency = TIMED if timed else None
    probes = (
        Probe(2.5, 0.004, 2.9, latency, DROP, within=True),
        Probe(5.0, 0.04, 6.2, latency, replace(DROP, points=3.0), within=False),
    )
    searched = Search(0.5, "500 images of val", probes)
    print_conversion(replace(CONVERSION, search=searched), (), console)
    text = stream.getvalue()
    first = line_with(text, "0.42 ± 0.10 points of accuracy")
    assert "within" in first
    assert "2.50" in first
    assert ("3.00 (2.90–3.10)" in first) == timed == ("speed-up" in text)
    assert "within" not in line_with(text, "3.00 ± 0.10")
    assert line_with(text, "tolerance") == "tolerance   0.5, on 500 images of val"


@pytest.mark.parametrize("terminal", [100, 240])
def test_a_front(terminal: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=terminal, markup=False, highlight=False)
    print_front(FRONT, [Path("front.png")], console)
    text = stream.getvalue()
    (row,) = [line for line in text.splitlines() if "2.86" in line]
    parts = ("4.20", "3.50", "2.50", "1.2 %", "3.00 (2.90–3.10)", "0.42 ± 0.10 points of accuracy")
    for part in parts:
        assert part in row
    assert "500 images of val" in line_with(text, "drop  ")
    assert "front.png" in line_with(text, "written")
    assert "note: a note" in text


def test_a_front_without_times_or_verified_points() -> None:
    console, stream = wide()
    points = tuple(replace(each, ms=None, speedup=None, verified=None) for each in FRONT.points)
    print_front(replace(FRONT, points=points, judged_on=None), (), console)
    text = stream.getvalue()
    assert "speed-up" not in text
    assert "drop" not in text
    assert "3.50" in text
    done = replace(points[1], verified=Verified(None, 3.4, 2.4, DROP))
    print_front(replace(FRONT, points=(points[0], done)), (), console)
    assert "÷ 3.40" in line_with(stream.getvalue(), "0.42")


def test_inspection_table() -> None:
    console, stream = wide()
    layers = (
        LayerInspection("a", "Conv", (8, 3, 3, 3), (1, 8, 4, 4), 3456, 216, "relu", None),
        LayerInspection("b", "MatMul", None, None, None, None, "identity", "it is computed"),
    )
    print_inspection(Inspection(Path("m"), 17, (), layers, 3456, 216, 1, ("a note",)), console)
    text = stream.getvalue()
    assert "yes" in line_with(text, "8×3×3×3")
    assert "no: it is computed" in line_with(text, "MatMul")
    assert "1 of 2 layers" in text
    assert "note: a note" in text


def test_validation_table() -> None:
    console, stream = wide()
    print_validation(VALIDATION, console)
    text = stream.getvalue()
    assert "÷ 2.00" in line_with(text, "MACs")
    assert "-2.00 ± 1.40 points" in line_with(text, "accuracy")
    assert "4.000 ms" in line_with(text, "latency, batch 1")
    assert "speed-up 2.00 (1.90 to 2.10)" in line_with(text, "latency, batch 1")
    assert "cpu, threads: 2" in text
    assert "97.00%" in line_with(text, "agreement")
    assert "not timed, the model has a fixed batch of 1" in text


def test_validation_without_labels_or_numbers() -> None:
    console, stream = wide()
    empty = OutputComparison("y", 4, None, None, None, None, None, None, None, None, None, 4, 4)
    print_validation(
        replace(VALIDATION, accuracy=None, agreement=None, outputs=(empty,), latencies=()), console
    )
    assert "accuracy" not in stream.getvalue()
    assert "–" in line_with(stream.getvalue(), "y ")


def test_names_are_neither_markup_nor_commands() -> None:
    console, stream = wide()
    print_conversion(
        replace(CONVERSION, layers=(replace(LAYER, name="[red]a\x1b[2J\nb[/]"),)), (), console
    )
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "[red]a�[2J b[/]" in text
    assert printable("a\tb\x07") == "a b�"


def test_message_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_message("error: " + "word " * 100 + "\nend")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("twofold: error: word")


def test_a_pipe_gets_wide_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_console().width > 200
    print_conversion(CONVERSION)
    assert "sparse + channel" in capsys.readouterr().out


def test_lines_where_there_is_no_terminal() -> None:
    console, stream = wide()
    now = [0.0]
    progress = ConsoleProgress(console, clock=lambda: now[0])
    with progress.stage("recording", 40) as advance:
        advance(2, "first")
        now[0] = 11.0
        advance(3, "conv1\x1b")
        advance(1)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "recording ...",
        "recording: 5/40, about 77 s left conv1�",
        "recording: done in 11.0 s",
    ]


@pytest.mark.parametrize(
    ("elapsed", "left"), [(20.0, "about 20 s"), (3600.0, "about 60 min"), (7200.0, "about 2.0 h")]
)
def test_an_estimate_goes_on_at_the_pace_so_far(elapsed: float, left: str) -> None:
    console, stream = wide()
    now = [0.0]
    with ConsoleProgress(console, clock=lambda: now[0]).stage("fit", 4) as advance:
        now[0] = elapsed
        advance(2, "half")
    assert stream.getvalue().splitlines()[1] == f"fit: 2/4, {left} left half"


def test_no_done_where_a_stage_fails() -> None:
    console, stream = wide()
    with pytest.raises(ValueError, match="broken"), ConsoleProgress(console).stage("fit", 3):
        raise ValueError("broken")
    assert "done" not in stream.getvalue()


def test_bars_on_a_terminal_also_within_each_other() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, markup=False)
    progress = ConsoleProgress(console)
    with progress.stage("outer", 2) as outer:
        with progress.stage("inner", 5) as inner:
            inner(5, "note")
        outer(2)
    with progress.stage("again", 2):
        pass
    text = stream.getvalue()
    assert "5/5" in text
    assert "2/2" in text
    assert "again" in text


def test_one_step_draws_no_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)
    with ConsoleProgress(console).stage("timing", 1) as advance:
        advance()
    assert stream.getvalue().startswith("timing ...\n")
