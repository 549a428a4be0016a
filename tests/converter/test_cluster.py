from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from converter import Budget, RecoverySettings, convert
from converter.calibration.arrays import ArraySet
from converter.calibration.image_folder import ImageFolder
from converter.calibration.opening import open_calibration_set
from converter.calibration.record import Recorder
from converter.calibration.sets import CalibrationSet
from converter.calibration.subset import Subset
from converter.cluster import Cluster, _cut, connect
from converter.config import CalibrationSettings, Preprocessing, Runtime, SolverSettings, Target
from converter.drop import held_back
from converter.errors import CalibrationError, ConfigError
from converter.model_file import save_model
from converter.preparation import Clock, Prepared, prepare
from converter.progress import SILENT
from converter.runtime import model_inputs

distributed = pytest.importorskip("distributed", reason="distributed (twofold[dask]) is missing")
cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle (twofold[dask]) is missing")

IMAGES = 44
SIDE = 12

# Sums in another order: float32 round-off of covariances, and of fits that solve systems with them.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two worker processes with one thread each."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
        ) as local,
        connect(local.scheduler_address, timeout=60) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of smooth patterns."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:03}.png")
    return folder


def network() -> onnx.ModelProto:
    """conv1 → Relu → conv2 + 1×1 convs → Relu → mean → Gemm."""
    random = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        values = scale * random.standard_normal(shape)
        return numpy_helper.from_array(values.astype(np.float32), name)

    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[n, 3, {SIDE}, {SIDE}] x) => (float[n, 6] out) {{
            [conv1] y1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
            a = Relu(y1)
            [conv2] y2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(a, w2)
            [convs] ys = Conv<strides = [2, 2]>(a, ws)
            s = Add(y2, ys)
            r = Relu(s)
            p = ReduceMean<axes = [2, 3], keepdims = 0>(r)
            [fc] out = Gemm<transB = 1>(p, wf)
        }}
        """
    )
    model.graph.initializer.extend(
        [
            weight("w1", 8, 3, 3, 3),
            weight("w2", 12, 8, 3, 3),
            weight("ws", 12, 8, 1, 1),
            weight("wf", 6, 12),
        ]
    )
    return onnx.shape_inference.infer_shapes(model)


class Reader:
    """A data reader that starts again, as a user would write it."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self.images = images
        self.rewind()

    def rewind(self) -> None:
        self.rest = iter(np.array_split(self.images, 5))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return None if batch is None else {"x": batch}


class DiesOnce(distributed.WorkerPlugin):
    """Kills the first worker that has done so many tasks of a kind, with all that it holds."""

    name = "dies-once"
    after: ClassVar[dict[str, int]] = {
        "_answers": 2,
        "_patches": 1,
    }  # four shards for two workers: one of them does two

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []

    def transition(self, key: str, start: str, finish: str, **kwargs: Any) -> None:
        del start, kwargs
        kind = key.split("-")[0]
        if finish != "memory" or kind not in self.after:
            return
        self.done.append(kind)
        if self.done.count(kind) == self.after[kind]:
            try:
                (self.folder / kind).touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


def opened(source: Any) -> CalibrationSet:
    return open_calibration_set(source, model_inputs(network()), Preprocessing())


def prepared(data: CalibrationSet, place: Cluster | None = None, *, batch: int = 5) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        return _prepared(Path(folder), data, place, batch)


def _prepared(folder: Path, data: CalibrationSet, place: Cluster | None, batch: int) -> Prepared:
    save_model(network(), folder / "network.onnx")
    return prepare(
        folder / "network.onnx",
        data,
        calibration=CalibrationSettings(patches=800, batch=batch),
        solver=SolverSettings(),
        runtime=Runtime(threads=1),
        progress=SILENT,
        clock=Clock(),
        executor=place,
    )


def assert_same(found: Prepared, wanted: Prepared) -> None:
    assert found.samples.keys() == wanted.samples.keys() == {"conv1", "conv2", "convs", "fc"}
    for name, sample in wanted.samples.items():
        other = found.samples[name]
        np.testing.assert_array_equal(other.positions, sample.positions)
        assert other.out_shape == sample.out_shape
        for one, two in (
            (other.target, sample.target),
            (other.mean, sample.mean),
            (other.covariance, sample.covariance),
        ):
            np.testing.assert_allclose(one, two, rtol=CLOSE, atol=CLOSE * np.abs(two).max())
    assert found.candidates.keys() == wanted.candidates.keys()
    for name, candidates in wanted.candidates.items():
        others = found.candidates[name]
        assert [each.form for each in others] == [each.form for each in candidates]
        np.testing.assert_allclose(
            [each.effect for each in others], [each.effect for each in candidates], rtol=CLOSE
        )
        tried, wanted_too = found.probes[name], wanted.probes[name]
        assert [each.form for each in tried] == [each.form for each in wanted_too]
        for one, two in zip(tried, wanted_too, strict=True):
            assert one.effect == pytest.approx(two.effect, rel=CLOSE)
            bias, other_bias = one.branches.bias, two.branches.bias
            assert bias is not None
            assert other_bias is not None
            np.testing.assert_allclose(bias, other_bias, atol=10 * CLOSE * np.abs(other_bias).max())
    assert found.recorder.describe()["patches"] == wanted.recorder.describe()["patches"]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Prepared:
    """What one machine finds."""
    return prepared(opened(folder))


