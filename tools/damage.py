"""Feed damaged files to all that reads files, and write a section of docs/reliability.md.

    python -m tools.damage [--inputs 10000] [--seed 0]

Models (alone, and beside external data), calibration arrays and images, `twofold.toml`, JSON reports, and the
kept parts of `--work` and the cache are changed: bits, bytes, runs, sizes and ends. Each kind is read in a
process of its own with a bound on its memory. A file is read, or refused with one sentence; anything else
ends the script with exit code 1, and the file is kept beside the figures.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import resource
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx.parser
import typer
from onnx import numpy_helper
from PIL import Image

import converter
from converter.array_file import DamagedFileError, load_arrays, save_arrays
from converter.calibration.opening import open_calibration_set
from converter.calibration.sets import ModelInput
from converter.cli import project_settings
from converter.config import Preprocessing, Runtime
from converter.difference import diff
from converter.errors import ConverterError
from converter.model_file import load_model, save_model
from converter.planner.measurements import Measurements
from converter.project import read_project, starter
from converter.report.page import read_report, render_page
from converter.runtime import open_session
from tools.reliability import FIGURES, load_figures, machine_line, save_figures, write_section
from tools.small_network import write_small_network

__all__ = ["KINDS", "Kind", "Outcome", "damaged", "main", "try_inputs"]

MEMORY = 6 * 2**30
"""Address space of a process that reads, in bytes: torch and onnxruntime reserve about half of it."""
SECONDS = 20.0
"""For one input."""
INPUT = ModelInput("image", ("batch", 3, 8, 8), np.dtype(np.float32))


@dataclass(frozen=True)
class Kind:
    """A kind of file and what reads it.

    Attributes
    ----------
    name : str
    share : int
        Of all inputs, in percent.
    files : callable
        Writes good files into an empty folder; those that end with .data stay as they are.
    read : callable
        Reads a file as the program does.
    """

    name: str
    share: int
    files: Callable[[Path], None]
    read: Callable[[Path], None]


@dataclass
class Outcome:
    """What became of the inputs of one kind.

    Attributes
    ----------
    inputs, read, refused : int
    peak_mib : float
        Of the process.
    slowest : float
        Seconds.
    faults : tuple of str
        Everything that is neither read nor refused with one sentence.
    """

    inputs: int = 0
    read: int = 0
    refused: int = 0
    peak_mib: float = 0.0
    slowest: float = 0.0
    faults: tuple[str, ...] = ()


def main(
    inputs: Annotated[int, typer.Option(min=100, help="How many, of all kinds.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Forget what earlier runs found.")] = False,
) -> None:
    """Try all of them; exit code 1 where one is neither read nor refused."""
    found = load_figures("damage", fresh=fresh)
    for kind in KINDS:
        if kind.name in found:
            continue
        outcome = try_inputs(kind, inputs * kind.share // 100, seed, failing=FIGURES)
        found[kind.name] = asdict(outcome)
        save_figures("damage", found)
        print(f"{kind.name}: {outcome}", flush=True)
    outcomes = {name: Outcome(**each) for name, each in found.items()}
    write_section("Damaged files", _section(outcomes, seed))
    if any(each.faults for each in outcomes.values()):
        raise typer.Exit(1)


def try_inputs(kind: Kind, count: int, seed: int, *, failing: Path | None = None) -> Outcome:
    """Read damaged files of one kind, in a process that may die of them.

    Parameters
    ----------
    kind : Kind
    count : int
    seed : int
    failing : Path or None, default None
        Folder that files go to that are neither read nor refused.
    """
    context = multiprocessing.get_context("spawn")
    outcome = Outcome()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        while outcome.inputs < count:
            ours, theirs = context.Pipe(duplex=False)
            reader = context.Process(
                target=_read_all, args=(kind.name, Path(name), seed, outcome.inputs, count, theirs)
            )
            reader.start()
            theirs.close()
            _listen(ours, outcome, faults)
            reader.kill()
            reader.join()
            if outcome.inputs < count:
                faults.append(
                    f"input {outcome.inputs}: the process hung, or died ({reader.exitcode})"
                )
                outcome.inputs += 1
        if failing is not None:
            for number in {int(fault.split()[1].rstrip(":")) for fault in faults}:
                failing.mkdir(parents=True, exist_ok=True)
                data, suffix = _input(kind, Path(name), seed, number)
                (failing / f"damaged-{number}{suffix}").write_bytes(data)
    outcome.faults = tuple(faults)
    return outcome


def _listen(reader: Connection, outcome: Outcome, faults: list[str]) -> None:
    """Take in what a process says of each input, until it ends or says nothing for too long."""
    patience = SECONDS + 60  # what it imports comes first
    while True:
        try:
            if not reader.poll(patience):
                return
            fault, refused, seconds, peak = reader.recv()
        except EOFError:
            return
        patience = SECONDS
        if fault:
            faults.append(f"input {outcome.inputs}: {fault}")
        outcome.inputs += 1
        outcome.refused += refused
        outcome.read += not refused and not fault
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.peak_mib = max(outcome.peak_mib, peak)


def _read_all(
    name: str, folder: Path, seed: int, first: int, count: int, parent: Connection
) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    warnings.simplefilter("ignore")  # of Pillow and numpy, about what was damaged
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of libraries in C
    for number in range(first, count):
        data, suffix = _input(kind, folder, seed, number)
        path = folder / f"damaged{suffix}"
        path.write_bytes(data)
        started = time.monotonic()
        fault = _fault(kind, path)
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        parent.send((fault or "", fault is None, seconds, peak))


def _fault(kind: Kind, path: Path) -> str | None:
    """Read a file: "" where it could be read, None where it was refused, else what went wrong."""
    try:
        kind.read(path)
    except (ConverterError, DamagedFileError) as error:
        sentence = str(error)
        if not sentence or "\n" in sentence or len(sentence) > 1000 or "Traceback" in sentence:
            return f"refused with {sentence[:300]!r}"
        return None
    except BaseException as error:  # noqa: BLE001  # this is what is looked for
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def _input(kind: Kind, folder: Path, seed: int, number: int) -> tuple[bytes, str]:
    """Give the input of a number, and what its name ends with."""
    good = folder / kind.name.replace(" ", "-")
    if not good.exists():
        good.mkdir()
        kind.files(good)
    files = sorted(path for path in good.iterdir() if path.suffix != ".data")
    for beside in good.glob("*.data"):
        if not (folder / beside.name).exists():
            (folder / beside.name).write_bytes(beside.read_bytes())
    path = files[number % len(files)]
    random = np.random.default_rng([seed, number])
    data = path.read_bytes()
    if path.suffix == ".npz" and number % 2:
        return _damaged_inside(data, random), path.suffix
    return damaged(data, random), path.suffix


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Change some bytes of a file.

    Parameters
    ----------
    data : bytes
        Not empty.
    random : numpy.random.Generator
    """
    out = bytearray(data)
    for _ in range(int(random.choice((1, 1, 1, 2, 4, 16)))):
        at = int(random.integers(len(out) + 1))
        length = int(random.integers(1, 33))
        piece = bytes(out[at : at + length])
        way = int(random.integers(8))
        if way == 0 and at < len(out):
            out[at] ^= 1 << int(random.integers(8))
        elif way == 1 and at < len(out):
            out[at] = int(random.integers(256))
        elif way == 2:
            del out[at : at + length]
        elif way == 3:
            out[at:at] = piece * int(random.integers(1, 40))
        elif way == 4:
            out[at : at + length] = random.bytes(length)
        elif way == 5:
            limits = (
                b"\xff" * 4,
                b"\xff" * 8,
                b"\0" * 8,
                b"\xff\xff\xff\x7f",
                b"\x80" * 9 + b"\x01",
            )
            value = limits[int(random.integers(len(limits)))]
            out[at : at + len(value)] = value
        elif way == 6:
            to = int(random.integers(len(out) + 1))
            out[to : to + len(piece)] = piece
        elif random.integers(4) == 0:
            del out[at:]
    return bytes(out)


