"""Training of the reference networks, on a tiny archive that is made here."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from converter.config import PRESETS
from converter.errors import CalibrationError, ConfigError
from models import NETWORKS
from tools import train_reference
from tools.train_reference import (
    RECIPES,
    DeviceImages,
    Images,
    Recipe,
    Run,
    app,
    load_images,
    train_network,
)

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: on busy cores torch's threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(colour: tuple[int, int, int], seed: int, size: int = 32) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(-30, 31, (size, size, 3))
    return (np.array(colour) + noise).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of a dozen pictures, not in order, beside files of other kinds."""
    files = {"train/README.txt": b"not an image"}
    for i in range(12):
        for c, (name, colour) in enumerate(reversed(COLOURS.items())):
            files[f"train/{name}/{i:02d}.png"] = encoded(picture(colour, 100 * c + i))
    return write_archive(tmp_path_factory.mktemp("archive") / "train.tar.gz", files)


@pytest.fixture(scope="module")
def images(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    return load_images(archive, tmp_path_factory.mktemp("cache"))


def small_run(images: Images, **changes: object) -> Run:
    recipe = Recipe("resnet20", epochs=2, rate=0.05, batch=8)
    return replace(Run(recipe, seed=0, limit=None, digest=images.digest), **changes)


def test_images_are_sorted_by_class_and_name(images: Images) -> None:
    assert images.classes == ("blue", "green", "red")
    assert (images.pixels.shape, images.pixels.dtype) == ((36, 32, 32, 3), np.uint8)
    assert images.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert np.array_equal(images.pixels[3], picture(COLOURS["blue"], 203))
    assert np.array_equal(images.pixels[35], picture(COLOURS["red"], 11))


def test_decoded_images_come_from_the_cache(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_images(archive, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"images-{first.digest}.npz"]
    monkeypatch.delattr(train_reference, "_read_archive")
    again = load_images(archive, tmp_path)
    assert np.array_equal(again.pixels, first.pixels)
    assert np.array_equal(again.labels, first.labels)
    assert again[2:] == first[2:]


def test_another_archive_is_not_mistaken_for_the_cached_one(archive: Path, tmp_path: Path) -> None:
    load_images(archive, tmp_path)
    files = {f"{c}/0.jpg": encoded(picture(COLOURS[c], 0), "JPEG") for c in ("red", "blue")}
    other = load_images(write_archive(tmp_path / "other.tar.gz", files), tmp_path)
    assert other.classes == ("blue", "red")
    assert other.pixels.shape == (2, 32, 32, 3)


GOOD = {f"{c}/0.png": encoded(picture(colour, 0)) for c, colour in COLOURS.items()}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({**GOOD, "red/1.png": b"no image"}, "red/1.png is no readable JPEG or PNG"),
        ({**GOOD, "red/1.png": GOOD["red/0.png"][:200]}, "red/1.png is no readable JPEG or PNG"),
        ({**GOOD, "red/1.png": encoded(picture((9, 9, 9), 0, 31))}, "has 31×31 pixels instead of"),
        ({**GOOD, "red/1.jpg": bytes((1 << 20) + 1)}, "is above 1 MiB or in no class folder"),
        ({**GOOD, "1.png": GOOD["red/0.png"]}, "1.png is above 1 MiB or in no class folder"),
        ({"red/0.png": GOOD["red/0.png"]}, "holds images of 1 classes"),
        ({"red/readme.txt": b"text"}, "holds images of 0 classes"),
    ],
)
def test_archives_that_do_not_fit_are_refused(
    files: dict[str, bytes], complaint: str, tmp_path: Path
) -> None:
    path = write_archive(tmp_path / "bad.tar.gz", files)
    with pytest.raises(CalibrationError, match=complaint):
        load_images(path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [0, 10, 3000, -3000])
