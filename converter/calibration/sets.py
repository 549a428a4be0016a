"""Calibration sets: samples for a model, from images, arrays or a data reader, batch by batch.

Every set can be gone through again and again and gives the same samples in the same order. None of
them holds more than one batch and a bounded look-ahead, except a data reader that cannot start
again, whose samples are kept within a bound.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from converter.array_file import UNREADABLE
from converter.calibration.images import (
    IMAGE_SUFFIXES,
    arrange_image,
    open_image,
    resolve_preprocessing,
)
from converter.config import Preprocessing, Runtime
from converter.errors import CalibrationError
from converter.limits import SAMPLE_MIB, SAMPLES
from converter.model_file import file_digest

__all__ = [
    "KEPT_BYTES",
    "ArraySet",
    "Batch",
    "CalibrationSet",
    "DataReader",
    "ImageFolder",
    "ModelInput",
    "ReaderSet",
    "Subset",
    "fixed_batch",
    "has_classes",
    "image_file",
    "open_calibration_set",
    "padded",
]

KEPT_BYTES = 2**30
"""Most bytes that are kept of a data reader that cannot start again."""

_LOOK_AHEAD_BYTES = 2**26  # decoded images that wait for their batch
_WORKERS = 4

_Digest: TypeAlias = "hashlib._Hash"


@dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes
    ----------
    name : str
        Its name in the graph.
    shape : tuple of (int, str or None)
        Its shape, batch first; a name or None stands for a size that is not fixed.
    dtype : numpy.dtype
        Type of its elements.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, ready to be fed.

    Attributes
    ----------
    feeds : dict of str to ndarray of shape (n, ...)
        One array for each of the model's inputs; n is `count`, or more after `padded`.
    labels : ndarray of shape (count,), int64, or None
        Class of each real sample, where the set has classes.
    count : int
        How many samples are real.
    """

    feeds: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    count: int


@runtime_checkable
class CalibrationSet(Protocol):
    """Samples for a model; each iteration gives the same ones in the same order."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Give all samples in batches of `size`; the last one has what is left."""

    def describe(self) -> str:
        """Say in a few words what the samples are and where they come from."""

    def digest(self) -> str:
        """Return a SHA-256 over the samples' content, in hexadecimal."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, where the set has named ones."""


