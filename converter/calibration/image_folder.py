"""Calibration sets of image files."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from converter.calibration.digests import digest_of_files
from converter.calibration.files import files_below
from converter.calibration.images import (
    IMAGE_SUFFIXES,
    arrange_image,
    open_image,
    resolve_preprocessing,
)
from converter.calibration.samples import Sample, SampleSet, share, spread
from converter.calibration.sets import CalibrationSet, ModelInput
from converter.calibration.subset import Subset
from converter.config import Preprocessing, Runtime
from converter.errors import CalibrationError

__all__ = ["ImageFolder", "image_file"]

_LOOK_AHEAD_BYTES = 2**26  # decoded images that wait for their batch
_WORKERS = 4


class ImageFolder(SampleSet):
    """The images of a folder and all of its subfolders, in sorted order.

    Parameters
    ----------
    folder : Path
        Searched whole. Files that do not end as an image does are passed over, hidden ones too.
    model_input : ModelInput
        The model's input: floating point, or uint8, for which pixels stay 0 to 255.
    preprocessing : Preprocessing
        How images are prepared; completed from the input's shape.
    images : int or None, default None
        At most so many, spread evenly over the sorted files.
    labels : bool, default False
        Whether the subfolders are classes: an image's label is then the position of the subfolder
        it is in, among all subfolders in sorted order. A folder without subfolders has no labels.

    Raises
    ------
    CalibrationError
        Where there are no images, where they do not fit the input, or where labels are asked for
        and some images are in subfolders and some are not.
    """

    def __init__(
        self,
        folder: Path,
        model_input: ModelInput,
        preprocessing: Preprocessing,
        *,
        images: int | None = None,
        labels: bool = False,
    ) -> None:
        dtype = model_input.dtype
        if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
            raise CalibrationError(
                f"the model's input {model_input.name!r} takes {dtype}, which images are not; "
                "give a .npy or .npz file of that type"
            )
        files = files_below(folder, IMAGE_SUFFIXES)
        if not files:
            raise CalibrationError(f"the folder {folder} has no images; give a folder that has")
        resolved = resolve_preprocessing(preprocessing, model_input.shape)
        assert resolved.size is not None, "resolving sets the size"
        self.preprocessing = resolved
        self._size = resolved.size
        self._folder = folder
        self._input = model_input
        self._found = len(files)
        self._classes = _class_folders(folder, files) if labels else None
        self._files = [files[index] for index in spread(len(files), images)]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._files)

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files, in the order of the samples."""
        return tuple(self._files)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the class folders in sorted order, where labels are asked for."""
        return self._classes

    def describe(self) -> str:
        """Say how many images of which folder these are."""
        classes = "" if self._classes is None else f", {len(self._classes)} classes"
        return f"{share(len(self), self._found)} images of {self._folder}{classes}"

    def digest(self) -> str:
        """Return a SHA-256 over the images' names in the folder, their bytes, and how they are prepared."""
        prepared = f"{self.preprocessing} {self._size} {self._input.dtype}"
        files = digest_of_files(self._folder, self._files)
        return hashlib.sha256(f"{files} {prepared}".encode()).hexdigest()

    def _samples(self) -> Generator[Sample, None, None]:
        return self.picked(range(len(self)))

    def picked(self, positions: Sequence[int]) -> Generator[Sample, None, None]:
        """Give the images at some positions.

        They are decoded in a few threads, ahead of what is asked for by a bounded number of images.
        """
        workers = min(_WORKERS, Runtime().thread_count)
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for path in (self._files[position] for position in positions):
                image = open_image(path)
                arranged = pool.submit(
                    arrange_image, image, path, self.preprocessing, self._size, self._input.dtype
                )
                pending.append(_Pending(path, image, arranged))
                if len(pending) > self._look_ahead(workers):
                    yield self._next_sample(pending)
            while pending:
                yield self._next_sample(pending)
        finally:
            pool.shutdown(cancel_futures=True)
            for each in pending:
                each.image.close()

    def _look_ahead(self, workers: int) -> int:
        height, width = self._size
        sample = 3 * height * width * self._input.dtype.itemsize
        return max(workers, min(64, _LOOK_AHEAD_BYTES // sample))

    def _next_sample(self, pending: deque[_Pending]) -> Sample:
        array = pending[0].arranged.result()
        path = pending.popleft().path
        return Sample({self._input.name: array}, self._label(path))

    def _label(self, path: Path) -> int | None:
        if self._classes is None:
            return None
        return self._classes.index(path.relative_to(self._folder).parts[0])


@dataclass(frozen=True, eq=False)
class _Pending:
    """An image that is opened and may be decoded already."""

    path: Path
    image: Image.Image
    arranged: Future[NDArray[Any]]


def _class_folders(folder: Path, files: Sequence[Path]) -> tuple[str, ...] | None:
    loose = [path for path in files if path.parent == folder]
    if len(loose) == len(files):
        return None
    if loose:
        raise CalibrationError(
            f"the image {loose[0]} is in no class while others are in class folders; "
            "move it into one"
        )
    with os.scandir(folder) as entries:
        return tuple(
            sorted(
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
        )


def image_file(data: CalibrationSet, index: int) -> Path | None:
    """Return the file of one sample of a set; None where samples are no image files.

    Parameters
    ----------
    data : CalibrationSet
    index : int
        Position of the sample, from 0 to below `len(data)`.
    """
    if isinstance(data, Subset):
        return image_file(*data.whole_and_position(index))
    return data.files[index] if isinstance(data, ImageFolder) else None
