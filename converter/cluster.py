"""Recording and predicting on a Dask cluster.

The images are cut into shards. A worker runs the original on one shard and gives its part of the samples,
or of the moments of patches; parts of neighbours are joined in pairs, up to the whole. What is recorded
does not depend on the shards: the places of patches are drawn before, for all images at once. So the
result is that of one machine, but for the order in which floating-point numbers are added.

Nothing is kept on a worker that the scheduler could not have computed once more, so workers may die: the
model, and samples that only this process can make, travel in the tasks themselves, by way of the
scheduler, and stay there until they are used up. Images in folders and `.npy` and `.npz` files are read by
the workers, which must see them under the same path; data readers are gone through here. What the forms
of layers are predicted from never leaves the workers.

Memory of a worker: it runs one of these tasks at a time, with all its threads, and so much as
`memory_mib` of `CalibrationSettings` is enough for it:

- a quarter for the tensors of a batch;
- a quarter for the sums of the layers that are recorded together (4·D² bytes each; one layer alone where
  it takes more), and three quarters while two parts of them are joined;
- the targets of all layers, at most half, and twice that while their last two parts are joined.

The chunk of patches on its way, the moments of the responses (8·N² bytes a layer) and the model itself come
on top, as they do on one machine, and so do parts that wait for their neighbour: about one for each shard
that is being recorded.
"""

from __future__ import annotations

import math
import operator
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures import Future as LocalFuture
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.calibration.arrays import ArraySet
from converter.calibration.gather import Sample
from converter.calibration.image_folder import ImageFolder
from converter.calibration.moments import Moments
from converter.calibration.record import Recorder
from converter.calibration.sets import Batch, CalibrationSet
from converter.calibration.subset import Subset
from converter.errors import CalibrationError, ConfigError, ConverterError, ModelError
from converter.fitting import UNSEEN_EVERY
from converter.model_file import EXTERNAL_ABOVE
from converter.place import Asked, Place
from converter.prediction import UNSEEN_PATCHES, Prediction, Task, predict
from converter.progress import Advance
from converter.runtime import weight_bytes
from passes.layers import Layer

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Cluster", "connect"]

P = ParamSpec("P")
T = TypeVar("T")

SHARDS_EACH = 2
"""Shards for each worker: a fast worker can then take one over from a slow one."""

GROUPS_AHEAD = 2
"""Groups of layers that are recorded or predicted at a time: one is recorded while workers that have
nothing left to record predict the one before."""

# What frees memory comes first.
_JOIN, _PREDICT, _RECORD = 2, 1, 0

_ALONE = threading.Lock()
"""Held by the task that runs: others of the same worker wait, for its memory and its threads."""


