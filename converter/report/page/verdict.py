"""What a reader must know in two seconds: how much faster and smaller, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from converter.report.page.phrases import gained, lost, times
from converter.report.page.quantization import latency_of, quantization_of
from converter.report.page.record import Record
from converter.report.words import count, effect, factor, mebibytes, milliseconds, signed_points

__all__ = ["Figure", "Gate", "Verdict", "figures", "read_gates", "verdict"]

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Gate:
    """One condition that a conversion had to meet."""

    name: str
    wanted: str
    found: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The headline of a page.

    Attributes
    ----------
    headline : tuple of (figure, words)
        As (("1.3×", "faster at batch 32"), ("1.7×", "smaller")); a figure may be "".
    sentence : str
        What it costs, and where it was measured.
    tone : {"", "good", "bad"}
    badge : str
        Whether the gates were passed, or that the model must not be used; "" for neither.
    """

    headline: tuple[tuple[str, str], ...]
    sentence: str
    tone: Tone = ""
    badge: str = ""


@dataclass(frozen=True)
class Figure:
    """One quantity before and after.

    Attributes
    ----------
    title, before, after, change : str
    shares : tuple of two float, or None
        Both as percentages of the larger one; None where no bar would say anything.
    """

    title: str
    before: str
    after: str
    change: str
    shares: tuple[float, float] | None = None


def verdict(run: Record, validation: Record, passed: tuple[Gate, ...]) -> Verdict:
    """Sum up a conversion, what a validation found of it, and its gates; each may be empty."""
    badge, tone = _badge(validation, passed)
    if _all_kept(run) and not quantization_of(run):
        headline: tuple[tuple[str, str], ...] = (("", "No layer was replaced"),)
    elif run.records("points"):
        headline = (_reach(run),)
    else:
        headline = tuple(filter(None, (_speed(run, validation), *_sizes(run, validation))))
    return Verdict(
        headline=headline or (("", "Nothing was measured"),),
        sentence=". ".join(filter(None, (_cost(run, validation), _timed_on(run, validation))))
        + ".",
        tone=tone,
        badge=badge,
    )


def read_gates(found: list[Record]) -> tuple[Gate, ...]:
    """Read the results of gates; one that does not say that it passed has failed."""
    return tuple(
        Gate(
            name=each.text("name"),
            wanted=each.text("bound") or "–",
            found=each.text("figure") or "–",
            passed=each.flag("passed") is True,
            detail=each.text("detail"),
        )
        for each in found
    )


def figures(run: Record, validation: Record) -> tuple[Figure, ...]:
    """List every quantity that was counted or measured on both models."""
    before, after = validation.record("original"), validation.record("converted")
    return tuple(
        each
        for each in (
            _accuracy(validation),
            _agreement(validation),
            *_latencies(run, validation),
            _file_size(run, before, after),
            _counted("parameters", *_both("params", run, before, after), count),
            _counted("multiply-accumulates", *_both("macs", run, before, after), count),
        )
        if each is not None
    )


# ---- the headline


def _all_kept(run: Record) -> bool:
    layers = run.records("layers")
    return bool(layers) and all(layer.text("scheme") == "kept" for layer in layers)


def _badge(validation: Record, passed: tuple[Gate, ...]) -> tuple[str, Tone]:
    if validation.flag("finite") is False:
        return "gives NaN or infinity: do not use it", "bad"
    if not passed:
        return "", ""
    good = sum(gate.passed for gate in passed)
    if good == len(passed):
        return f"{good} of {good} gates passed", "good"
    return f"{len(passed) - good} of {len(passed)} gates failed", "bad"


def _speed(run: Record, validation: Record) -> tuple[str, str] | None:
    """Say the speed-up at the batch that the conversion was made for, as the validation read it."""
    latency = latency_of(run)
    wanted = latency.number("batch")
    timed = [each for each in validation.records("latencies") if each.record("speedup")]
    at_target = [each for each in timed if each.number("batch") == wanted]
    if at_target or (timed and wanted is None):
        chosen = (at_target or timed)[0]
        ratio = chosen.record("speedup")
        return _faster(ratio.number("ratio"), ratio, chosen.number("batch"))
    return _faster(latency.number("speedup"), latency, wanted)


