"""Steps, judging and the end of a training, and in which precision it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter.config import RecoverySettings
from converter.errors import ConfigError, SolverError
from converter.model_file import save_model
from converter.refine import training as module
from converter.refine.images import Images
from converter.refine.lessons import Lessons
from converter.refine.loss import LABEL_WEIGHT
from converter.refine.networks import Networks
from tests.converter.refine.small import RUNTIME, cut_off, network, settings, weights


def test_steps_get_smaller_where_they_only_shake_a_good_network(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    monkeypatch.setattr(module, "PATIENCE", 10_000)
    save_model(network(0.01), damaged)
    shaken, out = settings(rate=0.5, epochs=20), original.parent / "out.onnx"
    losses = []
    for shrink in (1.0, module.SHRINK):
        monkeypatch.setattr(module, "SHRINK", shrink)
        found = converter.recover(original, damaged, images, out, shaken, runtime=RUNTIME)
        losses.append(found.after.loss / found.before.loss)
    assert losses[1] < 0.5 * losses[0], losses


def test_weights_that_lead_to_an_output_that_is_left_out_stay(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    for path, noise in ((original, 0.0), (damaged, 0.3)):
        model = network(noise)
        head = numpy_helper.from_array(np.ones((1, 8, 1, 1), np.float32), "head")
        model.graph.initializer.append(head)
        model.graph.node.add(op_type="Conv", input=["r", "head"], output=["q"])
        total = onnx.helper.make_node("ReduceMean", ["q"], ["total"], keepdims=0)
        model.graph.node.append(total)
        kind = onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, [])
        model.graph.output.append(kind)
        save_model(model, path)
    out, asked = original.parent / "out.onnx", settings(epochs=4)
    kept = original.parent / "kept.npz"
    asking = (original, damaged, images, out, asked)
    with monkeypatch.context() as patched:
        cut_off(patched, at=25)
        with pytest.raises(KeyboardInterrupt):
            converter.recover(*asking, runtime=RUNTIME, checkpoint=kept)
    assert kept.exists()
    found = converter.recover(*asking, runtime=RUNTIME, checkpoint=kept)
    assert any("went on from step" in note for note in found.notes)
    assert found.improved
    np.testing.assert_array_equal(weights(out)["head"], np.ones((1, 8, 1, 1), np.float32))


def channel_scales(found: NDArray[np.float32], given: NDArray[np.float32]) -> NDArray[np.float64]:
    """Factor of each row of a weight, and that each row has but one is required."""
    rows = found.reshape(len(found), -1).astype(float), given.reshape(len(given), -1).astype(float)
    factors = (rows[0] * rows[1]).sum(1) / (rows[1] ** 2).sum(1)
    np.testing.assert_allclose(rows[0], factors[:, None] * rows[1], rtol=1e-4, atol=1e-5)
    return factors


def test_channels_alone_are_fitted_again(files: tuple[Path, Path, Path]) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    found = converter.recover(original, damaged, images, out, settings(refit=1.0), runtime=RUNTIME)
    assert found.improved
    assert found.epochs == pytest.approx(12) or found.status == "ended early"
    before, after = weights(damaged), weights(out)
    moved = [np.abs(channel_scales(after[name], before[name]) - 1).max() for name in "aec"]
    assert min(moved) > 1e-3
    assert all(np.abs(after[name] - before[name]).max() > 1e-4 for name in "bd")


def test_it_ends_with_the_time(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    monkeypatch.setattr(module, "PATIENCE", 10_000)  # a fast machine has gained all by then
    limited = settings(epochs=None, seconds=0.5)
    found = converter.recover(
        original, damaged, images, original.parent / "out.onnx", limited, runtime=RUNTIME
    )
    assert found.status == "time limit"
    assert 0.5 <= found.seconds < 10.0


def test_slow_judging_leaves_the_training_its_time(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    judged, judged_mean = [], module.Training._judged_mean

    def slowly(training: module.Training) -> float:
        judged.append(training.done)
        time.sleep(0.1)
        return judged_mean(training)

    monkeypatch.setattr(module.Training, "_judged_mean", slowly)
    limited = settings(epochs=None, seconds=1.2)
    found = converter.recover(
        original, damaged, images, original.parent / "out.onnx", limited, runtime=RUNTIME
    )
    # of 21 times: at first, once when a fifth of what has passed is two of them, and in the end
    assert 2 <= len(judged) <= 3
    assert judged[-1] >= 1
    assert found.status == "time limit"
    assert found.improved


def test_it_ends_early_where_nothing_is_gained(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _, images = files
    monkeypatch.setattr(module, "PATIENCE", 2)
    found = converter.recover(
        original,
        original,
        images,
        original.parent / "out.onnx",
        settings(epochs=40),
        runtime=RUNTIME,
    )
    assert found.status == "ended early"
    assert 20 < found.epochs < 40


def test_one_image_alone_in_the_last_batch_counts_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of maps, whose error is relative to how much they differ between images."""
    monkeypatch.setattr(module, "judged_together", lambda *_: 15)  # 16 are held out
    model = network()
    del model.graph.node[4:]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("s", 1, ["n", 8, 8, 8]))
    save_model(model, tmp_path / "original.onnx")
    np.save(
        tmp_path / "x.npy", np.random.default_rng(2).standard_normal((160, 3, 8, 8)).astype("f4")
    )
    shaken = onnx.ModelProto()
    shaken.CopyFrom(model)
    first = numpy_helper.to_array(shaken.graph.initializer[0])
    shaken.graph.initializer[0].CopyFrom(numpy_helper.from_array(1.1 * first, "a"))
    save_model(shaken, tmp_path / "damaged.onnx")
    judged: list[float] = []
    judged_mean = module.Training._judged_mean

    def listed(training: module.Training) -> float:
        judged.append(judged_mean(training))
        return judged[-1]

    monkeypatch.setattr(module.Training, "_judged_mean", listed)
    found = converter.recover(
        *(tmp_path / name for name in ("original.onnx", "damaged.onnx", "x.npy", "out.onnx")),
        settings(epochs=1),
        runtime=RUNTIME,
    )
    assert judged[0] == pytest.approx(found.before.loss, rel=1e-3)