def _damaged_inside(data: bytes, random: np.random.Generator) -> bytes:
    """Damage what lies in an archive rather than the archive, whose checksums would notice."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as good, zipfile.ZipFile(out, "w") as archive:
        for each in good.infolist():
            archive.writestr(each, damaged(good.read(each), random), each.compress_type)
    return out.getvalue()


# Kinds ---------------------------------------------------------------------------------------

NET = """
    <ir_version: 8, opset_import: ["": 17, "custom": 1]>
    net (float[batch, 3, 8, 8] image, bool which) => (float[batch, 4] scores)
    {
        a = Conv <pads = [1, 1, 1, 1]> (image, w1)
        n = BatchNormalization (a, g, b, m, v)
        r = Relu (n)
        c = If (which) <
            then_branch = yes () => (float[batch, 8, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1]> (r, w2) },
            else_branch = no () => (float[batch, 8, 8, 8] z) { z = Identity (r) }
        >
        e = GlobalAveragePool (c)
        f = Flatten (e)
        scores = Gemm <transB = 1> (f, w3)
    }
"""


def _write_models(folder: Path) -> None:
    write_small_network(folder)
    (folder / "images.npy").unlink()
    model = onnx.parser.parse_model(NET)
    random = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (4, 8)}
    for name in ("w1", "w2", "w3", "g", "b", "m", "v"):
        value = random.uniform(0.1, 1, size=shapes.get(name, (8,))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save(model, folder / "branches.onnx")


def _write_external(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_small_network(Path(name))
        save_model(load_model(Path(name) / "model.onnx"), folder / "beside.onnx", external_above=0)


def _read_model(path: Path) -> None:
    converter.inspect(path)
    open_session(load_model(path), Runtime(threads=1), label=path.name)


def _write_arrays(folder: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    np.save(folder / "plain.npy", images)
    np.savez(folder / "stored.npz", image=images, labels=np.arange(4))
    np.savez_compressed(folder / "packed.npz", image=images, labels=np.arange(4))


def _read_samples(path: Path) -> None:
    samples = open_calibration_set(path, [INPUT], Preprocessing(), labels=True)
    for batch in samples.batches(2):
        assert batch.feeds["image"].shape[1:] == (3, 8, 8), "samples have the input's shape"
    samples.digest()


def _write_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for suffix in ("png", "jpg", "bmp", "webp", "gif", "tiff", "ppm"):
        image.save(folder / f"image.{suffix}")
    image.convert("P").save(folder / "palette.png")
    image.convert("LA").save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) << 8).save(folder / "deep.png")
    image.save(folder / "packed.tiff", compression="tiff_lzw")
    image.save(folder / "progressive.jpg", progressive=True)


def _read_image(path: Path) -> None:
    folder = path.parent / "one image"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path.rename(folder / path.name)
    _read_samples(folder)


def _write_project(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_small_network(Path(name))
        inspection = converter.inspect(Path(name) / "model.onnx")
    text = starter(inspection, "model.onnx", project_settings())
    (folder / "first.toml").write_text(text)
    (folder / "full.toml").write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))


def _read_project(path: Path) -> None:
    read_project(path, project_settings())


def _write_reports(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_small_network(place)
        conversion = converter.convert(
            place / "model.onnx", place / "images.npy", place / "small.onnx",
            converter.Budget(macs=3), timing=False,
            calibration=converter.CalibrationSettings(batch=16, patches=512),
            solver=converter.SolverSettings(iterations=4, polish=2),
            target=converter.Target(Runtime(threads=1)),
        )  # fmt: skip
        validation = converter.validate(
            place / "model.onnx", place / "small.onnx", place / "images.npy", seconds=0.1
        )
    from converter.report.files import write_report

    write_report(folder / "conversion.json", conversion.to_dict())
    write_report(folder / "validation.json", validation.to_dict())


def _read_report(path: Path) -> None:
    render_page(read_report(path))
    diff(path, path)


def _write_kept(folder: Path) -> None:
    random = np.random.default_rng(0)
    save_arrays(folder / "part.npz", {"key": "x"}, {"a": random.normal(size=(4, 5))})
    measurements = Measurements(folder)
    measurements.write("here", {"a": 1.5, "b": 2.0})
    (kept,) = folder.glob("*.json")
    kept.rename(folder / "measured.json")


def _read_kept(path: Path) -> None:
    if path.suffix == ".npz":
        load_arrays(path)
        return
    measurements = Measurements(path.parent / "cache")
    measurements.write("here", {"a": 1.0})
    (kept,) = (path.parent / "cache").glob("*.json")
    path.replace(kept)
    if not measurements.read("here"):
        raise DamagedFileError("it was left out, with a note")


KINDS = (
    Kind("models", 35, _write_models, _read_model),
    Kind("models with external data", 10, _write_external, _read_model),
    Kind("arrays", 15, _write_arrays, _read_samples),
    Kind("images", 15, _write_images, _read_image),
    Kind("twofold.toml", 10, _write_project, _read_project),
    Kind("reports", 10, _write_reports, _read_report),
    Kind("kept parts and measurements", 5, _write_kept, _read_kept),
)


def _section(outcomes: dict[str, Outcome], seeded: int) -> list[str]:
    total = sum(each.inputs for each in outcomes.values())
    faults = sum(len(each.faults) for each in outcomes.values())
    return [
        f"`python -m tools.damage --inputs {total} --seed {seeded}`: good files with some of their bytes "
        f"changed. {machine_line()}.",
        "",
        f"- **{total:,} inputs, {faults} of them neither read nor refused with one clear sentence.**",
        f"- Bounds: {MEMORY >> 30} GiB of address space, {SECONDS:g} seconds an input. Peak: resident memory "
        "of the process, with its libraries.",
        "",
        "| files | inputs | read | refused | peak MiB | slowest, seconds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {each.inputs:,} | {each.read:,} | {each.refused:,} | {each.peak_mib:,.0f} | "
            f"{each.slowest:.2f} |"
            for name, each in outcomes.items()
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