def _faster(ratio: float | None, bounds: Record, batch: float | None) -> tuple[str, str] | None:
    if ratio is None or ratio <= 0:
        return None
    at = "" if batch is None else f" at batch {batch:.0f}"
    low, high = bounds.number("low") or ratio, bounds.number("high") or ratio
    if low > 1.0:
        return times(ratio), f"faster{at}"
    if high < 1.0:
        return times(1.0 / ratio), f"slower{at}"
    return "", f"As fast as before{at}"


def _sizes(run: Record, validation: Record) -> list[tuple[str, str] | None]:
    """Compare the files; where that of the original is not known, what is known to have become smaller."""
    before, after = validation.record("original"), validation.record("converted")
    whole = _size(before.number("bytes"), after.number("bytes"), ("smaller", "larger"))
    if whole is not None:
        return [whole]
    params = _size(*_both("params", run, before, after), ("fewer parameters", "more parameters"))
    quantized = quantization_of(run)
    in_bytes = quantized.number("bytes_before"), quantized.number("bytes_after")
    if _all_kept(run):  # then the float model is the original
        return [_size(*in_bytes, ("smaller", "larger")) or params]
    than = "than in float"
    return [params, _size(*in_bytes, (f"smaller {than}", f"larger {than}"))]


def _size(
    before: float | None, after: float | None, words: tuple[str, str]
) -> tuple[str, str] | None:
    """Say how many times less or more there is, in words for either."""
    if before is None or after is None or min(before, after) <= 0:
        return None
    less, more = words
    if abs(before / after - 1.0) < 0.005:
        return "", f"no {less}"
    return (times(before / after), less) if before > after else (times(after / before), more)


def _reach(front: Record) -> tuple[str, str]:
    """Say how far a front goes."""
    speedups = [point.number("speedup") for point in front.records("points")]
    known = [each for each in speedups if each is not None]
    if known:
        return times(max(known)), "faster at most, as predicted"
    macs = [point.number("macs_reduction") or 1.0 for point in front.records("points")]
    return times(max(macs)), "fewer multiply-accumulates at most"


def _cost(run: Record, validation: Record) -> str:
    """Say what was lost, and on what it was measured."""
    images = f"{validation.count('images'):,} images"
    accuracy, agreement = validation.record("accuracy"), validation.record("agreement")
    one, other = accuracy.number("original"), accuracy.number("converted")
    if one is not None and other is not None:
        seen = f"{accuracy.count('images'):,} images"
        return f"Top-1 accuracy {100 * one:.1f} → {100 * other:.1f} % on {seen}"
    top1 = agreement.number("top1")
    if top1 is not None:
        return f"The same best class on {100 * top1:.1f} % of {images}"
    errors = [each.number("relative_l2") for each in validation.records("outputs")]
    known = [each for each in errors if each is not None]
    if known:
        return f"Outputs differ by {100 * max(known):.2g} % on {images}"
    told = _searched(run) or _quantized_cost(quantization_of(run)) or _answers_cost(run)
    if told:
        return told
    if run.records("points"):
        return "Error against gain, for the best plans of this model"
    return (
        "Whether its answers changed is not in this report: compare the two with twofold validate"
    )


def _timed_on(run: Record, validation: Record) -> str:
    """Say with what the headline was timed."""
    runs = [each.record("original") for each in validation.records("latencies")]
    if any(point.number("speedup") is not None for point in run.records("points")):
        runs.append(run.record("settings").record("target").record("runtime"))
    found = next((each for each in (*runs, latency_of(run)) if each.text("provider")), None)
    if found is None:
        return ""
    threads = found.count("threads")
    on = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"Timed on {found.text('provider', 40).upper()}{on}"


def _searched(run: Record) -> str:
    """Say what the model that a search found has lost; a quantized one was held to the tolerance."""
    search = run.record("search")
    within = [probe for probe in search.records("probes") if probe.flag("within")]
    if not within:
        return ""
    best = max(within, key=lambda probe: gained(probe) or 0.0)
    drop = best.record("drop")
    said = lost(drop)
    if quantization_of(run):
        most = search.number("max_drop")
        if most is None:
            return ""
        said = f"At most {lost(Record({'points': most, 'measure': drop.text('measure')}))}"
    return f"{said} on {drop.count('images'):,} images, {search.text('images')}"


