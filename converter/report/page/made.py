"""How a model was made: from what, with which settings, where, and in what time."""

from __future__ import annotations

from dataclasses import dataclass

from converter.report.page.record import Record

__all__ = ["Section", "show_made", "show_passes", "show_recovery"]

_PASS_ENTRIES = 200


@dataclass(frozen=True)
class Section:
    """Named facts under one title."""

    title: str
    facts: tuple[tuple[str, str], ...]


def show_recovery(run: Record) -> Section | None:
    """Say what a recovery has come to."""
    found = run.record("recovery")
    if not found:
        return None
    return Section("Recovery", tuple(found.entries()))


def show_made(run: Record, validation: Record) -> tuple[Section, ...]:
    """Say what a run was asked, on what, where, and for how long."""
    stages = [(each.text("name"), each.number("seconds")) for each in run.records("stages")]
    latency = next(iter(validation.records("latencies")), Record()).record("original")
    sections = [
        Section(
            "Files",
            tuple(
                (name, words)
                for name, words in (
                    ("original", run.text("source") or validation.record("original").text("file")),
                    ("its SHA-256", run.text("source_digest") or _digest(validation, "original")),
                    ("converted", run.text("out") or validation.record("converted").text("file")),
                    ("its SHA-256", run.text("out_digest") or _digest(validation, "converted")),
                    ("calibrated on", run.record("calibration").text("data")),
                    ("their SHA-256", run.record("calibration").text("digest")),
                    ("validated on", validation.text("data")),
                )
                if words
            ),
        ),
        Section("Settings", tuple(run.record("settings").entries())),
        Section(
            "Machine",
            (
                *run.record("machine").entries(),
                *(
                    (f"validation.{name}", latency.shown(name))
                    for name in ("provider", "threads")
                    if latency.shown(name)
                ),
            ),
        ),
        Section(
            "Time",
            tuple((name, f"{seconds:,.1f} s") for name, seconds in stages if seconds is not None),
        ),
    ]
    return tuple(section for section in sections if section.facts)


def show_passes(run: Record) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Say of each graph pass how much it changed, and what it left alone and why."""
    merged: dict[str, tuple[int, list[str]]] = {}
    for each in run.records("passes"):
        name = each.text("name", 80)
        changed, skipped = merged.get(name, (0, []))
        skipped += [f"{skip.text('node')}: {skip.text('why')}" for skip in each.records("skips")]
        merged[name] = changed + len(each.records("changes")), skipped
    return tuple(
        (name, f"{changed:,} changed, {len(skipped):,} left alone", tuple(skipped[:_PASS_ENTRIES]))
        for name, (changed, skipped) in merged.items()
        if changed or skipped
    )


def _digest(validation: Record, role: str) -> str:
    return validation.record(role).text("digest")
