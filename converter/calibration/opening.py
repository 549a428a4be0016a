"""Opening a calibration set, of whatever holds the samples."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from converter.calibration.arrays import ArraySet
from converter.calibration.files import files_below
from converter.calibration.image_folder import ImageFolder
from converter.calibration.images import IMAGE_SUFFIXES
from converter.calibration.reader import ReaderSet
from converter.calibration.sets import CalibrationSet, DataReader, ModelInput, fixed_batch
from converter.calibration.subset import Subset
from converter.config import Preprocessing
from converter.errors import CalibrationError

__all__ = ["has_classes", "open_calibration_set"]


def open_calibration_set(
    source: str | Path | DataReader | CalibrationSet,
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing,
    *,
    images: int | None = None,
    labels: bool = False,
) -> CalibrationSet:
    """Open whatever holds the samples, and check that it fits the model.

    Parameters
    ----------
    source : Path, DataReader or CalibrationSet
        A folder of images, searched whole; a `.npy` file or a folder of them, each a stack of
        samples along its first axis; a `.npz` file with one stack for each input, by its name; a
        `CalibrationDataReader`; or a set that is already one.
    inputs : sequence of ModelInput
        What the model takes. Images and `.npy` files are for models with one input.
    preprocessing : Preprocessing
        How image files are prepared; arrays are fed as they are.
    images : int or None, default None
        At most so many samples, spread evenly over the set in its sorted order, and so over the
        folders of classes too; None takes all.
    labels : bool, default False
        Whether classes are wanted: the subfolder of an image, or the key `labels` of a `.npz` file.
        Where the source has none, the batches have none either.

    Returns
    -------
    CalibrationSet

    Raises
    ------
    CalibrationError
        Where the source does not exist, is empty, cannot be read or does not fit the model.
    """
    if not inputs:
        raise CalibrationError("the model takes no input; give a model that has one")
    fixed_batch(inputs)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source), inputs, preprocessing, images, labels)
    opened: CalibrationSet
    if isinstance(source, CalibrationSet):
        opened = source
    elif isinstance(source, DataReader):
        opened = ReaderSet(source, inputs)
    else:
        raise CalibrationError(
            f"a {type(source).__name__} is no calibration data; give a path, a data reader or a set"
        )
    return opened if images is None or images >= len(opened) else Subset(opened, images)


def _open_path(
    path: Path,
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing,
    images: int | None,
    labels: bool,
) -> CalibrationSet:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"there is no calibration data at {path} that can be read; correct the path"
        ) from error
    if stat.S_ISDIR(mode):
        return _open_folder(path, inputs, preprocessing, images, labels)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return ArraySet.from_npy(path, [path], _only_input(inputs, path), images)
    if suffix == ".npz":
        return ArraySet.from_npz(path, inputs, images, labels)
    raise CalibrationError(
        f"{path} is no calibration data; give a folder of images, a .npy or a .npz file"
    )


def _open_folder(
    folder: Path,
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing,
    images: int | None,
    labels: bool,
) -> CalibrationSet:
    pictures = files_below(folder, IMAGE_SUFFIXES)
    arrays = files_below(folder, frozenset({".npy"}))
    if pictures and arrays:
        raise CalibrationError(
            f"the folder {folder} has images as well as .npy files; keep one kind in it"
        )
    if arrays:
        return ArraySet.from_npy(folder, arrays, _only_input(inputs, folder), images)
    if pictures:
        only = _only_input(inputs, folder)
        return ImageFolder(folder, only, preprocessing, images=images, labels=labels)
    raise CalibrationError(
        f"the folder {folder} has neither images nor .npy files; give one that has, or a .npz file"
    )


def _only_input(inputs: Sequence[ModelInput], source: Path) -> ModelInput:
    if len(inputs) != 1:
        names = ", ".join(repr(each.name) for each in inputs)
        raise CalibrationError(
            f"{source} feeds one input, but the model has {len(inputs)} ({names}); "
            "give a .npz file with an array for each of them"
        )
    return inputs[0]


def has_classes(source: Path | DataReader | CalibrationSet) -> bool:
    """Whether a source can be taken as labelled: no image lies outside of a subfolder."""
    if not isinstance(source, Path) or not source.is_dir():
        return True  # labels are then taken where the source has them
    try:
        names = [path for path in source.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False  # opening it says what is wrong
    return not any(path.suffix.lower() in IMAGE_SUFFIXES for path in names)