def connect(address: str, *, timeout: float = 10.0) -> Cluster:
    """Connect to a Dask cluster.

    Parameters
    ----------
    address : str
        Of its scheduler, such as "tcp://10.0.0.1:8786".
    timeout : float, default 10.0
        Seconds to wait for the scheduler, and for its first worker.

    Returns
    -------
    Cluster
        A context manager, which closes the connection.

    Raises
    ------
    ConfigError
        Where `distributed` is not installed, no scheduler answers, there is no worker, or workers lack
        this version of Twofold.
    """
    try:
        from distributed import Client, TimeoutError
    except ImportError as error:
        raise ConfigError(
            "a Dask cluster needs the package distributed; pip install 'twofold[dask]' brings it"
        ) from error
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address}; start one with `dask scheduler`, or correct the "
            "address"
        ) from error
    try:
        client.wait_for_workers(1, timeout=timeout)
        _require_same_version(client, address)
    except TimeoutError as error:
        client.close()
        raise ConfigError(
            f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`"
        ) from error
    except ConfigError:
        client.close()
        raise
    return Cluster(client)


class Cluster(Place, Executor):
    """A Dask cluster as a place to record and predict, and as an executor for anything else.

    Parameters
    ----------
    client : distributed.Client
        Closed by `shutdown`, and at the end of a `with` block.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> LocalFuture[T]:
        """Run a function on a worker; it and its arguments can be pickled."""
        future: LocalFuture[T] = self._executor.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the connection; the cluster goes on."""
        del cancel_futures  # closing the connection gives up whatever is not done
        self._executor.shutdown(wait=wait)
        self._client.close()

    def originals(
        self,
        recorder: Recorder,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        advance: Advance,
    ) -> dict[str, Sample]:
        """Sample what the original answers, shard by shard.

        Raises
        ------
        CalibrationError, ModelError
            As `Recorder.originals`, and where workers do not see the images, or the model is too large to
            be sent.
        ConverterError
            Where the cluster is lost, or workers die again and again.
        """
        from distributed import as_completed

        recorder.draw(model, layers)
        sent = self._sent(model, layers)
        images: dict[str, int] = {}
        parts: list[Future] = []
        for part in self._parts(recorder):
            parts.append(self._task(_answers, sent, part, priority=_RECORD))
            images[parts[-1].key] = len(part.data)
        whole = self._joined(parts)
        done = as_completed(parts, loop=self._client.loop)
        parts.clear()  # a part stays on its worker as long as it is held here
        for future in done:
            advance(images[future.key])
        samples: dict[str, Sample] = self._result(whole)
        return samples

    def predicted(
        self, recorder: Recorder, model: onnx.ModelProto, asked: Iterable[Asked]
    ) -> Iterator[tuple[str, Prediction]]:
        """Give the name of each layer and what it may become, in the order in which they are asked.

        Raises
        ------
        CalibrationError, ModelError, SolverError, ConverterError
            As `originals`, and as `predict`.
        """
        asked = list(asked)
        sent = self._sent(model, [each.layer for each in asked])
        waiting: deque[list[tuple[str, Future]]] = deque()
        for group in _groups(asked, recorder.memory_bytes // 4):
            waiting.append(self._predicting(recorder, sent, group))
            if len(waiting) >= GROUPS_AHEAD:
                for name, future in waiting.popleft():
                    yield name, self._result(future)
        for futures in waiting:
            for name, future in futures:
                yield name, self._result(future)

    def _predicting(
        self, recorder: Recorder, sent: Future, group: Sequence[Asked]
    ) -> list[tuple[str, Future]]:
        """Have the patches of some layers recorded together, and each layer predicted from them."""
        names = tuple(each.layer.name for each in group if each.wants_patches)
        whole = None
        if names:
            whole = self._joined(
                [
                    self._task(_patches, sent, part, names, priority=_RECORD)
                    for part in self._parts(recorder)
                ]
            )
        waiting = []
        for each in group:
            name, own = each.layer.name, None
            if name in names:
                own = self._task(operator.getitem, whole, name, priority=_JOIN)
            forms = self._task(_forms, each.task(None), own, priority=_PREDICT)
            waiting.append((name, forms))
        return waiting

    # Tasks ----------------------------------------------------------------------------------

    def _sent(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> Future:
        """Send the original to the cluster once; workers get it from each other."""
        if weight_bytes(model.graph) > EXTERNAL_ABOVE:
            raise ModelError(
                "the model has 2 GiB of weights or more, which cannot be sent to a Dask cluster; "
                "convert it without one"
            )
        return self._task(_itself, _Original.of(model, layers), priority=_RECORD)

    def _parts(self, recorder: Recorder) -> Iterator[Recorder]:
        """Cut the images into shards, of whole batches where they are larger than one."""
        images, batch = len(recorder.data), recorder.batch
        size = math.ceil(images / (SHARDS_EACH * max(1, len(self._client.nthreads()))))
        if size > batch or recorder.fixed_batch:
            size = batch * math.ceil(size / batch)
        for start, data in _cut(recorder.data, size):
            yield recorder.part(data, start)

    def _joined(self, parts: Sequence[Future]) -> Future:
        """Join neighbouring parts in pairs until one is left."""
        while len(parts) > 1:
            pairs = [parts[index : index + 2] for index in range(0, len(parts), 2)]
            parts = [
                self._task(_join, *pair, priority=_JOIN) if len(pair) > 1 else pair[0]
                for pair in pairs
            ]
        return parts[0]

    def _task(self, function: Callable[..., Any], *args: Any, priority: int) -> Future:
        with warnings.catch_warnings():
            # what is sent with the task is what a dying worker cannot take with it
            warnings.filterwarnings("ignore", message="Sending large graph")
            future: Future = self._client.submit(function, *args, priority=priority, pure=False)
        return future

    def _result(self, future: Future) -> Any:
        from distributed import CancelledError, KilledWorker
        from distributed.comm import CommClosedError

        try:
            return future.result()
        except KilledWorker as error:
            raise ConverterError(
                "one worker of the Dask cluster after the other died over the same task; give workers "
                "more memory, or calibration less"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise ConverterError(
                "the connection to the Dask cluster was lost; see that its scheduler runs, and convert "
                "again"
            ) from error


def _groups(asked: Sequence[Asked], most: int) -> Iterator[list[Asked]]:
    """Give consecutive layers whose sums together take at most so many bytes; one layer at least."""
    group: list[Asked] = []
    size = 0
    for each in asked:
        needed = _bytes_of_sums(each)
        if group and size + needed > most:
            yield group
            group, size = [], 0
        group.append(each)
        size += needed
    if group:
        yield group


def _bytes_of_sums(asked: Asked) -> int:
    if not asked.wants_patches:
        return 0
    columns = asked.geometry.columns
    return 4 * columns * (columns + asked.sample.positions.size // UNSEEN_EVERY)


# What is sent --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Original:
    """A model and its layers, which are recorded by their shapes: the weights go once, in the model."""

    model: bytes
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]

    @classmethod
    def of(cls, model: onnx.ModelProto, layers: Sequence[Layer]) -> _Original:
        bare = []
        for layer in layers:
            assert layer.weight is not None, "a convertible layer has a constant weight"
            bare.append((replace(layer, weight=None, bias=None), layer.weight.shape))
        return cls(model.SerializeToString(), tuple(bare))

    def opened(self) -> tuple[onnx.ModelProto, list[Layer]]:
        """Return the model, and its layers with zeros for weights, which take no memory."""
        layers = [
            replace(layer, weight=np.broadcast_to(np.float32(0), shape))
            for layer, shape in self.layers
        ]
        return onnx.load_model_from_string(self.model), layers


@dataclass(frozen=True, eq=False)
class _Feeds:
    """A calibration set of arrays that are sent along."""

    feeds: dict[str, NDArray[Any]]
    class_names = None

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            feeds = {name: array[start : start + size] for name, array in self.feeds.items()}
            yield Batch(feeds, None, min(size, len(self) - start))

    def describe(self) -> str:
        return f"{len(self)} samples sent to a worker"

    def digest(self) -> str:
        raise NotImplementedError("the whole set has the digest")


def _cut(data: CalibrationSet, size: int) -> Iterator[tuple[int, CalibrationSet]]:
    """Cut a set into sets of `size` samples, with the number of the first sample of each.

    Files are opened by who goes through the part; everything else is read here, and held part by part.
    """
    whole, rows = _whole_and_rows(data)
    if isinstance(whole, (ImageFolder, ArraySet)):
        for start in range(0, len(rows), size):
            yield start, _some_of(whole, rows[start : start + size])
        return
    start = 0
    for batch in data.batches(size):
        yield start, _Feeds(batch.feeds)
        start += batch.count
    if start != len(data):
        raise CalibrationError(
            f"the calibration set gave {start} samples where it announced {len(data)}; give a set that "
            "always gives the same ones"
        )


def _whole_and_rows(data: CalibrationSet) -> tuple[CalibrationSet, Sequence[int]]:
    """Give the set that this one is a part of, or itself, and which samples it has of it."""
    if not isinstance(data, Subset):
        return data, range(len(data))
    inner, rows = _whole_and_rows(data._whole)
    return inner, [rows[row] for row in data._chosen]


def _some_of(data: ImageFolder | ArraySet, rows: Sequence[int]) -> CalibrationSet:
    """Return some samples of a set of files, whose paths then hold from any working directory."""
    part = copy(data)
    if isinstance(part, ImageFolder):
        part._folder = part._folder.absolute()
        part._files = [part._files[row].absolute() for row in rows]
    else:
        part._chosen = [part._chosen[row] for row in rows]
        part._parts = [
            {name: replace(stack, path=stack.path.absolute()) for name, stack in stacks.items()}
            for stacks in part._parts
        ]
        part._labels = None  # nothing is recorded of them
    return part


# What workers do -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PatchMoments:
    """What a layer's forms are predicted from: moments of the patches seen, and the unseen ones.

    Attributes
    ----------
    seen : Moments
        Of patches (D,), with a float32 scatter.
    unseen : ndarray of shape (m, D), float32
    """

    seen: Moments
    unseen: NDArray[np.float32]

    def joined(self, following: _PatchMoments) -> _PatchMoments:
        """Return the moments of these images and those that follow; neither part is changed."""
        unseen = np.concatenate([self.unseen, following.unseen])
        return _PatchMoments(self.seen.joined(following.seen), unseen)


def _itself(value: T) -> T:
    """Be a task that holds a value: a worker that dies with it leaves it with the scheduler."""
    return value


def _answers(original: _Original, part: Recorder) -> dict[str, Sample]:
    """Sample what the original answers to a shard."""
    with _alone() as threads, _seeing_files():
        return part.threaded(threads).answers(*original.opened())


def _patches(original: _Original, part: Recorder, names: Sequence[str]) -> dict[str, _PatchMoments]:
    """Sum up what some layers read of a shard."""
    with _alone() as threads, _seeing_files():
        model, layers = original.opened()
        chosen = [layer for layer in layers if layer.name in names]
        seen: dict[str, Moments] = {}
        unseen: dict[str, list[NDArray[np.float32]]] = {}
        for name, images, patches in part.threaded(threads).patches(model, chosen):
            if name not in seen:
                seen[name], unseen[name] = Moments.none(patches.shape[1], np.float32), []
            kept_back = images % UNSEEN_EVERY == UNSEEN_EVERY - 1
            seen[name].add(patches[~kept_back])
            unseen[name].append(patches[kept_back])
        return {name: _PatchMoments(seen[name], np.concatenate(unseen[name])) for name in names}


_Part = TypeVar("_Part", Sample, _PatchMoments)


def _join(part: dict[str, _Part], following: dict[str, _Part]) -> dict[str, _Part]:
    """Join what two neighbouring shards gave, layer by layer."""
    with _alone():
        return {name: each.joined(following[name]) for name, each in part.items()}


def _forms(task: Task, moments: _PatchMoments | None) -> Prediction:
    """Predict a layer, from what its patches summed up to."""
    with _alone():
        if moments is not None:
            thinned = moments.unseen[:: max(1, math.ceil(len(moments.unseen) / UNSEEN_PATCHES))]
            mean = moments.seen.mean.astype(np.float32)
            covariance = moments.seen.covariance
            task = replace(task, patch=mean, gram=covariance, unseen=thinned - mean)
        return predict(task)


@contextmanager
def _alone() -> Iterator[int]:
    """Have the worker to oneself; gives its threads, which torch then uses."""
    import torch
    from distributed import get_worker

    with _ALONE:
        threads = int(get_worker().state.nthreads)
        torch.set_num_threads(threads)
        yield threads


@contextmanager
def _seeing_files() -> Iterator[None]:
    """Say of a file that is missing that it is this worker which does not see it."""
    try:
        yield
    except CalibrationError as error:
        missing = error.__cause__
        if not isinstance(missing, FileNotFoundError):
            raise
        raise CalibrationError(
            f"a worker of the Dask cluster does not see {missing.filename}; put the images where all "
            "workers see them under the same path"
        ) from error


def _version() -> str:
    import converter

    return converter.__version__


def _require_same_version(client: Client, address: str) -> None:
    """Refuse workers that cannot run these tasks, or run them otherwise."""
    try:
        found = set(client.run(_version).values())
    except ImportError as error:
        raise ConfigError(
            f"the workers of {address} have no Twofold ({error}); pip install 'twofold[dask]' there"
        ) from error
    if found != {_version()}:
        raise ConfigError(
            f"the workers of {address} have Twofold {', '.join(sorted(found))} where this is "
            f"{_version()}; install the same version everywhere"
        )
