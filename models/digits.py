"""A small VGG-like network for scikit-learn's bundled digits, trained in place within a minute.

The digits are 1,797 gray images of 8×8; they are enlarged to 16×16 here, so that Convs have room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from models.errors import NetworkError
from models.weights import initialise

__all__ = [
    "SIZE",
    "DigitsNet",
    "DigitsSplit",
    "digits_accuracy",
    "digits_images",
    "split_digits",
    "train_digits",
    "write_digits_folder",
]

SIZE = 16
"""Side of the images, in pixels."""

_BATCH = 64
_VAL_SHARE = 0.2
_CALIB_IMAGES = 400


class DigitsNet(nn.Module):
    """Six 3×3 Convs with BatchNorm in three stages, one Linear: (n, 1, 16, 16) float32 → (n, 10).

    Input is pixel/255, from 0 to 1.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs in (64, 128, 256):
            for _ in range(2):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(256 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


@dataclass(frozen=True)
class DigitsSplit:
    """Which images serve what; indices into `digits_images()`, each class in proportion.

    Attributes
    ----------
    train, calib, val : ndarray of int, sorted
        `calib` is part of `train`; `val` shares no image with either.
    """

    train: NDArray[np.intp]
    calib: NDArray[np.intp]
    val: NDArray[np.intp]


def digits_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits, enlarged twice (bilinear).

    Returns
    -------
    images : ndarray of shape (1797, 16, 16), uint8
        Gray, 0 (background) to 255.
    labels : ndarray of shape (1797,), int64
        0 to 9.
    """
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # their pixels are 0 to 16
    bilinear = Image.Resampling.BILINEAR
    images = np.stack(
        [np.asarray(Image.fromarray(s).resize((SIZE, SIZE), bilinear)) for s in small]
    )
    return images, digits.target.astype(np.int64)


def split_digits(labels: NDArray[np.int64], seed: int = 0) -> DigitsSplit:
    """Split by class: four fifths train, 400 of these calibrate; the last fifth is val."""
    indices = np.arange(len(labels))
    train, val = train_test_split(indices, test_size=_VAL_SHARE, stratify=labels, random_state=seed)
    _, calib = train_test_split(
        train, test_size=_CALIB_IMAGES, stratify=labels[train], random_state=seed
    )
    return DigitsSplit(np.sort(train), np.sort(calib), np.sort(val))


def _as_input(images: NDArray[np.uint8]) -> Tensor:
    """(n, 16, 16) uint8 → (n, 1, 16, 16) float32 from 0 to 1."""
    return torch.from_numpy(images[:, None].astype(np.float32) / 255)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread within.

    So small a network gains little from more, and where cores are busy OpenMP's threads wait for
    each other by spinning: two threads were eight times slower than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_digits(
    seed: int = 0,
    epochs: int = 4,
    progress: Callable[[int, float], None] | None = None,
) -> DigitsNet:
    """Train `DigitsNet` on the train part of `split_digits(labels, seed)`, on the CPU.

    Parameters
    ----------
    seed : int, default 0
        Seed of the split, the initial weights and the order of the images.
    epochs : int, default 4
        Passes over the train part, from 1.
    progress : callable or None, default None
        Called after each epoch with its number, from 1, and its mean loss.

    Returns
    -------
    DigitsNet
        In eval mode.

    Raises
    ------
    NetworkError
        Where `epochs` is below 1.
    """
    if epochs < 1:
        raise NetworkError(f"{epochs} epochs train nothing; give --epochs 1 or more")
    images, labels = digits_images()
    split = split_digits(labels, seed)
    x, y = _as_input(images[split.train]), torch.from_numpy(labels[split.train])
    net = DigitsNet()
    with _one_thread():
        initialise(net, seed, size=SIZE, channels=1)
        for epoch, loss in enumerate(_train(net, x, y, seed, epochs), start=1):
            if progress is not None:
                progress(epoch, loss)
    return net.eval()


def _train(net: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int) -> Iterator[float]:
    """Train `net` in place and yield the mean loss of each epoch."""
    net.train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.03, total_steps=epochs * steps
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(x), generator=generator), _BATCH):
            loss = loss_of(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        yield total / len(x)


def digits_accuracy(net: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return the share of `images` (n, 16, 16) that `net` classifies rightly, from 0 to 1."""
    with torch.no_grad():
        answers = net(_as_input(images)).argmax(1).numpy()
    return float((answers == labels).mean())


def write_digits_folder(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Write `images` (n, h, w) as gray PNG files `folder/<class>/<position>.png`.

    The same images may be written again over themselves.

    Raises
    ------
    NetworkError
        Where the folder already holds anything else.
    """
    paths = [folder / str(c) / f"{i:04d}.png" for i, c in enumerate(labels.tolist())]
    expected = {*paths, *(path.parent for path in paths)}
    foreign = next((p for p in sorted(folder.rglob("*")) if p not in expected), None)
    if foreign is not None or folder.is_file():
        raise NetworkError(
            f"{foreign or folder} is in the way of the digits; remove it or choose another --out"
        )
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
