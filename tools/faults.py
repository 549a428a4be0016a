"""Kill, starve and corrupt conversions, and write a section of docs/reliability.md.

    python -m tools.faults [--kills 50] [--seed 0]

Runs of a network that converts in seconds, with `--work`: killed with SIGKILL at random moments, on a full
disk, in a folder that cannot be written, with too little memory, and with every kept part damaged. After each
fault the input must be untouched and the output absent or whole, and the next run must end with the very file
of an undisturbed one. A full disk and a read-only folder are small file systems in memory where that is
allowed (Linux, root), else a bound on file sizes and file permissions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tools.damage import damaged
from tools.reliability import ROOT, load_figures, machine_line, save_figures, write_section
from tools.small_network import write_small_network

__all__ = ["Place", "kill_at_random", "main"]

ROUND = 10
"""Kills before a run may finish; each round begins with an empty work folder."""
MEMORY_LIMITS = (256, 512, 1024, 1536, 2048, 3072)
"""Address space, in MiB."""
PARTS_DAMAGED = 3


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (below 0 for a signal) and what it said last."""

    code: int
    said: str


class Place:
    """A folder with a model and samples, and what an undisturbed run makes of them.

    Parameters
    ----------
    folder : Path
        An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_small_network(folder)
        started = time.monotonic()
        ended = self.run(folder / "whole.onnx", folder / "other")
        self.seconds = time.monotonic() - started
        assert ended == Ended(0, ""), ended
        self.whole = (folder / "whole.onnx").read_bytes()
        self._inputs = self._digests()

    def start(self, out: Path, work: Path, *, limit: str = "") -> Run:
        """Start a conversion; `limit` is what `ulimit` of a shell is given."""
        command: list[str | Path] = [
            *(sys.executable, "-m", "converter", "convert", self.folder / "model.onnx"),
            *("--calib", self.folder / "images.npy", "--out", out, "--macs", "4", "--no-timing"),
            *(
                "--threads",
                "1",
                "--patches",
                "512",
                "--calib-batch",
                "16",
                "--work",
                work,
                "--quiet",
            ),
        ]
        if limit:
            command = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, out: Path, work: Path, *, limit: str = "") -> Ended:
        """Run a conversion to its end."""
        program = self.start(out, work, limit=limit)
        said = program.communicate()[1].strip().splitlines()
        return Ended(program.returncode, said[-1] if said else "")

    def check(self, out: Path, *, finished: bool) -> None:
        """Raise `AssertionError` where an input was touched, or the output is neither absent nor whole."""
        assert self._digests() == self._inputs, "an input was changed"
        if finished or out.exists():
            assert out.read_bytes() == self.whole, f"{out} is not what an undisturbed run makes"

    def _digests(self) -> list[str]:
        paths = (self.folder / name for name in ("model.onnx", "images.npy"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


Run = subprocess.Popen[str]


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many runs are killed.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the moments.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Forget what earlier runs found.")] = False,
) -> None:
    """Try all faults; an AssertionError says what did not hold."""
    found = load_figures("faults", fresh=fresh)
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        print(f"undisturbed: {place.seconds:.1f} seconds", flush=True)
        for start in range(0, kills, ROUND):
            key = f"kill {seed}.{start}"
            if key not in found:
                count = min(ROUND, kills - start)
                found[key] = kill_at_random(place, count, np.random.default_rng([seed, start]))
                print(f"{key}: {found[key]}", flush=True)
                save_figures("faults", found)
        for key, fault in (
            ("a full disk", full_disk),
            ("a folder that cannot be written", unwritable),
            ("too little memory", little_memory),
            ("damaged parts", damaged_parts),
        ):
            if key not in found:
                found[key] = fault(place)
                print(f"{key}: {found[key]}", flush=True)
                save_figures("faults", found)
        seconds = place.seconds
    write_section("Faults", _section(found, seed, seconds))


def kill_at_random(place: Place, count: int, random: np.random.Generator) -> dict[str, int]:
    """Kill runs at random moments, and let one finish; say how far they had come.

    Parameters
    ----------
    place : Place
    count : int
        Runs that are killed; one that ends before its moment counts too.
    random : numpy.random.Generator
    """
    out, work = place.folder / "small.onnx", place.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    tally: Counter[str] = Counter()
    for _ in range(count):
        out.unlink(missing_ok=True)
        program = place.start(out, work)
        try:
            program.wait(random.uniform(0, 1.1 * place.seconds))
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
        program.communicate()
        place.check(out, finished=False)
        if program.returncode == 0:
            tally["had finished"] += 1
        elif any(work.glob("fit-*.npz")):
            tally["with fits kept"] += 1
        elif any(work.glob("*.npz")):
            tally["with predictions kept"] += 1
        else:
            tally["with nothing kept"] += 1
    ended = place.run(out, work)
    assert ended.code == 0, ended
    place.check(out, finished=True)
    return dict(tally)


# Other faults --------------------------------------------------------------------------------


def full_disk(place: Place) -> str:
    """Write the output where little room is left."""
    room = len(place.whole) // 2
    with _mounted(f"size={room // 4096 * 4096 or 4096}") as disk:
        if disk is not None:
            ended, where = place.run(disk / "small.onnx", place.folder / "work"), "a file system"
            left = sorted(path.name for path in disk.iterdir())
        else:
            out = place.folder / "bounded" / "small.onnx"
            out.parent.mkdir(exist_ok=True)
            ended = place.run(
                out,
                place.folder / "work",
                limit=f"-f {room // 1024}",
            )
            where, left = (
                "a bound on file sizes",
                sorted(path.name for path in out.parent.iterdir()),
            )
    _require_refused(ended, 2)
    assert not left, left
    _next_run(place)
    return f"{where} of half the output: exit code 2, nothing left behind"


def unwritable(place: Place) -> str:
    """Write the output where nothing can be written."""
    with _mounted("ro") as disk:
        folder = disk or place.folder / "closed"
        if disk is None:
            folder.mkdir(exist_ok=True)
            folder.chmod(0o500)
        started = time.monotonic()
        ended = place.run(folder / "small.onnx", place.folder / "work")
        seconds = time.monotonic() - started
        assert not any(folder.iterdir()), "something was written"
        if disk is None:
            folder.chmod(0o700)
    _require_refused(ended, 2)
    assert seconds < place.seconds, "it was refused only after the work was done"
    _next_run(place)
    return "exit code 2 before any work"


def little_memory(place: Place) -> str:
    """Bound the address space, from far too little to enough."""
    ends = []
    for limit in MEMORY_LIMITS:
        out = place.folder / "starved.onnx"
        out.unlink(missing_ok=True)
        work = place.folder / f"work-{limit}"
        ended = place.run(
            out,
            work,
            limit=f"-v {limit << 10}",
        )
        place.check(out, finished=ended.code == 0)
        after = place.run(out, work)
        assert after.code == 0, after
        place.check(out, finished=True)
        ends.append(f"{limit} MiB: {_words(ended)}")
    return "; ".join(ends)


def damaged_parts(place: Place) -> str:
    """Damage all parts that an earlier run has kept, in several ways."""
    random = np.random.default_rng(0)
    out, work = place.folder / "small.onnx", place.folder / "work"
    parts = sorted(work.glob("*.npz"))
    assert parts, "earlier runs have kept some"
    for _ in range(PARTS_DAMAGED):
        for part in parts:
            part.write_bytes(damaged(part.read_bytes(), random))
        out.unlink(missing_ok=True)
        ended = place.run(out, work)
        assert ended.code == 0, ended
        place.check(out, finished=True)
    return f"{PARTS_DAMAGED} times all {len(parts)} of them: made again"


def _next_run(place: Place) -> None:
    out = place.folder / "small.onnx"
    out.unlink(missing_ok=True)
    ended = place.run(out, place.folder / "work")
    assert ended.code == 0, ended
    place.check(out, finished=True)


def _require_refused(ended: Ended, code: int) -> None:
    assert ended.code == code, ended
    assert ended.said.startswith("twofold: error: "), ended


def _words(ended: Ended) -> str:
    if ended.code < 0:
        return f"ended by {signal.Signals(-ended.code).name}"
    return "done" if ended.code == 0 else f"exit code {ended.code}"


@contextmanager
def _mounted(options: str) -> Iterator[Path | None]:
    """Mount a file system in memory; None where that is not allowed."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", options, "twofold", name]
        mounted = bool(shutil.which("mount")) and (
            subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
        try:
            yield Path(name) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", name], check=True)


def _section(found: dict[str, dict[str, int] | str], seeded: int, seconds: float) -> list[str]:
    tally: Counter[str] = Counter()
    for key, each in found.items():
        if key.startswith("kill") and isinstance(each, dict):
            tally.update(each)
    return [
        f"`python -m tools.faults --kills {tally.total()} --seed {seeded}`: a conversion with `--work` that "
        f"takes {seconds:.0f} seconds. {machine_line()}.",
        "",
        "- After each fault the input was untouched and the output absent or whole, and the next run ended "
        "with the very file of an undisturbed one.",
        f"- **Killed with SIGKILL at {tally.total()} random moments: "
        + ", ".join(f"{count} {stage}" for stage, count in tally.most_common())
        + ".**",
        *(f"- {key.capitalize()}: {each}." for key, each in found.items() if isinstance(each, str)),
        "- A worker of a Dask cluster that dies midway: tests/converter/test_cluster.py.",
    ]


if __name__ == "__main__":
    typer.run(main)
