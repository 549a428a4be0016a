"""Train the 32×32 reference networks on CIFAR-10, on a GPU where there is one.

    python -m tools.train_reference --only resnet20

For each network this writes `references/NAME_cifar10.onnx`, and `references/NAME_cifar10.json` with
its accuracy on a tenth of the images, which training does not see (and never the val images). A run
that was stopped goes on from its last whole epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from converter.config import PRESETS
from converter.errors import CalibrationError, ConfigError, ConverterError
from models import NetworkError, WeightsError, build, export_onnx, initialise
from models.weights import read_plain

__all__ = ["DeviceImages", "Images", "Recipe", "Run", "app", "load_images", "train_network"]

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32
_PAD = 4  # pixels on each side that a crop may move by
_HELD_OUT = 0.1
_LARGEST_MEMBER = 1 << 20  # bytes; a 32×32 JPEG has about one thousand
_MOST_IMAGES = 1_000_000
_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum under a one-cycle learning rate.

    Attributes
    ----------
    network : str
        Name in the catalog of `models`.
    epochs : int
        Passes over the train images, from 1.
    rate : float
        Highest learning rate, for batches of `batch`.
    decay : float
        Weight decay.
    batch : int
        Images in a step.
    smoothing : float
        Label smoothing.
    """

    network: str
    epochs: int = 60
    rate: float = 0.1
    decay: float = 5e-4
    batch: int = 256
    smoothing: float = 0.05


RECIPES: dict[str, Recipe] = {
    "vgg16": Recipe("vgg16_cifar"),
    "alexnet": Recipe("alexnet_cifar", rate=0.05),
    "googlenet": Recipe("googlenet_cifar"),
    "resnet20": Recipe("resnet20", epochs=90, rate=0.2, decay=2e-4, smoothing=0.0),
    "resnet56": Recipe("resnet56", epochs=90, rate=0.2, decay=2e-4, smoothing=0.0),
}
"""What is trained, by the name that the files get."""


class Images(NamedTuple):
    """Labelled images, sorted by class.

    Attributes
    ----------
    pixels : ndarray of shape (n, 32, 32, 3), uint8
        RGB.
    labels : ndarray of shape (n,), int64
        Position of the class in `classes`.
    classes : tuple of str
        Names of the class folders, sorted.
    digest : str
        First 12 hexadecimal digits of the archive's SHA-256.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Run:
    """What a training run depends on; a checkpoint serves only the run that wrote it.

    Attributes
    ----------
    recipe : Recipe
    seed : int
        Seed of the initial weights, the held-out images, their order and augmentation.
    limit : int or None
        At most so many images in all, spread evenly over the archive; None takes all.
    digest : str
        Of the archive.
    """

    recipe: Recipe
    seed: int
    limit: int | None
    digest: str


def _decode(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.size != (SIZE, SIZE):
                raise CalibrationError(
                    f"{name} has {image.width}×{image.height} pixels instead of {SIZE}×{SIZE}; "
                    "give an archive of images of that size"
                )
            return np.asarray(image.convert("RGB"))
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CalibrationError(f"{name} is no readable JPEG or PNG image; replace it") from error


def _members(archive: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield class, name and content of each image of a tar archive; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive, "r|*") as stream:
            for member in stream:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
                    continue
                if member.size > _LARGEST_MEMBER or len(path.parts) < 2:
                    raise CalibrationError(
                        f"{archive}: {member.name} is above {_LARGEST_MEMBER >> 20} MiB or in no "
                        "class folder; give an archive of <class>/<image> files"
                    )
                content = stream.extractfile(member)
                if content is None:
                    raise CalibrationError(f"{archive}: {member.name} cannot be read; replace it")
                yield path.parent.name, f"{archive}: {member.name}", content.read()
    except (tarfile.TarError, EOFError) as error:
        raise CalibrationError(f"{archive} is no whole tar archive; fetch it again") from error
    except OSError as error:
        raise CalibrationError(
            f"{archive} cannot be read: {error.strerror or error}; give --archive"
        ) from error


def _read_archive(archive: Path, digest: str) -> Images:
    """Decode every image of the archive; classes are the folders that hold them, sorted."""
    found: list[tuple[str, str, NDArray[np.uint8]]] = []
    for folder, name, data in _members(archive):
        if len(found) == _MOST_IMAGES:
            raise CalibrationError(
                f"{archive} holds over {_MOST_IMAGES} images; give a smaller one"
            )
        found.append((folder, name, _decode(data, name)))
    classes = tuple(sorted({folder for folder, _, _ in found}))
    if len(classes) < 2:
        raise CalibrationError(
            f"{archive} holds images of {len(classes)} classes; give <class>/<image> files of two "
            "or more"
        )
    found.sort(key=lambda item: item[:2])
    labels = np.array([classes.index(folder) for folder, _, _ in found], dtype=np.int64)
    return Images(np.stack([pixels for _, _, pixels in found]), labels, classes, digest)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a draft beside `path` that takes its place once it is whole."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _digest(archive: Path) -> str:
    """Return the first 12 hexadecimal digits of the file's SHA-256."""
    digest = hashlib.sha256()
    try:
        with archive.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CalibrationError(
            f"{archive} cannot be read: {error.strerror or error}; give --archive"
        ) from error
    return digest.hexdigest()[:12]


