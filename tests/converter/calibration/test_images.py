from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from converter.calibration.images import (
    open_image,
    prepare_image,
    resolve_preprocessing,
    thumbnail,
)
from converter.config import PRESETS, Preprocessing, preprocessing_from_options
from converter.errors import CalibrationError, ConfigError
from converter.limits import PIXELS

RAW = Preprocessing(scale=1.0)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def refused(source: Path, preprocessing: Preprocessing = RAW, side: int = 8) -> str:
    with pytest.raises(CalibrationError) as caught:
        prepare_image(source, preprocessing, (side, side), 3)
    message = str(caught.value)
    assert source.name in message
    assert ";" in message
    assert "\n" not in message
    return message


# Formats and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tiff", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.ppm", {}),
        ("a.webp", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    pixels = noise(6, 9)
    x = prepare_image(saved(tmp_path / name, pixels, **options), RAW, (6, 9), 3)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, pixels.transpose(2, 0, 1))


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    pixels = noise(6, 9)
    path = saved(tmp_path / "a.jpg", pixels, format="PNG")
    np.testing.assert_array_equal(prepare_image(path, RAW, (6, 9), 3), pixels.transpose(2, 0, 1))


def test_jpeg_is_close_to_what_was_saved(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (32, 32, 3))
    path = saved(tmp_path / "a.jpeg", np.ascontiguousarray(ramp), quality=95)
    # A smooth gray ramp: what is lost is rounding in the DCT.
    np.testing.assert_allclose(
        prepare_image(path, RAW, (32, 32), 3), ramp.transpose(2, 0, 1), atol=4
    )


def test_a_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    x = prepare_image(tmp_path / "a.gif", RAW, (4, 4), 3)
    np.testing.assert_array_equal(x[:, 0, 0], [255, 0, 0])


def test_transparency_is_dropped_and_the_colour_kept(tmp_path: Path) -> None:
    pixels = noise(5, 5, 4)
    x = prepare_image(saved(tmp_path / "a.png", pixels), RAW, (5, 5), 3)
    np.testing.assert_array_equal(x, pixels[..., :3].transpose(2, 0, 1))
    Image.new("LA", (5, 5), (9, 0)).save(tmp_path / "la.png")
    assert np.unique(prepare_image(tmp_path / "la.png", RAW, (5, 5), 3)).tolist() == [9]


@pytest.mark.parametrize("transparent", [None, 1, b"\x00\x80\xff"])
def test_palettes_give_their_colours(tmp_path: Path, transparent: int | bytes | None) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options: dict[str, Any] = {} if transparent is None else {"transparency": transparent}
    image.save(tmp_path / "p.png", **options)
    x = prepare_image(tmp_path / "p.png", RAW, (1, 3), 3)
    np.testing.assert_array_equal(x[:, 0].T, [[10, 20, 30], [40, 50, 60], [70, 80, 90]])


def test_one_bit_pixels_are_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    x = prepare_image(tmp_path / "b.png", RAW, (1, 2), 3)
    np.testing.assert_array_equal(x, np.broadcast_to([[255, 0]], (3, 1, 2)))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    image.save(tmp_path / "c.tiff")
    x = prepare_image(tmp_path / "c.tiff", RAW, (8, 8), 3)
    np.testing.assert_array_equal(x[:, 0, 0], [255, 0, 0])
    image.save(tmp_path / "c.jpg", quality=95)
    x = prepare_image(tmp_path / "c.jpg", RAW, (8, 8), 3)
    np.testing.assert_allclose(x[:, 0, 0], [255, 0, 0], atol=4)