def _quantized_cost(quantized: Record) -> str:
    """Say how far a quantized model is from the original; layers may have been fitted on these images."""
    return _off_by(quantized.record("after"), quantized.count("held_out"))


def _answers_cost(run: Record) -> str:
    """Say how far the converted model was from the original when it was made."""
    answers = run.record("answers")
    return _off_by(answers, answers.count("images"))


def _off_by(answers: Record, count: int) -> str:
    images = f"{count:,} calibration images: compare the two on others with twofold validate"
    agreement, error = answers.number("agreement"), answers.number("error")
    if agreement is not None:
        return f"The same best class on {100 * agreement:.1f} % of {images}"
    if error is not None:
        return f"Outputs are off by {effect(error)} of their variance on {images}"
    return ""


# ---- the figures


def _accuracy(validation: Record) -> Figure | None:
    accuracy = validation.record("accuracy")
    one, other = accuracy.number("original"), accuracy.number("converted")
    drop, error = accuracy.number("drop_points"), accuracy.number("standard_error_points")
    if one is None or other is None:
        return None
    change = "" if drop is None or error is None else signed_points(drop, error)
    change = change.replace("-", "−")  # the terminal's tables keep the plain sign
    return Figure("top-1 accuracy", f"{100 * one:.2f} %", f"{100 * other:.2f} %", change)


def _agreement(validation: Record) -> Figure | None:
    agreement = validation.record("agreement")
    top1, top5 = agreement.number("top1"), agreement.number("top5")
    if top1 is None:
        return None
    beside = "" if top5 is None else f"among its best five: {100 * top5:.2f} %"
    return Figure("same best class", "", f"{100 * top1:.2f} %", beside)


def _latencies(run: Record, validation: Record) -> list[Figure | None]:
    """Give the validation's latencies; the conversion's own where it has a batch of its own."""
    found = [
        _latency(
            each.number("batch"),
            each.record("original").number("median_ms"),
            each.record("converted").number("median_ms"),
            each.record("speedup"),
            each.record("speedup").number("ratio"),
        )
        for each in validation.records("latencies")
    ]
    own = latency_of(run)
    known = [
        each.number("batch") for each in validation.records("latencies") if each.record("speedup")
    ]
    if own and own.number("batch") not in known:
        found.append(
            _latency(
                own.number("batch"),
                own.number("original_ms"),
                own.number("converted_ms"),
                own,
                own.number("speedup"),
            )
        )
    return found


def _latency(
    batch: float | None,
    before: float | None,
    after: float | None,
    bounds: Record,
    ratio: float | None,
) -> Figure | None:
    if before is None or after is None or ratio is None:
        return None
    low, high = bounds.number("low"), bounds.number("high")
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return Figure(
        "latency" if batch is None else f"latency, batch {batch:.0f}",
        milliseconds(before),
        milliseconds(after),
        f"speed-up {ratio:.2f}{interval}",
        _shares(before, after),
    )


def _file_size(run: Record, before: Record, after: Record) -> Figure | None:
    """Compare the files; without a validation, that of the float model with the quantized one."""
    found = _counted("file size", before.number("bytes"), after.number("bytes"), mebibytes)
    if found is not None:
        return found
    quantized = quantization_of(run)
    return _counted(
        f"file size, float to {quantized.text('precision', 20) or 'quantized'}",
        quantized.number("bytes_before"),
        quantized.number("bytes_after"),
        mebibytes,
    )


def _both(
    key: str, run: Record, before: Record, after: Record
) -> tuple[float | None, float | None]:
    one, other = before.number(key), after.number(key)
    if one is not None and other is not None:
        return one, other
    return run.number(f"{key}_before"), run.number(f"{key}_after")


def _counted(
    title: str, before: float | None, after: float | None, words: Callable[[float], str]
) -> Figure | None:
    if before is None or after is None:
        return None
    return Figure(
        title,
        words(before),
        words(after),
        factor(before / after if after > 0 else None),
        _shares(before, after),
    )


def _shares(before: float, after: float) -> tuple[float, float] | None:
    most = max(before, after)
    if most <= 0 or min(before, after) < 0:
        return None
    return round(100.0 * before / most, 2), round(100.0 * after / most, 2)