@pytest.mark.parametrize(("coarse", "taken"), [(1, "bfloat16"), (19, "float32"), (40, "float32")])
def test_the_coarser_precision_must_be_clearly_faster(coarse: int, taken: str) -> None:
    def run(_size: int, precision: str) -> None:
        time.sleep(0.001 * (coarse if precision == "bfloat16" else 20))

    assert module._faster(run, 64, "cpu") == taken


def test_a_precision_without_instructions_is_not_timed_for_a_whole_batch() -> None:
    def run(size: int, precision: str) -> None:
        assert size == 64 / module.PROBED
        time.sleep(0.02 if precision == "bfloat16" else 0.001)

    assert module._faster(run, 64, "cpu") == "float32"


def begun(files: tuple[Path, Path, Path], asked: RecoverySettings) -> module.Training:
    """A training of the damaged network that was not run yet, judged on what it learns from."""
    original, damaged, images = files
    held = Images({"x": np.load(images)})
    networks = Networks(onnx.load(original), onnx.load(damaged))
    lessons = Lessons(networks, held, asked)
    wanted = lessons.of_held_out(held, 64)
    return module.Training(networks, held, held, wanted, lessons, asked)


def test_each_network_has_the_precision_that_is_faster_for_it(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begun(files, settings(epochs=1, precision="auto", features=0.0))
    networks = training.networks
    seen: dict[str, bool] = {}

    def noted(name: str) -> Callable[[object], object]:
        plain = getattr(networks, name)

        def answers(feeds: object) -> object:
            seen[name] = torch.is_autocast_enabled("cpu")
            return plain(feeds)

        return answers

    for name in ("original", "converted"):
        monkeypatch.setattr(networks, name, noted(name))

    def faster(run: Callable[[int, str], None], size: int, _device: str) -> str:
        """Find bfloat16 faster where no step of the trained network was run."""
        seen.clear()
        run(size, "float32")
        return "float32" if "converted" in seen else "bfloat16"

    monkeypatch.setattr(module, "_faster", faster)
    training.precision, training.asked_in = training._precisions()
    seen.clear()
    training._one_step()
    assert seen == {"original": True, "converted": False}


def test_labels_add_their_cross_entropy(files: tuple[Path, Path, Path]) -> None:
    original, damaged, images = files
    held = Images({"x": np.load(images)}, np.arange(160) % 5)
    networks = Networks(onnx.load(original), onnx.load(damaged))
    rows = np.arange(3, 40)
    feeds = held.batch(rows, "cpu")
    found, wanted = networks.converted(feeds), networks.original(feeds)
    losses = []
    for labels in (False, True):
        asked = settings(labels=labels)
        lessons = Lessons(networks, held, asked)
        kept = lessons.of_held_out(held, 64)
        training = module.Training(networks, held, held, kept, lessons, asked)
        losses.append(float(training._loss(found, wanted, rows).detach()))
    scores = found["y"].detach().double().numpy()
    of_classes = np.log(np.exp(scores).sum(1)) - scores[np.arange(37), rows % 5]
    assert losses[1] - losses[0] == pytest.approx(LABEL_WEIGHT * of_classes.mean(), rel=1e-4)


@pytest.mark.parametrize("at", [0, 100])
def test_a_loss_that_is_not_finite_ends_it(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    loss = module.Training._loss

    def broken(training: module.Training, *given: Any) -> torch.Tensor:
        return loss(training, *given) * (math.nan if training.step == at else 1.0)

    monkeypatch.setattr(module.Training, "_loss", broken)
    if at == 0:
        with pytest.raises(SolverError, match="NaN or infinite at step 0"):
            converter.recover(original, damaged, images, out, settings(), runtime=RUNTIME)
        return
    found = converter.recover(original, damaged, images, out, settings(), runtime=RUNTIME)
    assert found.improved  # what was gained until then is kept
    assert (found.steps, found.status) == (at, "ended early")
    assert any("NaN or infinite at step 100" in note for note in found.notes)


def test_a_network_that_answers_nothing_finite_at_first_is_trained_from_there(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begun(files, settings(epochs=1))
    losses = iter([math.nan, math.nan, 2.0, 3.0])
    monkeypatch.setattr(training, "_judged_mean", lambda: next(losses))
    assert training._keep_best()
    assert training.best.keys() == training.networks.parameters.keys()
    assert [training._keep_best() for _ in range(3)] == [False, True, False]
    assert (training.best_loss, training.gained) == (2.0, True)


def test_a_checkpoint_that_cannot_be_written_ends_nothing(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files

    def full(*_: object) -> None:
        raise ConfigError("no space left on device")

    monkeypatch.setattr(module, "save_arrays", full)
    out = original.parent / "out.onnx"
    found = converter.recover(original, damaged, images, out, settings(), runtime=RUNTIME)
    assert found.improved
    assert [note for note in found.notes if "no space" in note] == [
        "an interrupted run would begin anew, or further back: no space left on device"
    ]