def load_images(archive: Path, cache: Path) -> Images:
    """Return the images of a tar archive, from `cache` where it was decoded before.

    Parameters
    ----------
    archive : Path
        tar, compressed or not, of JPEG or PNG images, 32×32, in class folders.
    cache : Path
        Folder for the decoded arrays; the archive's digest is in their name.

    Raises
    ------
    CalibrationError
        Where the archive cannot be read, or an image is damaged or of another size.
    """
    digest = _digest(archive)
    decoded = cache / f"images-{digest}.npz"
    if decoded.is_file():
        with np.load(decoded, allow_pickle=False) as arrays:
            classes = tuple(str(name) for name in arrays["classes"])
            return Images(arrays["pixels"], arrays["labels"], classes, digest)
    images = _read_archive(archive, digest)
    with _replacing(decoded) as draft, draft.open("wb") as file:
        np.savez(file, pixels=images.pixels, labels=images.labels, classes=np.array(images.classes))
    return images


def _evenly(count: int, limit: int | None) -> NDArray[np.intp]:
    """Return at most `limit` positions of `count`, evenly spread: classes stay in proportion."""
    if limit is None or limit >= count:
        return np.arange(count)
    positions: NDArray[np.intp] = np.linspace(0, count - 1, limit).round().astype(np.intp)
    return positions


def _split(images: Images, run: Run) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the positions to train on and those held out, a tenth of each class."""
    rng = np.random.default_rng(run.seed)
    chosen = _evenly(len(images.labels), run.limit)
    train: list[NDArray[np.intp]] = []
    held_out: list[NDArray[np.intp]] = []
    for label, name in enumerate(images.classes):
        members = rng.permutation(chosen[images.labels[chosen] == label])
        if len(members) < 2:
            raise ConfigError(
                f"fewer than two images of class {name} are left to train on; raise --limit"
            )
        count = max(1, round(_HELD_OUT * len(members)))
        held_out.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


class DeviceImages:
    """Images on the device that trains; a network gets them as float32 (n, 3, 32, 32).

    Preset `cifar10`: x = (pixel/255 − mean)/std.
    """

    def __init__(self, images: Images, chosen: NDArray[np.intp], device: torch.device) -> None:
        pixels = torch.from_numpy(images.pixels[chosen]).to(device)
        # (n, 32, 32, 3) → (n, 40, 40, 3): black around, for crops
        self.padded = nn.functional.pad(pixels, (0, 0, _PAD, _PAD, _PAD, _PAD))
        self.labels = torch.from_numpy(images.labels[chosen]).to(device)
        preset = PRESETS["cifar10"]
        self.mean = torch.tensor(preset.mean, device=device)
        self.std = torch.tensor(preset.std, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def _cut(self, chosen: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        # rows, columns (b, 32) → (b, 32, 32, 3) → (b, 3, 32, 32)
        pixels = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((pixels / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def plain(self, chosen: Tensor) -> Tensor:
        """Return images as they are."""
        side = torch.arange(_PAD, _PAD + SIZE, device=chosen.device).expand(len(chosen), SIZE)
        return self._cut(chosen, side, side)

    def augmented(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Return images moved by up to 4 pixels in each direction, every other one mirrored."""
        count, device = len(chosen), chosen.device
        side = torch.arange(SIZE, device=device)
        moves = torch.randint(0, 2 * _PAD + 1, (2, count, 1), generator=generator, device=device)
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, side.flip(0), side)
        return self._cut(chosen, moves[0] + side, moves[1] + columns)