def test_a_folder_is_read_by_the_workers_with_the_same_result(
    cluster: Cluster, folder: Path, alone: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # workers have another working directory
    assert len(alone.candidates["conv2"]) > 3
    assert_same(prepared(opened(folder.name), cluster), alone)


def test_arrays_and_readers_too(cluster: Cluster, alone: Prepared, tmp_path: Path) -> None:
    images = np.concatenate([batch.feeds["x"] for batch in alone.data.batches(IMAGES)])
    np.save(tmp_path / "images.npy", images)
    assert_same(prepared(opened(tmp_path / "images.npy"), cluster), alone)
    assert_same(prepared(opened(Reader(images)), cluster, batch=64), alone)


def test_parts_of_files_are_read_by_the_workers_too(folder: Path, tmp_path: Path) -> None:
    """As what is left where every fifth image is held back."""
    np.save(
        tmp_path / "images.npy",
        np.arange(24 * 3 * SIDE * SIDE, dtype=np.float32).reshape(24, 3, SIDE, SIDE),
    )
    for source, kind in ((folder, ImageFolder), (tmp_path / "images.npy", ArraySet)):
        rest, apart = held_back(Subset(opened(source), 20), 4)
        for part in (rest, apart):
            cut = list(_cut(part, 7))
            assert [start for start, _ in cut] == list(range(0, len(part), 7))
            assert all(isinstance(each, kind) for _, each in cut)
            [whole] = part.batches(len(part))
            found = [each.feeds["x"] for _, some in cut for each in some.batches(3)]
            np.testing.assert_array_equal(np.concatenate(found), whole.feeds["x"])


def test_workers_may_die(cluster: Cluster, folder: Path, alone: Prepared, tmp_path: Path) -> None:
    client = cluster._client
    client.wait_for_workers(2, timeout=60)
    before = set(client.run(os.getpid).values())
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    client.register_plugin(DiesOnce(tmp_path))
    try:
        found = prepared(opened(folder), cluster)
    finally:
        client.unregister_worker_plugin(DiesOnce.name)
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert {path.name for path in tmp_path.iterdir()} == {"_answers", "_patches"}
    client.wait_for_workers(2, timeout=60)
    assert set(client.run(os.getpid).values()) != before
    assert_same(found, alone)


def test_layers_whose_sums_do_not_fit_together_are_recorded_apart(
    cluster: Cluster, folder: Path, alone: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    task = cluster._task

    def counted(function: Any, *args: Any, priority: int) -> Any:
        if function.__name__ == "_patches":
            runs.append(args[2])
        return task(function, *args, priority=priority)

    monkeypatch.setattr(cluster, "_task", counted)
    # a quarter of it holds the sums of conv1 (27 columns) and no other layer beside it
    monkeypatch.setattr(Recorder, "memory_bytes", property(lambda _: 4 * 4 * 27 * 150))
    assert_same(prepared(opened(folder), cluster), alone)
    assert len(set(runs)) > 1
    assert all(len(names) == 1 for names in runs if "conv2" in names)


def test_a_network_on_the_way_is_recorded_by_the_workers_too(
    cluster: Cluster, folder: Path, alone: Prepared, tmp_path: Path
) -> None:
    images = np.concatenate([batch.feeds["x"] for batch in alone.data.batches(IMAGES)])
    save_model(network(), tmp_path / "network.onnx")
    schemes, answers = [], []
    for place in (None, cluster):
        out = tmp_path / "out.onnx"
        conversion = convert(
            tmp_path / "network.onnx",
            folder,
            out,
            Budget(macs=3),
            calibration=CalibrationSettings(patches=800, batch=5),
            target=Target(Runtime(threads=1)),
            timing=False,
            recovery=RecoverySettings(epochs=6, batch=8, gradual=2, precision="float32"),
            executor=place,
        )
        assert any(note.startswith("part 1 of 2") for note in conversion.notes)
        schemes.append([layer.scheme for layer in conversion.layers])
        answers.append(ort.InferenceSession(out).run(None, {"x": images})[0])
    assert schemes[0] == schemes[1]
    # round-off of the sums, grown by the training
    np.testing.assert_allclose(*answers, atol=0.02 * float(np.ptp(answers[0])))


def test_a_file_that_workers_do_not_see(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = opened(tmp_path)
    task = cluster._task

    def gone(function: Any, *args: Any, priority: int) -> Any:
        (tmp_path / "040.png").unlink(missing_ok=True)
        return task(function, *args, priority=priority)

    monkeypatch.setattr(cluster, "_task", gone)
    with pytest.raises(CalibrationError, match=r"worker .* does not see .*040\.png; put"):
        prepared(data, cluster)


def test_what_is_wrong_with_images_is_said_as_on_one_machine(
    cluster: Cluster, alone: Prepared
) -> None:
    images = np.concatenate([batch.feeds["x"] for batch in alone.data.batches(IMAGES)])
    images[37] = 3e38
    with pytest.raises(CalibrationError, match=r"'conv1' is NaN or infinite .*samples 35 to 39"):
        prepared(opened(Reader(images)), cluster)


def test_it_is_an_executor(cluster: Cluster) -> None:
    future = cluster.submit(divmod, 7, 2)
    assert future.result(timeout=60) == (3, 1)


# Connecting ----------------------------------------------------------------------------------


def test_no_scheduler() -> None:
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9; start"):
        connect("tcp://127.0.0.1:9", timeout=0.5)


def test_no_workers() -> None:
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as local,
        pytest.raises(ConfigError, match=r"no workers; start some with `dask worker tcp://"),
    ):
        connect(local.scheduler_address, timeout=0.5)


def test_another_version_on_the_workers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.__version__", "99.0", raising=False)
    with pytest.raises(ConfigError, match=r"where this is 99\.0; install the same version"):
        connect(cluster._client.scheduler.address, timeout=60)
