"""Where the original is recorded and the forms of its layers are predicted: here, or somewhere larger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.gather import Inputs, Sample
from converter.calibration.record import Recorder
from converter.config import SolverSettings
from converter.prediction import Prediction, Task, predict, task_of, wants_patches
from converter.progress import Advance
from converter.schemes import Geometry
from converter.work import Work, key_of
from passes.layers import Layer

__all__ = ["Asked", "Here", "Place"]

WAITING = 2
"""Layers whose patches are held while an executor predicts earlier ones, beside those it works on."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A layer whose forms are to be predicted, and what is known of it beside its patches.

    Attributes
    ----------
    layer : Layer
    geometry : Geometry
    sample : Sample
        What the original answers.
    metric : ndarray of shape (N, N), float64
        Ω of the response.
    solver : SolverSettings
    share : float
        As in `Task`.
    """

    layer: Layer
    geometry: Geometry
    sample: Sample
    metric: NDArray[np.float64]
    solver: SolverSettings
    share: float

    @property
    def wants_patches(self) -> bool:
        """Whether any of its forms is predicted from its patches."""
        return wants_patches(self.geometry, self.solver.schemes)

    def task(self, inputs: Inputs | None) -> Task:
        """Make the task of predicting it, from these patches."""
        known = self.layer, self.geometry, self.sample, self.metric
        return task_of(*known, inputs, self.solver, self.share)


class Place(ABC):
    """Where the work that does not depend on the budget is done."""

    @abstractmethod
    def originals(
        self,
        recorder: Recorder,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        advance: Advance,
    ) -> dict[str, Sample]:
        """Sample what the original answers, as `Recorder.originals`."""

    @abstractmethod
    def predicted(
        self, recorder: Recorder, model: onnx.ModelProto, asked: Iterable[Asked]
    ) -> Iterator[tuple[str, Prediction]]:
        """Give the name of each layer and what it may become, in the order in which they are asked.

        Parameters
        ----------
        recorder : Recorder
            Which has sampled the original, in `originals`.
        model : onnx.ModelProto
            The original.
        asked : iterable of Asked
            Gone through as the place gets on with them.

        Raises
        ------
        CalibrationError, ModelError, SolverError
            As `Recorder.inputs` and `predict`.
        """


class Here(Place):
    """The machine at hand: layers are recorded one after the other, and predicted as they come.

    Parameters
    ----------
    executor : Executor or None, default None
        Where layers are predicted; None does it in threads of this process.
    together : int or None, default None
        Layers that these threads predict at once; None takes as many as torch has threads.
    work : Work or None, default None
        Where predictions are kept, and taken from where they are there.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        together: int | None = None,
        work: Work | None = None,
    ) -> None:
        self._executor = executor
        self._together = together
        self._work = work

    def originals(
        self,
        recorder: Recorder,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        advance: Advance,
    ) -> dict[str, Sample]:
        """Sample what the original answers, as `Recorder.originals`."""
        return recorder.originals(model, layers, advance)

    def predicted(
        self, recorder: Recorder, model: onnx.ModelProto, asked: Iterable[Asked]
    ) -> Iterator[tuple[str, Prediction]]:
        """Record and predict layers; few of them wait at a time, since each holds patches."""
        tasks = (_recorded(recorder, model, each) for each in asked)
        if self._executor is None:
            with _threads(self._together) as executor:
                yield from _in_turn(tasks, executor, self._work)
        else:
            yield from _in_turn(tasks, self._executor, self._work)


def _in_turn(
    tasks: Iterable[Task], executor: Executor, work: Work | None
) -> Iterator[tuple[str, Prediction]]:
    waiting: list[tuple[str, Callable[[], Prediction]]] = []
    most = WAITING + getattr(executor, "_max_workers", 1)
    for task in tasks:
        waiting.append((task.name, _begun(task, executor, work)))
        if len(waiting) >= most:
            name, result = waiting.pop(0)
            yield name, result()
    for name, result in waiting:
        yield name, result()


def _begun(task: Task, executor: Executor, work: Work | None) -> Callable[[], Prediction]:
    """Begin a prediction, or recall it; what is returned gives it, and keeps it."""
    if work is None:
        return executor.submit(predict, task).result
    key = key_of("predict", task)
    known = work.prediction(key)
    if known is not None:
        return lambda: known
    future = executor.submit(predict, task)

    def finished() -> Prediction:
        found = future.result()
        work.keep_prediction(key, found)
        return found

    return finished


@contextmanager
def _threads(together: int | None) -> Iterator[Executor]:
    """Open threads among which torch's own are shared out.

    A prediction has many small steps between its large ones: side by side they keep the cores busier
    than one at a time on all of them.
    """
    import torch

    before = torch.get_num_threads()
    count = together or before
    share = max(1, before // count)
    workers = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what a thread sets is the default of those made later


def _recorded(recorder: Recorder, model: onnx.ModelProto, asked: Asked) -> Task:
    """Record the patches of a layer, where they are wanted, for its task."""
    if not asked.wants_patches:
        return asked.task(None)
    return asked.task(recorder.inputs(model, asked.layer, asked.sample))