def _accuracy(net: nn.Module, images: DeviceImages) -> float:
    """Return the share of images that `net` classifies rightly, in float32."""
    net.eval()
    right = 0
    with torch.no_grad():
        positions = torch.arange(len(images), device=images.labels.device)
        for chosen in torch.split(positions, _EVALUATION_BATCH):
            answers = net(images.plain(chosen)).argmax(1)
            right += int((answers == images.labels[chosen]).sum())
    return right / len(images)


class _Training:
    """A network, its optimizer and its learning rate, and the file that keeps their state."""

    def __init__(self, run: Run, classes: int, train: DeviceImages, checkpoint: Path) -> None:
        recipe = run.recipe
        self.run, self.train, self.checkpoint = run, train, checkpoint
        self.device = train.labels.device
        # A last batch that is not full is left out: of one image, BatchNorm has no variance.
        self.batch = min(recipe.batch, len(train))
        self.steps = len(train) // self.batch
        net = build(recipe.network, classes=classes)
        initialise(net, run.seed, size=SIZE)
        self.net = net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=recipe.rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.decay,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=recipe.rate, total_steps=recipe.epochs * self.steps
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        self.epoch = 0
        self.seconds = 0.0

    def resume(self) -> None:
        """Take up the state on disk, where there is one.

        Raises
        ------
        ConfigError
            Where it is damaged or of a run with other settings.
        """
        if not self.checkpoint.is_file():
            return
        try:
            state = read_plain(self.checkpoint, self.device)
        except WeightsError as error:
            raise ConfigError(
                f"{self.checkpoint} is no whole checkpoint; remove it to start anew"
            ) from error
        if not isinstance(state, dict) or state.get("run") != asdict(self.run):
            raise ConfigError(
                f"{self.checkpoint} is of a run with other settings; remove it to start anew"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]

    def save(self) -> None:
        """Write the state."""
        state = {
            "run": asdict(self.run),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with _replacing(self.checkpoint) as draft:
            torch.save(state, draft)

    def run_epoch(self, progress: Callable[[int], None]) -> float:
        """Train for one epoch and return its mean loss; `progress` gets the steps done in all."""
        start = time.monotonic()
        # Seeded by epoch, so that a run that was stopped goes on as if it had not been.
        seed = self.run.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator, device=self.device)
        half = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        total = torch.zeros((), device=self.device)
        self.net.train()
        for step in range(self.steps):
            chosen = order[step * self.batch : (step + 1) * self.batch]
            images = self.train.augmented(chosen, generator)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                loss = self.loss(self.net(images), self.train.labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()
            progress(self.epoch * self.steps + step + 1)
        mean = float(total) / self.steps
        self.epoch += 1
        self.seconds += time.monotonic() - start
        return mean


def train_network(
    name: str,
    run: Run,
    images: Images,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Train one network and write `NAME_cifar10.onnx` and `NAME_cifar10.json`.

    Parameters
    ----------
    name : str
        What the files are called.
    run : Run
    images : Images
    folder : Path
        Where the files go, and the checkpoint of each epoch (`NAME_cifar10.checkpoint`).
    device : torch.device
    progress : callable or None, default None
        Called with the steps done, the steps in all, and a line on how it goes.

    Returns
    -------
    dict
        What is in the JSON file: accuracy (0 to 1) on held-out images, settings, seconds, device.

    Raises
    ------
    ConfigError
        Where there are too few images, or the checkpoint is damaged or of other settings.
    NetworkError
        Where the trained network cannot be exported.
    """
    positions, held_positions = _split(images, run)
    train = DeviceImages(images, positions, device)
    held_out = DeviceImages(images, held_positions, device)
    training = _Training(run, len(images.classes), train, folder / f"{name}_cifar10.checkpoint")
    training.resume()
    total_steps = run.recipe.epochs * training.steps
    line = name

    def step_done(steps: int) -> None:
        if progress is not None:
            progress(steps, total_steps, line)

    step_done(training.epoch * training.steps)
    while training.epoch < run.recipe.epochs:
        loss = training.run_epoch(step_done)
        training.save()
        accuracy = _accuracy(training.net, held_out)
        line = f"{name} epoch {training.epoch}: loss {loss:.3f}, held-out {accuracy:.2%}"
        step_done(training.epoch * training.steps)
    accuracy = _accuracy(training.net, held_out)
    net = training.net.cpu().to(memory_format=torch.contiguous_format)
    export_onnx(net, folder / f"{name}_cifar10.onnx", size=SIZE)
    report = {
        "network": run.recipe.network,
        "accuracy_held_out": accuracy,
        "images_held_out": len(held_out),
        "images_train": len(train),
        "classes": list(images.classes),
        "mean": list(PRESETS["cifar10"].mean),
        "std": list(PRESETS["cifar10"].std),
        "seed": run.seed,
        "recipe": asdict(run.recipe),
        "archive_sha256": images.digest,
        "seconds": round(training.seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    with _replacing(folder / f"{name}_cifar10.json") as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, or this torch is built without it
        raise ConfigError(f"there is no device {name!r} here; give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not tried for training; give auto, cpu or cuda")
    return device


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    archive: Annotated[
        Path,
        typer.Option(
            help="tar of 32×32 images in class folders.",
            show_default="../shared/data/cifar10/train.tar.gz",
        ),
    ] = ROOT.parent / "shared" / "data" / "cifar10" / "train.tar.gz",
    out: Annotated[
        Path,
        typer.Option(help="Folder for networks, checkpoints, cache.", show_default="references"),
    ] = ROOT / "references",
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(RECIPES)}; may be repeated.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs, where not the recipe's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many images, for a smoke test.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random values.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train the 32×32 reference networks and write them as ONNX files."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        names = only or list(RECIPES)
        unknown = [name for name in names if name not in RECIPES]
        if unknown:
            raise ConfigError(f"there is no recipe {unknown[0]}; choose of {', '.join(RECIPES)}")
        place = _device(device)
        # Every batch has one shape: let cuDNN time its algorithms once.
        torch.backends.cudnn.benchmark = place.type == "cuda"
        if not archive.is_file():
            raise CalibrationError(f"there is no archive {archive}; give --archive")
        out.mkdir(parents=True, exist_ok=True)
        with console.status(f"reading {archive}"):
            images = load_images(archive, out)
        for name in names:
            recipe = RECIPES[name]
            if epochs is not None:
                recipe = replace(recipe, epochs=epochs)
            run = Run(recipe, seed, limit, images.digest)
            _train_in_sight(name, run, images, out, place, console)
    except (ConverterError, NetworkError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"Error: {error}", markup=False)
        code = error.exit_code if isinstance(error, ConverterError) else 2
        raise typer.Exit(code) from error


def _train_in_sight(
    name: str, run: Run, images: Images, out: Path, device: torch.device, console: Console
) -> None:
    """Train under a progress bar and print the result."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        report = train_network(
            name,
            run,
            images,
            out,
            device,
            lambda done, total, line: bar.update(
                task, completed=done, total=total, description=line
            ),
        )
    console.print(
        f"wrote {out / f'{name}_cifar10.onnx'}: {report['accuracy_held_out']:.2%} of "
        f"{report['images_held_out']} held-out images, {report['seconds']} s on {report['device']}",
        markup=False,
    )


if __name__ == "__main__":
    app(prog_name="python -m tools.train_reference")