@runtime_checkable
class DataReader(Protocol):
    """What `onnxruntime.quantization.CalibrationDataReader` asks of its subclasses."""

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the next feeds, of any batch size, or None at the end."""


@dataclass(frozen=True, eq=False)
class _Sample:
    """One sample: its array for each input, without the batch axis, and its class."""

    feeds: dict[str, NDArray[Any]]
    label: int | None = None


class _SampleSet(ABC):
    """A set that gives its samples one by one; batches are made of them here."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label, where the set has named ones."""
        return None

    @abstractmethod
    def _samples(self) -> Generator[_Sample, None, None]: ...

    def batches(self, size: int) -> Iterator[Batch]:
        """Give all samples in batches of `size`; the last one has what is left.

        Raises
        ------
        CalibrationError
            Where a file or an array of the set cannot be used.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} is not possible; give at least 1")
        with closing(self._samples()) as samples:
            while chunk := list(islice(samples, size)):
                yield _batch_of(chunk)


# Opening -------------------------------------------------------------------------------------


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


def has_classes(source: Path | DataReader | CalibrationSet) -> bool:
    """Whether a source can be taken as labelled: no image lies outside of a subfolder."""
    if not isinstance(source, Path) or not source.is_dir():
        return True  # labels are then taken where the source has them
    try:
        names = [path for path in source.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False  # opening it says what is wrong
    return not any(path.suffix.lower() in IMAGE_SUFFIXES for path in names)


def fixed_batch(inputs: Sequence[ModelInput]) -> int | None:
    """Return the batch size that the model's inputs insist on; None where they take any.

    Raises
    ------
    CalibrationError
        Where an input has no batch axis, or two of them insist on different sizes.
    """
    sizes: dict[int, str] = {}
    for each in inputs:
        if not each.shape:
            raise CalibrationError(
                f"the model's input {each.name!r} has no batch axis; give a model whose inputs "
                "all have the batch first"
            )
        batch = each.shape[0]
        if isinstance(batch, int) and batch > 0:
            sizes.setdefault(batch, each.name)
    if len(sizes) > 1:
        (first, name), (second, other) = list(sizes.items())[:2]
        raise CalibrationError(
            f"the model's inputs {name!r} and {other!r} have the batches {first} and {second}; "
            "give a model whose inputs agree"
        )
    return next(iter(sizes), None)


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


def padded(batch: Batch, size: int) -> Batch:
    """Return the batch with its last sample repeated up to `size`; `count` and labels stay.

    Raises
    ------
    ValueError
        Where the batch has more than `size` samples, or none.
    """
    held = next(iter(batch.feeds.values())).shape[0]
    if held == size:
        return batch
    if not 0 < held < size:
        raise ValueError(f"a batch of {held} cannot be filled up to {size}")
    feeds = {
        name: np.concatenate([array, np.repeat(array[-1:], size - held, axis=0)])
        for name, array in batch.feeds.items()
    }
    return replace(batch, feeds=feeds)


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
    pictures = _files_below(folder, IMAGE_SUFFIXES)
    arrays = _files_below(folder, frozenset({".npy"}))
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


def _files_below(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files below a folder with one of these endings, sorted by their parts.

    Hidden files and folders are passed over. So are links to folders: a loop is then impossible,
    and what they lead to inside the folder is found by itself. A link that leaves the folder is
    refused: it would read what the user did not point at.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        wanted = [path for path in files if path.suffix.lower() in suffixes]
        for path in [*(Path(parent, name) for name in folders), *wanted]:
            if path.is_symlink():
                _check_inside(path, folder)
        for path in wanted:
            if not path.is_file():
                raise CalibrationError(f"{path} is not a plain file; take it out of the folder")
        found += wanted
    return sorted(found, key=lambda path: path.parts)


def _refuse_folder(error: OSError) -> None:
    raise CalibrationError(
        f"the folder {error.filename} cannot be read ({error.strerror}); make it readable"
    ) from error


def _check_inside(link: Path, folder: Path) -> None:
    if not Path(os.path.realpath(link)).is_relative_to(os.path.realpath(folder)):
        raise CalibrationError(
            f"the link {link} leaves the calibration folder; put what it leads to into the folder"
        )


# Images --------------------------------------------------------------------------------------


class ImageFolder(_SampleSet):
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
        files = _files_below(folder, IMAGE_SUFFIXES)
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
        self._files = [files[index] for index in _spread(len(files), images)]

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
        return f"{_share(len(self), self._found)} images of {self._folder}{classes}"

    def digest(self) -> str:
        """Return a SHA-256 over the images' names in the folder and their bytes."""
        return _digest_of_files(self._folder, self._files)

    def _samples(self) -> Generator[_Sample, None, None]:
        """Decode in a few threads, ahead of what is asked for by a bounded number of images."""
        workers = min(_WORKERS, Runtime().thread_count)
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for path in self._files:
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

    def _next_sample(self, pending: deque[_Pending]) -> _Sample:
        array = pending[0].arranged.result()
        path = pending.popleft().path
        return _Sample({self._input.name: array}, self._label(path))

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


# Arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """Samples stacked along the first axis of an array that lies in a file.

    Rows are read one by one, from a plain file or out of an archive, so that neither has to fit
    into memory.

    Attributes
    ----------
    path : Path
        The `.npy` or `.npz` file.
    member : str or None
        The array's name in the archive; None for a `.npy` file.
    shape : tuple of int
        The whole shape.
    dtype : numpy.dtype
        Type of the elements as stored.
    start : int
        Byte where the elements begin.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    @classmethod
    def open(cls, path: Path, member: str | None = None) -> _Stack:
        """Read the header of an array and check that the file can hold what it claims."""
        where = _where(path, member)
        with _reading(path, member) as (stream, size):
            shape, fortran, dtype = _read_header(stream, where)
            start = stream.tell()
        if dtype.kind not in "biuf":
            raise CalibrationError(f"{where} holds {dtype}, not numbers; save it as float32")
        if fortran and len(shape) > 1:
            raise CalibrationError(
                f"{where} is stored column by column; save np.ascontiguousarray of it"
            )
        if not shape:
            raise CalibrationError(f"{where} is a single number; save a stack of samples")
        if any(side < 1 for side in shape):
            raise CalibrationError(f"{where} of shape {shape} holds no samples; save some")
        if start + math.prod(shape) * dtype.itemsize > size:
            raise CalibrationError(f"{where} is truncated; save it again")
        if math.prod(shape[1:]) * dtype.itemsize > SAMPLE_MIB.value << 20:
            raise CalibrationError(
                f"{where} of shape {shape} has samples of more than {SAMPLE_MIB.value} MiB; save smaller "
                f"ones, or {SAMPLE_MIB}"
            )
        if shape[0] > SAMPLES.value:
            raise CalibrationError(
                f"{where} of shape {shape} has more than {SAMPLES.value} samples; save fewer, or {SAMPLES}"
            )
        return cls(path, member, shape, dtype, start)

    @property
    def where(self) -> str:
        """Where it lies, in words."""
        return _where(self.path, self.member)

    def rows(self, wanted: Sequence[int]) -> Generator[NDArray[Any], None, None]:
        """Read the rows with these numbers, which rise."""
        length = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _reading(self.path, self.member) as (stream, _):
            for row in wanted:
                stream.seek(self.start + row * length)
                data = stream.read(length)
                if len(data) < length:
                    raise CalibrationError(f"{self.where} is truncated; save it again")
                yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])


class ArraySet(_SampleSet):
    """Samples from `.npy` files or from one `.npz` file, fed as they are.

    Floating-point numbers are cast to the model's floating-point type and integers to a wider one.
    Everything else is refused: integers are never scaled to the numbers that a model expects.

    Made by `from_npy` and `from_npz`.
    """

    def __init__(
        self,
        source: Path,
        inputs: Sequence[ModelInput],
        parts: Sequence[dict[str, _Stack]],
        labels: _Stack | None,
        images: int | None,
    ) -> None:
        self._source = source
        self._inputs = tuple(inputs)
        self._parts = list(parts)
        self._labels = labels
        self._counts = [next(iter(part.values())).shape[0] for part in parts]
        self._chosen = _spread(sum(self._counts), images)

    @classmethod
    def from_npy(
        cls, source: Path, files: Sequence[Path], model_input: ModelInput, images: int | None = None
    ) -> ArraySet:
        """Open `.npy` files, each a stack of samples along its first axis.

        Raises
        ------
        CalibrationError
            Where a file cannot be read or does not fit the input or the files before it.
        """
        stacks = [_Stack.open(path) for path in files]
        for stack in stacks:
            _check_fit(stack.where, stack.shape, stack.dtype, model_input)
            if stack.shape[1:] != stacks[0].shape[1:]:
                raise CalibrationError(
                    f"{stack.where} has samples of shape {stack.shape[1:]} and {stacks[0].where} "
                    f"of {stacks[0].shape[1:]}; bring all to one shape"
                )
        parts = [{model_input.name: stack} for stack in stacks]
        return cls(source, [model_input], parts, None, images)

    @classmethod
    def from_npz(
        cls,
        source: Path,
        inputs: Sequence[ModelInput],
        images: int | None = None,
        labels: bool = False,
    ) -> ArraySet:
        """Open a `.npz` file that has a stack of samples for each input, by the input's name.

        Raises
        ------
        CalibrationError
            Where the file cannot be read, lacks an input, or has an array that does not fit.
        """
        keys = _keys_of(source)
        for each in inputs:
            if each.name not in keys:
                raise CalibrationError(
                    f"{source} has no array for the model's input {each.name!r}, only "
                    f"{', '.join(map(repr, keys)) or 'none at all'}; save it by that name"
                )
        part = {each.name: _Stack.open(source, each.name) for each in inputs}
        for each in inputs:
            stack = part[each.name]
            _check_fit(stack.where, stack.shape, stack.dtype, each)
            _check_count(stack, part[inputs[0].name])
        classes = None
        if labels and "labels" in keys and "labels" not in part:
            classes = _Stack.open(source, "labels")
            _check_count(classes, part[inputs[0].name])
            if classes.dtype.kind not in "iu" or len(classes.shape) != 1:
                raise CalibrationError(
                    f"{classes.where} is {classes.dtype} of shape {classes.shape}; "
                    "save one whole number for each sample"
                )
        return cls(source, inputs, [part], classes, images)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._chosen)

    def describe(self) -> str:
        """Say how many samples of which file or folder these are."""
        return f"{_share(len(self), sum(self._counts))} samples of {self._source}"

    def digest(self) -> str:
        """Return a SHA-256 over the files' bytes and the choice of samples."""
        files = sorted({stack.path for part in self._parts for stack in part.values()})
        folder = self._source if self._source.is_dir() else self._source.parent
        whole = _digest_of_files(folder, files)
        return hashlib.sha256(f"{whole} {len(self)}".encode()).hexdigest()

    def _samples(self) -> Generator[_Sample, None, None]:
        first = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            wanted = [row - first for row in self._chosen if first <= row < first + count]
            first += count
            if wanted:
                yield from self._samples_of(part, wanted)

    def _samples_of(
        self, part: dict[str, _Stack], wanted: Sequence[int]
    ) -> Generator[_Sample, None, None]:
        readers = [part[each.name].rows(wanted) for each in self._inputs]
        labels = None if self._labels is None else self._labels.rows(wanted)
        try:
            for row in wanted:
                feeds = {
                    each.name: _fed(next(reader), each, f"sample {row} of {part[each.name].where}")
                    for each, reader in zip(self._inputs, readers, strict=True)
                }
                yield _Sample(feeds, None if labels is None else self._label(next(labels), row))
        finally:
            for reader in readers if labels is None else [*readers, labels]:
                reader.close()

    def _label(self, value: NDArray[Any], row: int) -> int:
        label = int(value)
        if not 0 <= label < 2**31:
            raise CalibrationError(
                f"label {label} of sample {row} of {self._source} is no class; number them from 0"
            )
        return label


