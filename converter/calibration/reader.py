"""Calibration sets of a data reader, as onnxruntime's own quantization takes them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np

from converter.calibration.digests import digest_of_samples
from converter.calibration.feeding import check_fit, fed
from converter.calibration.samples import Sample, SampleSet
from converter.calibration.sets import DataReader, ModelInput
from converter.errors import CalibrationError
from converter.limits import SAMPLES

__all__ = ["KEPT_BYTES", "ReaderSet"]

KEPT_BYTES = 2**30
"""Most bytes that are kept of a data reader that cannot start again."""


class ReaderSet(SampleSet):
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
        self._kept: list[Sample] | None = None
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
        return digest_of_samples(self._samples())

    def _samples(self) -> Generator[Sample, None, None]:
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

    def _keep(self, most: int) -> list[Sample]:
        kept = []
        size = 0
        for sample in self._read():
            size += sum(array.nbytes for array in sample.feeds.values())
            if size > most:
                raise CalibrationError(
                    f"the data reader {self._kind} gives more than {most} bytes and cannot start "
                    "again; give it a method rewind()"
                )
            kept.append(sample)
        return kept

    def _read(self) -> Generator[Sample, None, None]:
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

    def _samples_of(self, feeds: object, item: int) -> Iterator[Sample]:
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
            check_fit(of_input, array.shape, array.dtype, each)
            if self._shapes.setdefault(each.name, array.shape[1:]) != array.shape[1:]:
                raise CalibrationError(
                    f"{of_input} has samples of shape {array.shape[1:]} after others of "
                    f"{self._shapes[each.name]}; bring all to one shape"
                )
            arrays[each.name] = fed(array, each, of_input)
        counts = {array.shape[0] for array in arrays.values()}
        if len(counts) != 1:
            raise CalibrationError(f"{where} has inputs of different batch sizes; make them one")
        for row in range(counts.pop()):
            # a copy: readers may fill one array again and again
            yield Sample({name: array[row].copy() for name, array in arrays.items()})
