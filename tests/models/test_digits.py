"""The digits: their images, their split, their training, their folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import NetworkError
from models.digits import (
    DigitsNet,
    digits_accuracy,
    digits_images,
    split_digits,
    train_digits,
    write_digits_folder,
)


def test_images() -> None:
    images, labels = digits_images()
    assert (images.shape, images.dtype) == ((1797, 16, 16), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.int64)
    assert (images.min(), images.max()) == (0, 255)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_split_is_seeded_stratified_and_keeps_val_apart() -> None:
    _, labels = digits_images()
    split, again, other = split_digits(labels, 1), split_digits(labels, 1), split_digits(labels, 2)
    assert set(split.calib) < set(split.train)
    assert not set(split.val) & set(split.train)
    assert len(split.train) + len(split.val) == len(labels)
    assert (len(split.calib), len(split.val)) == (400, 360)
    assert np.array_equal(split.val, again.val)
    assert not np.array_equal(split.val, other.val)
    for part in (split.train, split.calib, split.val):
        share = np.bincount(labels[part]) / len(part)
        # whole images: each class is within two of its share
        np.testing.assert_allclose(share, np.bincount(labels) / len(labels), atol=2 / len(part))


def test_network_takes_gray_images() -> None:
    assert DigitsNet()(torch.rand(3, 1, 16, 16)).shape == (3, 10)


def test_training_learns_and_follows_its_seed() -> None:
    heard: list[tuple[int, float]] = []
    threads = torch.get_num_threads()
    net = train_digits(seed=0, epochs=1, progress=lambda epoch, loss: heard.append((epoch, loss)))
    assert torch.get_num_threads() == threads
    assert not net.training
    assert [epoch for epoch, _ in heard] == [1]
    images, labels = digits_images()
    val = split_digits(labels, 0).val
    # chance is 0.1; one epoch came to 0.96 and more with each of three seeds
    assert digits_accuracy(net, images[val], labels[val]) > 0.8


def test_accuracy_counts_what_is_right() -> None:
    net = DigitsNet().eval()
    torch.nn.init.zeros_(net.classifier.weight)
    with torch.no_grad():
        net.classifier.bias.copy_(torch.eye(10)[3])
    images = np.zeros((4, 16, 16), np.uint8)
    assert digits_accuracy(net, images, np.array([3, 1, 3, 3])) == 0.75


def test_training_without_epochs_is_refused() -> None:
    with pytest.raises(NetworkError, match="0 epochs train nothing"):
        train_digits(epochs=0)


def test_folder_holds_the_images_by_class_and_may_be_written_again(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16), np.uint8)
    labels = np.array([3, 3, 0, 9, 3])
    for _ in range(2):
        write_digits_folder(tmp_path / "calib", images, labels)
    files = sorted((tmp_path / "calib").rglob("*.png"))
    assert [file.parent.name for file in files] == ["0", "3", "3", "3", "9"]
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), images[int(file.stem)])


def test_other_files_in_the_folder_are_in_the_way(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 16, 16), np.uint8), np.array([0, 1])
    write_digits_folder(tmp_path, images, labels)
    with pytest.raises(NetworkError, match="1 is in the way"):
        write_digits_folder(tmp_path, images[:1], labels[:1])
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(NetworkError, match="blocked is in the way"):
        write_digits_folder(blocked, images, labels)