@contextmanager
def _reading(path: Path, member: str | None) -> Iterator[tuple[IO[bytes], int]]:
    """Open a `.npy` file, or one in an archive; give it with its size in bytes."""
    try:
        if member is None:
            with path.open("rb") as file:
                yield file, os.fstat(file.fileno()).st_size
        else:
            with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
                yield file, archive.getinfo(f"{member}.npy").file_size
    except UNREADABLE as error:
        raise CalibrationError(_unreadable(_where(path, member), error)) from error


def _keys_of(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UNREADABLE as error:
        raise CalibrationError(_unreadable(str(path), error)) from error
    return sorted(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def _read_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise CalibrationError(f"{where} holds structures, not numbers; save it as float32")
    shape, fortran, dtype = readers[version](stream)
    return tuple(int(side) for side in shape), bool(fortran), np.dtype(dtype)


def _check_count(stack: _Stack, first: _Stack) -> None:
    if stack.shape[0] != first.shape[0]:
        raise CalibrationError(
            f"{stack.where} has {stack.shape[0]} samples and {first.where} has {first.shape[0]}; "
            "save as many of each"
        )


# Data readers and parts of sets ---------------------------------------------------------------


class ReaderSet(_SampleSet):
    """The samples of an `onnxruntime.quantization.CalibrationDataReader`.

    The reader is gone through once when the set is made, to count and check. A reader with a method
    `rewind` is started again for each iteration, and two iterations must not overlap; of any other,
    the samples are kept.

    Parameters
    ----------
    reader : DataReader
        Its items may have any batch size.
    inputs : sequence of ModelInput
        What the model takes.
    kept_bytes : int, default KEPT_BYTES
        Most bytes that are kept of a reader without `rewind`.

    Raises
    ------
    CalibrationError
        Where the reader gives nothing, no end, or what does not fit the model, or too much to keep.
    """

    def __init__(
        self,
        reader: DataReader,
        inputs: Sequence[ModelInput],
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._reader = reader
        self._inputs = tuple(inputs)
        self._kind = type(reader).__name__
        self._kept: list[_Sample] | None = None
        rewind = getattr(reader, "rewind", None)
        self._rewind: Callable[[], object] | None = rewind if callable(rewind) else None
        self._shapes: dict[str, tuple[int, ...]] = {}
        if self._rewind is None:
            self._kept = self._keep(kept_bytes)
            self._count = len(self._kept)
        else:
            self._count = sum(1 for _ in self._read())
        if not self._count:
            raise CalibrationError(
                f"the data reader {self._kind} gave no samples; give a fresh one that has some"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._count

    def describe(self) -> str:
        """Say how many samples of which reader these are."""
        return f"{self._count} samples of the data reader {self._kind}"

    def digest(self) -> str:
        """Return a SHA-256 over the samples."""
        return _digest_of_samples(self._samples())

    def _samples(self) -> Generator[_Sample, None, None]:
        if self._kept is not None:
            yield from self._kept
            return
        given = 0
        for sample in self._read():
            given += 1
            yield sample
        if given != self._count:
            raise CalibrationError(
                f"the data reader {self._kind} gave {self._count} samples at first and {given} "
                "after rewind(); make rewind() start it again whole"
            )

    def _keep(self, most: int) -> list[_Sample]:
        kept = []
        size = 0
        for sample in self._read():
            size += sum(array.nbytes for array in sample.feeds.values())
            if size > most:
                raise CalibrationError(
                    f"the data reader {self._kind} gives more than {most} bytes and cannot start "
                    "again; give it a method rewind()"
                )
            # A copy: readers may fill one array again and again.
            kept.append(_Sample({name: array.copy() for name, array in sample.feeds.items()}))
        return kept

    def _read(self) -> Generator[_Sample, None, None]:
        if self._rewind is not None:
            self._rewind()
        item = 0
        given = 0
        while (feeds := self._reader.get_next()) is not None:
            for sample in self._samples_of(feeds, item):
                given += 1
                if given > SAMPLES.value:
                    raise CalibrationError(
                        f"the data reader {self._kind} gives more than {SAMPLES.value} samples; "
                        f"make get_next() return None at the end, or {SAMPLES}"
                    )
                yield sample
            item += 1

    def _samples_of(self, feeds: object, item: int) -> Iterator[_Sample]:
        where = f"item {item} of the data reader {self._kind}"
        if not isinstance(feeds, Mapping):
            raise CalibrationError(f"{where} is no dict; return the feeds by input name")
        arrays = {}
        for each in self._inputs:
            array = feeds.get(each.name)
            if not isinstance(array, np.ndarray):
                raise CalibrationError(
                    f"{where} has no array for the model's input {each.name!r}; return one"
                )
            of_input = f"{each.name!r} in {where}"
            _check_fit(of_input, array.shape, array.dtype, each)
            if self._shapes.setdefault(each.name, array.shape[1:]) != array.shape[1:]:
                raise CalibrationError(
                    f"{of_input} has samples of shape {array.shape[1:]} after others of "
                    f"{self._shapes[each.name]}; bring all to one shape"
                )
            arrays[each.name] = _fed(array, each, of_input)
        counts = {array.shape[0] for array in arrays.values()}
        if len(counts) != 1:
            raise CalibrationError(f"{where} has inputs of different batch sizes; make them one")
        for row in range(counts.pop()):
            yield _Sample({name: array[row] for name, array in arrays.items()})


class Subset(_SampleSet):
    """Some samples of another set, spread evenly over it.

    Parameters
    ----------
    whole : CalibrationSet
        The other set; it is gone through whole.
    images : int
        How many samples, from 1.
    """

    def __init__(self, whole: CalibrationSet, images: int) -> None:
        self._whole = whole
        self._chosen = _spread(len(whole), images)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._chosen)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the other set."""
        return self._whole.class_names

    def whole_and_position(self, index: int) -> tuple[CalibrationSet, int]:
        """Return the other set, and where a sample of this one stands in it."""
        return self._whole, self._chosen[index]

    def describe(self) -> str:
        """Say how many samples these are, and of what."""
        return f"{len(self)} of {self._whole.describe()}"

    def digest(self) -> str:
        """Return a SHA-256 over the other set's and the choice of samples."""
        return hashlib.sha256(f"{self._whole.digest()} {len(self)}".encode()).hexdigest()

    def _samples(self) -> Generator[_Sample, None, None]:
        chosen = set(self._chosen)
        last = self._chosen[-1]
        position = 0
        for batch in self._whole.batches(32):
            for row in range(batch.count):
                if position in chosen:
                    feeds = {name: array[row] for name, array in batch.feeds.items()}
                    yield _Sample(feeds, None if batch.labels is None else int(batch.labels[row]))
                position += 1
            if position > last:
                return


# What they share -----------------------------------------------------------------------------


def _batch_of(samples: Sequence[_Sample]) -> Batch:
    feeds = {
        name: np.stack([sample.feeds[name] for sample in samples]) for name in samples[0].feeds
    }
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(feeds, np.array(labels, np.int64) if labels else None, len(samples))


def _spread(total: int, wanted: int | None) -> list[int]:
    """Return `wanted` rising positions below `total`: the middles of as many equal parts."""
    if wanted is None or wanted >= total:
        return list(range(total))
    if wanted < 1:
        raise ValueError(f"{wanted} samples are too few; ask for at least 1")
    return [(2 * index + 1) * total // (2 * wanted) for index in range(wanted)]


def _share(used: int, found: int) -> str:
    return str(used) if used == found else f"{used} of {found}"


def _check_fit(
    where: str, shape: tuple[int, ...], dtype: np.dtype[Any], model_input: ModelInput
) -> None:
    """Refuse an array whose samples have another shape than the input, or another kind of type."""
    name, wanted = model_input.name, model_input.shape
    if len(shape) == len(wanted) - 1 and _sides_agree(shape, wanted[1:]):
        raise CalibrationError(
            f"{where} has the shape {shape} of one sample without a batch axis; save array[None]"
        )
    if len(shape) != len(wanted) or not _sides_agree(shape[1:], wanted[1:]):
        words = ", ".join("?" if side is None else str(side) for side in wanted)
        raise CalibrationError(
            f"{where} has the shape {shape} where the model's input {name!r} takes ({words}); "
            "bring the array to that shape"
        )
    if not _keeps_meaning(dtype, model_input.dtype):
        raise CalibrationError(
            f"{where} is {dtype} where the model's input {name!r} takes {model_input.dtype}; scale "
            f"it as for the model's training and save it as {model_input.dtype}"
        )


def _sides_agree(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or side == want for side, want in zip(shape, wanted, strict=True)
    )


def _keeps_meaning(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    if given.kind == wanted.kind == "f":
        return True
    if given.kind in "iu" and wanted.kind in "iu":
        return np.can_cast(given, wanted, "safe")
    return given == wanted


def _fed(array: NDArray[Any], model_input: ModelInput, where: str) -> NDArray[Any]:
    """Cast to the input's type; refuse what is not finite, before the cast or after it."""
    with np.errstate(over="ignore"):  # a number too large becomes inf, which is refused below
        cast = array.astype(model_input.dtype, copy=False)
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        raise CalibrationError(
            f"{where} has values that are NaN or infinite as {model_input.dtype}; "
            "take them out and save the rest"
        )
    return cast


def _where(path: Path, member: str | None) -> str:
    return str(path) if member is None else f"{member!r} in {path}"


def _unreadable(where: str, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or "it is damaged"
    return f"{where} cannot be read as an array of numbers ({reason}); save it again with numpy"


def _digest_of_files(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            content = file_digest(path)
        except OSError as error:
            raise CalibrationError(
                f"{path} cannot be read ({error.strerror}); make it readable"
            ) from error
        _add_text(digest, path.relative_to(folder).as_posix())
        _add_text(digest, content)
    return digest.hexdigest()


def _digest_of_samples(samples: Iterator[_Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sample.feeds.items():
            _add_text(digest, f"{name} {array.dtype.str} {array.shape}")
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _add_text(digest: _Digest, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    digest.update(len(data).to_bytes(8, "little") + data)
