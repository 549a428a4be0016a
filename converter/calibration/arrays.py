"""Calibration sets of `.npy` and `.npz` files."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from converter.array_file import UNREADABLE
from converter.calibration.digests import digest_of_files
from converter.calibration.feeding import check_fit, fed
from converter.calibration.samples import Sample, SampleSet, share, spread
from converter.calibration.sets import ModelInput
from converter.errors import CalibrationError
from converter.limits import SAMPLE_MIB, SAMPLES

__all__ = ["ArraySet"]


class ArraySet(SampleSet):
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
        self._chosen = spread(sum(self._counts), images)

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
            check_fit(stack.where, stack.shape, stack.dtype, model_input)
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
            check_fit(stack.where, stack.shape, stack.dtype, each)
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
        return f"{share(len(self), sum(self._counts))} samples of {self._source}"

    def digest(self) -> str:
        """Return a SHA-256 over the files' bytes and the choice of samples."""
        files = sorted({stack.path for part in self._parts for stack in part.values()})
        folder = self._source if self._source.is_dir() else self._source.parent
        whole = digest_of_files(folder, files)
        return hashlib.sha256(f"{whole} {len(self)}".encode()).hexdigest()

    def _samples(self) -> Generator[Sample, None, None]:
        return self.picked(range(len(self)))

    def picked(self, positions: Sequence[int]) -> Generator[Sample, None, None]:
        """Give the samples at some rising positions."""
        chosen = [self._chosen[position] for position in positions]
        first = at = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            end = bisect_left(chosen, first + count, at)
            if end > at:
                yield from self._samples_of(part, [row - first for row in chosen[at:end]])
            first, at = first + count, end

    def _samples_of(
        self, part: dict[str, _Stack], wanted: Sequence[int]
    ) -> Generator[Sample, None, None]:
        readers = [part[each.name].rows(wanted) for each in self._inputs]
        labels = None if self._labels is None else self._labels.rows(wanted)
        try:
            for row in wanted:
                feeds = {
                    each.name: fed(next(reader), each, f"sample {row} of {part[each.name].where}")
                    for each, reader in zip(self._inputs, readers, strict=True)
                }
                yield Sample(feeds, None if labels is None else self._label(next(labels), row))
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


def _where(path: Path, member: str | None) -> str:
    return str(path) if member is None else f"{member!r} in {path}"


def _unreadable(where: str, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or "it is damaged"
    return f"{where} cannot be read as an array of numbers ({reason}); save it again with numpy"


def _keys_of(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UNREADABLE as error:
        raise CalibrationError(_unreadable(str(path), error)) from error
    return sorted(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def _check_count(stack: _Stack, first: _Stack) -> None:
    if stack.shape[0] != first.shape[0]:
        raise CalibrationError(
            f"{stack.where} has {stack.shape[0]} samples and {first.where} has {first.shape[0]}; "
            "save as many of each"
        )