def test_damaged_archives_are_refused(cut: int, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(CalibrationError, match=r"cut\.tar\.gz"):
        load_images(path, tmp_path)


def test_a_missing_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.tar cannot be read: No such file"):
        load_images(tmp_path / "none.tar", tmp_path)


def test_links_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as out:
        for name, content in GOOD.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("red/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    assert len(load_images(path, tmp_path).labels) == 3


def test_plain_images_are_what_the_preset_says(images: Images) -> None:
    chosen = np.array([0, 20, 35])
    device_images = DeviceImages(images, chosen, CPU)
    preset = PRESETS["cifar10"]
    expected = (images.pixels[chosen] * preset.scale - preset.mean) / preset.std
    got = device_images.plain(torch.arange(3))
    np.testing.assert_allclose(got.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    assert device_images.labels.tolist() == [0, 1, 2]
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_augmented_images_are_shifted_and_mirrored_ones(images: Images) -> None:
    device_images = DeviceImages(images, np.array([5]), CPU)
    seen: set[tuple[int, int, bool]] = set()
    generator = torch.Generator().manual_seed(0)
    got = device_images.augmented(torch.zeros(64, dtype=torch.long), generator)
    padded = np.pad(images.pixels[5], ((4, 4), (4, 4), (0, 0)))
    preset = PRESETS["cifar10"]
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = (padded[y : y + 32, x : x + 32] * preset.scale - preset.mean) / preset.std
            crops[y, x, False], crops[y, x, True] = crop, crop[:, ::-1]
    for image in got.permute(0, 2, 3, 1).numpy():
        matches = [key for key, crop in crops.items() if np.allclose(image, crop, atol=1e-5)]
        assert len(matches) == 1
        seen.update(matches)
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))


@pytest.mark.parametrize("limit", [None, 18])
def test_split_holds_out_some_of_each_class(limit: int | None, images: Images) -> None:
    train, held_out = train_reference._split(images, small_run(images, limit=limit))
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == (limit or 36)
    assert np.bincount(images.labels[held_out]).tolist() == [1, 1, 1]
    assert len(set(np.bincount(images.labels[train]))) == 1
    other = train_reference._split(images, small_run(images, limit=limit, seed=1))
    assert not np.array_equal(held_out, other[1])


def test_training_learns_and_writes_what_it_did(images: Images, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    run = small_run(images, recipe=Recipe("resnet20", epochs=8, rate=0.05, batch=8))
    report = train_network(
        "tiny", run, images, tmp_path, CPU, lambda done, total, _: heard.append((done, total))
    )
    # 33 images in batches of 8, the last of which is dropped
    assert heard[0] == (0, 32)
    assert heard[-1] == (32, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"tiny_cifar10.{kind}" for kind in ("checkpoint", "json", "onnx")
    ]
    assert json.loads((tmp_path / "tiny_cifar10.json").read_text()) == report
    assert report["accuracy_held_out"] == 1.0  # three colours, far apart
    assert report["images_held_out"] == 3
    assert report["images_train"] == 33
    assert report["classes"] == ["blue", "green", "red"]
    assert tuple(report["mean"]) == PRESETS["cifar10"].mean
    assert report["device"] == "cpu"
    assert report["seconds"] > 0
    assert report["recipe"] == asdict(run.recipe)
    output = onnx.load(tmp_path / "tiny_cifar10.onnx").graph.output[0]
    assert output.type.tensor_type.shape.dim[1].dim_value == 3


class StoppedError(Exception):
    """Stands for the power cut."""


def test_a_stopped_run_goes_on_as_if_it_had_not_been(images: Images, tmp_path: Path) -> None:
    run = small_run(images)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    train_network("tiny", run, images, whole, CPU)

    def stop(done: int, _total: int, _line: str) -> None:
        if done == 6:  # in the second epoch of four steps each
            raise StoppedError

    with pytest.raises(StoppedError):
        train_network("tiny", run, images, halves, CPU, stop)
    assert [p.name for p in halves.iterdir()] == ["tiny_cifar10.checkpoint"]
    heard: list[int] = []
    train_network("tiny", run, images, halves, CPU, lambda done, _total, _line: heard.append(done))
    assert heard[0] == 4
    written = [(f / "tiny_cifar10.onnx").read_bytes() for f in (whole, halves)]
    assert written[0] == written[1]

    with pytest.raises(ConfigError, match=r"of a run with other settings; remove it"):
        train_network("tiny", replace(run, seed=1), images, halves, CPU)
    checkpoint = halves / "tiny_cifar10.checkpoint"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="no whole checkpoint; remove it"):
        train_network("tiny", run, images, halves, CPU)


def test_recipes_are_of_32_pixel_networks() -> None:
    assert set(RECIPES) == {"vgg16", "alexnet", "googlenet", "resnet20", "resnet56"}
    assert {NETWORKS[recipe.network].size for recipe in RECIPES.values()} == {32}


def typed(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_command_line(archive: Path, tmp_path: Path) -> None:
    words = ("--archive", archive, "--out", tmp_path / "references", "--limit", 12, "--epochs", 1)
    code, printed, complaints = typed(*words, "--only", "resnet20", "--device", "cpu")
    assert (code, complaints) == (0, "")
    assert "3 held-out images" in printed
    assert (tmp_path / "references" / "resnet20_cifar10.onnx").is_file()
    report = json.loads((tmp_path / "references" / "resnet20_cifar10.json").read_text())
    assert report["recipe"]["epochs"] == 1


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (("--only", "resnet21"), 2, "there is no recipe resnet21"),
        (("--device", "warp"), 2, "there is no device 'warp' here"),
        (("--device", "meta"), 2, "device 'meta' is not tried"),
        (("--only", "resnet20", "--limit", "4"), 2, "raise --limit"),
        (("--archive", "none.tar.gz"), 4, "there is no archive none.tar.gz"),
    ],
)
def test_command_line_errors_are_one_sentence(
    words: tuple[str, ...], code: int, complaint: str, archive: Path, tmp_path: Path
) -> None:
    got, _, complaints = typed("--archive", archive, "--out", tmp_path, *words)
    assert got == code
    assert complaint in complaints
    assert complaints.startswith("Error: ")
    assert complaints.count("\n") == 1