@pytest.mark.parametrize("name", ["g.png", "g.tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    x = prepare_image(saved(tmp_path / name, values), RAW.replace(channels="gray"), (1, 4), 1)
    np.testing.assert_array_equal(x, [[[0, 1, 128, 255]]])


@pytest.mark.parametrize("most", [1023, 65535])
def test_a_pgm_file_s_own_maximum_counts(tmp_path: Path, most: int) -> None:
    values = np.array([0, most // 2, most], ">u2")
    (tmp_path / "g.pgm").write_bytes(b"P5 3 1 %d\n" % most + values.tobytes())
    x = prepare_image(tmp_path / "g.pgm", RAW.replace(channels="gray"), (1, 3), 1)
    np.testing.assert_allclose(x, [[[0, 127.5, 255]]], atol=0.51)  # whole pixels


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, dtype: type[np.generic]) -> None:
    path = saved(tmp_path / "f.tiff", np.ones((8, 8), dtype))
    assert "32-bit" in refused(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_camera_says(tmp_path: Path, orientation: int) -> None:
    upright = noise(4, 6)
    # How the stored image must look so that its orientation leads to the upright one.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
        ("a.tiff", {}),
        ("lzw.tiff", {"compression": "tiff_lzw"}),
    ):
        path = saved(tmp_path / name, np.ascontiguousarray(stored), exif=exif, **options)
        x = prepare_image(path, RAW, (4, 6), 3)
        np.testing.assert_array_equal(x, upright.transpose(2, 0, 1))


# Bad files ------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    for name in ("text.png", "empty.jpg", "script.png"):
        assert "cannot be read" in refused(tmp_path / name)
    assert "No such file" in refused(tmp_path / "absent.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tiff", "a.ppm", "a.gif"])
def test_truncated_images_are_refused(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    whole = Image.fromarray(noise(16, 16))
    whole.save(buffer, format=Image.registered_extensions()[Path(name).suffix])
    path = tmp_path / name
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert "cannot be read" in refused(path, side=16)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=64), st.integers(0, 120), st.sampled_from(["PNG", "BMP", "PPM", "GIF"]))
def test_damaged_images_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int, kind: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(6, 6)).save(buffer, format=kind)
    data = bytearray(buffer.getvalue())
    data[at : at + len(damage)] = damage
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        said = str(prepare_image(path, RAW, (6, 6), 3).shape)
    except CalibrationError as error:
        said = str(error)
    assert said == "(3, 6, 6)" or ("damaged" in said and "\n" not in said)


def bomb(path: Path, width: int, height: int) -> Path:
    """Write a small PPM file that claims so many pixels."""
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + b"\0" * 64)
    return path


@pytest.mark.parametrize(
    "height", [PIXELS.default // 1000 + 1, 2 * PIXELS.default // 1000 + 9, 10**9]
)
def test_decompression_bombs_are_refused_without_a_warning(tmp_path: Path, height: int) -> None:
    path = bomb(tmp_path / "bomb.ppm", 1000, height)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "pixels; make it smaller" in refused(path)
    assert not caught


def test_a_large_image_is_read_where_the_limit_is_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (40, 30)).save(path)
    monkeypatch.setenv("TWOFOLD_MAX_PIXELS", "1199")
    assert "set TWOFOLD_MAX_PIXELS above 1199" in refused(path)
    monkeypatch.setenv("TWOFOLD_MAX_PIXELS", "1200")
    with open_image(path) as image:
        assert image.size == (40, 30)
    monkeypatch.setenv("TWOFOLD_MAX_PIXELS", "300000000")
    with open_image(bomb(tmp_path / "wide.ppm", 1000, 250_000)) as image:
        assert image.height == 250_000


def test_bombs_are_refused_where_pillow_s_own_check_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "pixels; make it smaller" in refused(bomb(tmp_path / "bomb.ppm", 1000, 10**6))


def test_settings_of_the_whole_program_stay_as_they_were(tmp_path: Path) -> None:
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    refused(bomb(tmp_path / "bomb.ppm", 1000, 10**6))
    open_image(saved(tmp_path / "a.png", noise(4, 4))).close()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_an_elongated_image_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = saved(tmp_path / "line.png", np.zeros((1, 60000), np.uint8))
    message = refused(path, RAW.replace(resize=256), side=224)
    assert "15360000x256" in message


# Resize and crop ------------------------------------------------------------------------------


def torchvision_geometry(
    width: int, height: int, resize: int, crop: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes and corner as torchvision 0.20 computes them, written out again."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize, int(resize * long / short)
    size = (new_short, new_long) if width <= height else (new_long, new_short)
    top = round((size[1] - crop) / 2.0)
    left = round((size[0] - crop) / 2.0)
    return size, (left, top)


def antialiased(plane: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Resize the first axis with the triangle filter, widened where the image shrinks."""
    count = plane.shape[0]
    scale = count / size
    support = max(scale, 1.0)
    out = np.empty((size, *plane.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs((np.arange(count) + 0.5 - centre) / support))
        out[i] = np.tensordot(weights / weights.sum(), plane, 1)
    return out


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    resize=st.integers(8, 40),
    less=st.integers(0, 7),
)
def test_resize_and_crop_agree_with_a_plain_reference(
    tmp_path: Path, width: int, height: int, resize: int, less: int
) -> None:
    crop = resize - less
    pixels = noise(height, width, seed=width)
    path = saved(tmp_path / "a.png", pixels)
    x = prepare_image(path, RAW.replace(resize=resize), (crop, crop), 3)
    (new_width, new_height), (left, top) = torchvision_geometry(width, height, resize, crop)
    whole = antialiased(antialiased(pixels, new_height).transpose(1, 0, 2), new_width)
    expected = whole.transpose(2, 1, 0)[:, top : top + crop, left : left + crop]
    # Pillow rounds to whole pixels after each of the two directions.
    np.testing.assert_allclose(x, expected, atol=1.01)


def test_without_resize_the_image_is_brought_straight_to_the_size(tmp_path: Path) -> None:
    pixels = noise(10, 30)
    x = prepare_image(saved(tmp_path / "a.png", pixels), RAW, (20, 15), 3)
    expected = antialiased(antialiased(pixels, 20).transpose(1, 0, 2), 15).transpose(2, 1, 0)
    np.testing.assert_allclose(x, expected, atol=1.01)


def test_crop_none_takes_only_what_fits(tmp_path: Path) -> None:
    whole = RAW.replace(resize=8, crop="none")
    square = saved(tmp_path / "square.png", noise(16, 16))
    assert prepare_image(square, whole, (8, 8), 3).shape == (3, 8, 8)
    message = refused(saved(tmp_path / "wide.png", noise(16, 20)), whole)
    assert "10x8" in message
    assert "--crop center" in message


def test_a_crop_larger_than_the_resized_image_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise(16, 16))
    assert "--resize" in refused(path, RAW.replace(resize=6))


# Arithmetic and layout ------------------------------------------------------------------------


def test_scale_mean_and_std_come_in_this_order(tmp_path: Path) -> None:
    pixels = noise(4, 4)
    x = prepare_image(saved(tmp_path / "a.png", pixels), PRESETS["cifar10"], (4, 4), 3)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(x, expected, atol=2e-6)  # float32 round-off at values up to 2


def test_bgr_turns_the_channels_and_keeps_the_settings_order(tmp_path: Path) -> None:
    pixels = noise(4, 4)
    bgr = Preprocessing(scale=1.0, channels="bgr", mean=(1.0, 2.0, 3.0), layout="nhwc")
    x = prepare_image(saved(tmp_path / "a.png", pixels), bgr, (4, 4), 3)
    np.testing.assert_array_equal(x, pixels[..., ::-1].astype(np.float32) - [1, 2, 3])
    assert x.flags.c_contiguous


@pytest.mark.parametrize(("layout", "shape"), [("nchw", (1, 4, 6)), ("nhwc", (4, 6, 1))])
def test_gray_is_the_luma(tmp_path: Path, layout: str, shape: tuple[int, ...]) -> None:
    pixels = noise(4, 6)
    gray = RAW.replace(channels="gray", layout=layout)
    x = prepare_image(saved(tmp_path / "a.png", pixels), gray, (4, 6), 1)
    assert x.shape == shape
    # ITU-R 601-2, rounded to whole pixels.
    np.testing.assert_allclose(x.squeeze(), pixels @ [0.299, 0.587, 0.114], atol=0.51)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_types_are_cast_at_the_end(tmp_path: Path, dtype: type) -> None:
    path = saved(tmp_path / "a.png", noise(4, 4))
    x = prepare_image(path, PRESETS["cifar10"], (4, 4), 3, dtype)
    assert x.dtype == dtype
    single = prepare_image(path, PRESETS["cifar10"], (4, 4), 3)
    np.testing.assert_array_equal(x, single.astype(dtype))


def test_uint8_keeps_the_pixels(tmp_path: Path) -> None:
    pixels = noise(4, 4)
    path = saved(tmp_path / "a.png", pixels)
    x = prepare_image(path, PRESETS["cifar10"].replace(layout="nhwc"), (4, 4), 3, np.uint8)
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, pixels)


def test_channels_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise(4, 4))
    with pytest.raises(CalibrationError, match="--channels gray"):
        prepare_image(path, RAW, (4, 4), 1)
    with pytest.raises(CalibrationError, match="npz"):
        prepare_image(path, RAW, (4, 4), 4)


# Settings against the model's input -----------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocessing", "shape", "size", "resize"),
    [
        (RAW, ("n", 3, 32, 48), (32, 48), None),
        (RAW, (None, None, 32, 48), (32, 48), None),
        (RAW.replace(layout="nhwc"), (4, 32, 48, 3), (32, 48), None),
        (RAW.replace(size=(16, 20)), ("n", 3, "h", "w"), (16, 20), None),
        (RAW.replace(size=(16, 20)), ("n", 3, 16, "w"), (16, 20), None),
        (RAW.replace(channels="gray"), (1, 1, 28, 28), (28, 28), None),
        # imagenet's resize belongs to 224; elsewhere it is in proportion to the longer side.
        (PRESETS["imagenet"], ("n", 3, 224, 224), (224, 224), 256),
        (PRESETS["imagenet"], ("n", 3, 299, 299), (299, 299), 342),
        (PRESETS["imagenet"], ("n", 3, 32, 32), (32, 32), 37),
        (PRESETS["imagenet"], ("n", 3, 112, 224), (112, 224), 256),
        # With a size in the settings, and for any other number, resize is what it says.
        (PRESETS["imagenet"].replace(size=(192, 192)), ("n", 3, 192, 192), (192, 192), 256),
        (RAW.replace(resize=250), ("n", 3, 192, 192), (192, 192), 250),
        (RAW.replace(resize=256), ("n", 3, 192, 192), (192, 192), 256),
        (PRESETS["imagenet"].replace(resize=256), ("n", 3, 192, 192), (192, 192), 256),
        (preprocessing_from_options("imagenet", resize=256), ("n", 3, 192, 192), (192, 192), 256),
        (preprocessing_from_options("imagenet"), ("n", 3, 192, 192), (192, 192), 219),
    ],
)
def test_settings_are_completed_from_the_model(
    preprocessing: Preprocessing,
    shape: tuple[int | str | None, ...],
    size: tuple[int, int],
    resize: int | None,
) -> None:
    resolved = resolve_preprocessing(preprocessing, shape)
    assert resolved == preprocessing.replace(size=size, resize=resize)


@pytest.mark.parametrize(
    ("preprocessing", "shape", "words"),
    [
        (RAW, ("n", 3, "h", "w"), "--size 224"),
        (RAW, ("n", 3, 32, None), "--size 224"),
        (RAW.replace(size=(32, 32)), ("n", 3, 32, 28), "leave --size out"),
        (RAW, ("n", 1, 28, 28), "--channels gray"),
        (RAW.replace(channels="gray"), ("n", 3, 28, 28), "--channels rgb"),
        (RAW, ("n", 28, 28, 3), "--layout nhwc"),
        (RAW, ("n", 28, 28, 1), "--layout nhwc"),
        (RAW.replace(layout="nhwc"), ("n", 3, 28, 28), "--layout nchw"),
        (RAW, ("n", 4, 28, 28), "npz"),
        (RAW, ("n", 10), "npy"),
        (RAW, (), "npy"),
        (RAW, ("n", 3, 8, 8, 8), "npy"),
        (RAW.replace(resize=200), ("n", 3, 224, 224), "--resize 224"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    preprocessing: Preprocessing, shape: tuple[int | str | None, ...], words: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        resolve_preprocessing(preprocessing, shape)
    assert words in str(caught.value)
    assert ";" in str(caught.value)


# Options as typed -----------------------------------------------------------------------------


def test_no_options_give_the_preset_itself() -> None:
    for name, preset in PRESETS.items():
        assert preprocessing_from_options(name) == preset
    assert preprocessing_from_options() == Preprocessing()


def test_options_lie_over_the_preset() -> None:
    made = preprocessing_from_options(
        "cifar10",
        size="24x32",
        resize=40,
        crop="none",
        layout="nhwc",
        scale=1.0,
        mean="0.485,0.456, 0.406",
        std="2",
    )
    assert made == Preprocessing(
        size=(24, 32),
        resize=40,
        crop="none",
        layout="nhwc",
        scale=1.0,
        mean=(0.485, 0.456, 0.406),
        std=(2.0,),
    )
    assert preprocessing_from_options("unit", channels="gray").channels == "gray"


def test_a_size_scales_the_preset_s_resize_unless_that_is_given_too() -> None:
    assert preprocessing_from_options("imagenet", size="299").resize == 342
    assert preprocessing_from_options("imagenet", size="299", resize=320).resize == 320
    assert preprocessing_from_options("imagenet", resize=320).resize == 320
    assert preprocessing_from_options("cifar10", size="299").resize is None


def test_bgr_turns_the_preset_s_numbers_but_not_those_given() -> None:
    imagenet = PRESETS["imagenet"]
    made = preprocessing_from_options("imagenet", channels="bgr")
    assert (made.mean, made.std) == (imagenet.mean[::-1], imagenet.std[::-1])
    made = preprocessing_from_options("imagenet", channels="bgr", mean="0.1,0.2,0.3")
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), imagenet.std[::-1])


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "imagnet"},
        {"size": "224x"},
        {"size": "x224"},
        {"size": "224x224x3"},
        {"size": "-1"},
        {"size": "0"},
        {"size": "99999"},
        {"size": "٣٢"},
        {"size": ""},
        {"resize": 0},
        {"crop": "middle"},
        {"layout": "chw"},
        {"channels": "rgba"},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"mean": "0.1,0.2"},
        {"mean": "0.1,,0.2"},
        {"mean": "a"},
        {"mean": "nan"},
        {"std": "1,0,1"},
        {"std": ""},
        {"preset": "cifar10", "channels": "gray"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        preprocessing_from_options(**options)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


# Small copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "small"), [((300, 600), (64, 128)), ((20, 30), (20, 30))])
def test_thumbnails_are_small_jpegs(
    tmp_path: Path, size: tuple[int, int], small: tuple[int, int]
) -> None:
    content = thumbnail(saved(tmp_path / "a.png", noise(*size)))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert (image.height, image.width) == small
    assert len(content) < 2**15


def test_thumbnails_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = saved(tmp_path / "a.jpg", noise(20, 40), exif=exif)
    with Image.open(io.BytesIO(thumbnail(path))) as image:
        assert (image.height, image.width) == (40, 20)


def test_no_thumbnail_of_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"a\.png"):
        thumbnail(tmp_path / "a.png")
