"""A damaged network recovers, is never worse than it was, and goes on after an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from typer.testing import CliRunner

import converter
from converter.calibration.opening import open_calibration_set
from converter.cli import app
from converter.config import Preprocessing, RecoverySettings, Runtime, recovery_length
from converter.errors import CalibrationError, ConfigError, SolverError
from converter.model_file import file_digest, save_model
from converter.refine import training as module
from converter.refine.images import Images
from converter.refine.lessons import Lessons
from converter.refine.networks import Networks
from converter.refine.pipeline import checkpoint_of
from converter.refine.recovery import Recovered, Teacher
from converter.runtime import model_inputs

RUNTIME = Runtime(threads=1)
TEXT = """<ir_version: 8, opset_import: ["": 17]>
    small (float[n, 3, 8, 8] x) => (float[n, 5] y)
    <float[8, 3, 3, 3] a, float[8] b, float[8, 8, 3, 3] e, float[5, 8] c, float[5] d> {
        h = Conv <pads = [1, 1, 1, 1]> (x, a, b)
        r = Relu (h)
        k = Conv <pads = [1, 1, 1, 1]> (r, e)
        s = Relu (k)
        p = GlobalAveragePool (s)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, c, d)
    }"""
SHAPES = {"a": (8, 3, 3, 3), "b": (8,), "e": (8, 8, 3, 3), "c": (5, 8), "d": (5,)}


def network(noise: float = 0.0) -> onnx.ModelProto:
    """The same network, its weights off by a share of their size."""
    model = onnx.parser.parse_model(TEXT)
    random, other = np.random.default_rng(0), np.random.default_rng(1)
    del model.graph.initializer[:]
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 1)) ** 0.5
        values += noise * values.std() * other.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Original, damaged model and images."""
    images: NDArray[np.float32] = (
        np.random.default_rng(2).standard_normal((160, 3, 8, 8)).astype(np.float32)
    )
    np.save(tmp_path / "images.npy", images)
    save_model(network(), tmp_path / "original.onnx")
    save_model(network(0.3), tmp_path / "damaged.onnx")
    return tmp_path / "original.onnx", tmp_path / "damaged.onnx", tmp_path / "images.npy"


def settings(**changes: object) -> RecoverySettings:
    given: dict[str, object] = {
        "epochs": 12,
        "batch": 16,
        "rate": 0.02,
        "precision": "float32",
        **changes,
    }
    return RecoverySettings(**given)  # type: ignore[arg-type]


def convert(original: Path, images: Path, out: Path) -> converter.Conversion:
    return converter.convert(
        original,
        images,
        out,
        converter.Budget(macs=4),
        calibration=converter.CalibrationSettings(patches=512, batch=16),
        timing=False,
        recovery=settings(epochs=6, gradual=1),
    )


def cut_off(patched: pytest.MonkeyPatch, at: int) -> None:
    """Interrupt a training before its step `at`, as Ctrl-C would."""
    step = module.Training._one_step

    def interrupted(training: module.Training) -> None:
        if training.step == at:
            raise KeyboardInterrupt
        step(training)

    patched.setattr(module.Training, "_one_step", interrupted)


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_a_damaged_network_answers_like_its_original_again(files: tuple[Path, Path, Path]) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    given = damaged.read_bytes()
    found = converter.recover(original, damaged, images, out, settings(), runtime=RUNTIME)
    assert found.improved
    assert found.after.loss < 0.3 * found.before.loss
    assert found.after.agreement is not None
    assert found.before.agreement is not None
    assert found.after.agreement >= found.before.agreement
    assert (found.images, found.held_out) == (144, 16)
    assert found.status == "ended early" or found.epochs == pytest.approx(12)
    assert found.inner == ("r", "s")
    assert damaged.read_bytes() == given
    assert not checkpoint_of(out).exists()
    validation = converter.validate(original, out, images, time_batches=(1,), seconds=0.01)
    before = converter.validate(original, damaged, images, time_batches=(1,), seconds=0.01)
    assert validation.outputs[0].relative_l2 < before.outputs[0].relative_l2  # type: ignore[operator]
    json.dumps(found.to_dict())


def test_what_is_given_is_kept_where_nothing_is_better(files: tuple[Path, Path, Path]) -> None:
    original, _, images = files
    out = original.parent / "out.onnx"
    found = converter.recover(original, original, images, out, settings(epochs=2), runtime=RUNTIME)
    assert not found.improved
    assert found.after == found.before
    for name, array in weights(original).items():
        np.testing.assert_array_equal(weights(out)[name], array)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    whole, parts = original.parent / "whole.onnx", original.parent / "parts.onnx"
    converter.recover(original, damaged, images, whole, settings(), runtime=RUNTIME)

    with monkeypatch.context() as patched:
        cut_off(patched, 60)
        with pytest.raises(KeyboardInterrupt):
            converter.recover(original, damaged, images, parts, settings(), runtime=RUNTIME)
    assert checkpoint_of(parts).exists()
    assert not parts.exists()
    found = converter.recover(original, damaged, images, parts, settings(), runtime=RUNTIME)
    assert any("went on from step" in note for note in found.notes)
    for name, array in weights(whole).items():
        np.testing.assert_allclose(weights(parts)[name], array, rtol=1e-6, atol=1e-7)
    assert not checkpoint_of(parts).exists()


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


@pytest.mark.parametrize("at", [20, 80], ids=["in the channels", "in the weights"])
def test_a_run_in_two_parts_goes_on_in_either(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    original, damaged, images = files
    whole, parts = original.parent / "whole.onnx", original.parent / "parts.onnx"
    asked = settings(refit=0.4)  # 43 of 108 steps
    found = converter.recover(original, damaged, images, whole, asked, runtime=RUNTIME)
    assert found.steps == 108
    assert found.after.loss < 0.3 * found.before.loss

    with monkeypatch.context() as patched:
        cut_off(patched, at)
        with pytest.raises(KeyboardInterrupt):
            converter.recover(original, damaged, images, parts, asked, runtime=RUNTIME)
    found = converter.recover(original, damaged, images, parts, asked, runtime=RUNTIME)
    assert [note for note in found.notes if "went on from step" in note]
    for name, array in weights(whole).items():
        np.testing.assert_allclose(weights(parts)[name], array, rtol=1e-6, atol=1e-7)


def test_recover_goes_on_where_a_conversion_was_cut_off(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _, images = files
    out, better = original.parent / "out.onnx", original.parent / "better.onnx"
    with monkeypatch.context() as patched:
        cut_off(patched, 40)
        with pytest.raises(KeyboardInterrupt):
            convert(original, images, out)
    assert out.exists()
    found = converter.recover(
        original, out, images, better, settings(epochs=6), checkpoint=checkpoint_of(out)
    )
    assert any("went on from step" in note for note in found.notes)
    assert found.improved


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04 pickle"])
def test_a_checkpoint_that_is_none_is_left_out(
    files: tuple[Path, Path, Path], content: bytes
) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    checkpoint_of(out).write_bytes(content)
    found = converter.recover(original, damaged, images, out, settings(epochs=1), runtime=RUNTIME)
    assert not any("went on" in note for note in found.notes)


def test_a_checkpoint_of_other_settings_is_left_out(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # the checkpoint stays
    converter.recover(original, damaged, images, out, settings(epochs=1), runtime=RUNTIME)
    found = converter.recover(
        original, damaged, images, out, settings(epochs=1, seed=4), runtime=RUNTIME
    )
    assert not any("went on" in note for note in found.notes)


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


def test_what_ended_early_does_not_go_on(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a part does that was over before a later one was cut off: its checkpoint stays."""
    original, _, images = files
    monkeypatch.setattr(module, "PATIENCE", 2)
    asked, kept = settings(epochs=40), original.parent / "kept.npz"
    data = open_calibration_set(images, model_inputs(onnx.load(original)), Preprocessing())

    def taught() -> Recovered:
        teacher = Teacher(onnx.load(original), data, asked, RUNTIME)
        return teacher.teach(onnx.load(original), checkpoint=kept)

    first, second = taught(), taught()
    assert first.status == second.status == "ended early"
    assert first.steps == second.steps


def test_one_image_alone_in_the_last_batch_counts_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of maps, whose error is relative to how much they differ between images."""
    monkeypatch.setattr(module, "JUDGED_TOGETHER", 15)  # 16 are held out
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


def test_it_learns_the_mean_of_the_answers_to_mirror_images(
    files: tuple[Path, Path, Path],
) -> None:
    original, _, images = files
    out = original.parent / "out.onnx"
    asked = settings(epochs=20, augment=(), mirrored=True)
    found = converter.recover(original, original, images, out, asked, runtime=RUNTIME)
    assert found.improved  # the original itself does not answer so
    assert found.before.agreement == 1
    assert "mirror image" in found.notes[0]
    held_out = np.load(images)[9::10]
    both = (held_out, np.ascontiguousarray(held_out[..., ::-1]))
    before, after = (
        [ort.InferenceSession(path).run(None, {"x": seen})[0] for seen in both]
        for path in (original, out)
    )
    wanted = (before[0] + before[1]) / 2

    def off(scores: NDArray[np.float32]) -> float:
        apart = scores - wanted  # what is added to all scores alike says nothing
        return float(np.square(apart - apart.mean(1, keepdims=True)).mean())

    assert off(after[0]) < 0.95 * off(before[0])


def test_where_left_and_right_seem_alike_a_note_tells_of_mirrored(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"

    def hints(**changes: object) -> list[str]:
        asked = settings(epochs=1, **changes)
        found = converter.recover(original, damaged, images, out, asked, runtime=RUNTIME)
        return [note for note in found.notes if "--mirrored" in note]

    # of 16 held-out images of noise, through random kernels and a mean over all places
    assert hints() == [
        "the original gives 100% of images the class of their mirror images: if left and right are alike in "
        "all of them, --mirrored may well make the result right more often"
    ]
    assert hints(mirrored=True) == []
    monkeypatch.setattr("converter.refine.recovery.ALIKE", 1.01)
    assert hints() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(float[n, 7, 8, 8] x) => (float[n, 5, 8, 8] y)", "takes floating-point images to mirror"),
        ("(float[n, 3, 8, 8] x) => (float[n, 5, 8, 8] y)", "holds scores of classes"),
    ],
)
def test_nothing_to_mirror(tmp_path: Path, text: str, said: str) -> None:
    channels = int(text.split(", ")[1])
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> small {text} <float[5, {channels}, 1, 1] a> '
        "{ y = Conv (x, a) }"
    )
    del model.graph.initializer[:]
    values = np.ones((5, channels, 1, 1), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "a"))
    save_model(model, tmp_path / "model.onnx")
    given = np.random.default_rng(0).standard_normal((40, channels, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", given)
    model_file, images, out = (tmp_path / name for name in ("model.onnx", "images.npy", "out.onnx"))
    asked = settings(mirrored=True)
    with pytest.raises(ConfigError, match=said):
        converter.recover(model_file, model_file, images, out, asked, runtime=RUNTIME)
    with pytest.raises(ConfigError, match=said):
        converter.convert(
            model_file, images, out, converter.Budget(macs=1.1), timing=False, recovery=asked
        )
    assert not out.exists()


def test_labels_must_be_there(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    out, asked = original.parent / "out.onnx", settings(labels=True)
    with pytest.raises(CalibrationError, match="label"):
        converter.recover(original, damaged, images, out, asked)
    monkeypatch.setattr("converter.pipeline.begin", None)  # nothing is recorded before
    with pytest.raises(CalibrationError, match="label"):
        converter.convert(original, images, out, converter.Budget(macs=2), recovery=asked)


@pytest.mark.parametrize(
    ("shift", "said"), [(0, ""), (3, "the class 7 and the model scores for 5")]
)
def test_labels_are_learned_where_they_fit(
    files: tuple[Path, Path, Path], shift: int, said: str
) -> None:
    original, damaged, images = files
    labelled, out = original.parent / "labelled.npz", original.parent / "out.onnx"
    np.savez(labelled, x=np.load(images), labels=np.arange(160) % 5 + shift)
    asked = settings(labels=True, epochs=1)
    if not said:
        found = converter.recover(original, damaged, labelled, out, asked, runtime=RUNTIME)
        assert found.steps == 9
        return
    with pytest.raises(CalibrationError, match=said):
        converter.recover(original, damaged, labelled, out, asked, runtime=RUNTIME)


@pytest.mark.parametrize(("coarse", "taken"), [(1, "bfloat16"), (19, "float32"), (40, "float32")])
def test_the_coarser_precision_must_be_clearly_faster(coarse: int, taken: str) -> None:
    def run(precision: str) -> None:
        time.sleep(0.001 * (coarse if precision == "bfloat16" else 20))

    assert module._faster(run, "cpu") == taken


def test_each_network_has_the_precision_that_is_faster_for_it(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    held = Images({"x": np.load(images)})
    networks = Networks(onnx.load(original), onnx.load(damaged))
    asked = settings(epochs=1, precision="auto", features=0.0)
    training = module.Training(networks, held, held, Lessons(networks, held, asked), asked)
    seen: dict[str, bool] = {}

    def noted(name: str) -> Callable[[object], object]:
        plain = getattr(networks, name)

        def answers(feeds: object) -> object:
            seen[name] = torch.is_autocast_enabled("cpu")
            return plain(feeds)

        return answers

    for name in ("original", "converted"):
        monkeypatch.setattr(networks, name, noted(name))

    def faster(run: Callable[[str], None], _device: str) -> str:
        """Find bfloat16 faster where no step of the trained network was run."""
        seen.clear()
        run("float32")
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
        training = module.Training(networks, held, held, lessons, asked)
        losses.append(float(training._loss(found, wanted, rows).detach()))
    scores = found["y"].detach().double().numpy()
    of_classes = np.log(np.exp(scores).sum(1)) - scores[np.arange(37), rows % 5]
    assert losses[1] - losses[0] == pytest.approx(module.LABEL_WEIGHT * of_classes.mean(), rel=1e-4)


def test_a_fixed_batch_is_refused_before_anything_is_converted(
    files: tuple[Path, Path, Path],
) -> None:
    original, _, images = files
    model = onnx.load(original)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 16
    save_model(model, original)
    out = original.parent / "out.onnx"
    with pytest.raises(ConfigError, match="free batch"):
        convert(original, images, out)
    assert not out.exists()


def test_too_few_images(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    np.save(images, np.load(images)[:9])
    with pytest.raises(CalibrationError, match="at least 20"):
        converter.recover(original, damaged, images, out, settings())
    monkeypatch.setattr("converter.pipeline.begin", None)  # nothing is recorded before
    with pytest.raises(CalibrationError, match="at least 20"):
        convert(original, images, out)


def test_a_loss_that_is_not_finite_ends_it(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    loss = module.Training._loss

    def broken(training: module.Training, *given: Any) -> torch.Tensor:
        return loss(training, *given) * (math.nan if training.step == 7 else 1.0)

    monkeypatch.setattr(module.Training, "_loss", broken)
    with pytest.raises(SolverError, match="NaN or infinite at step 7"):
        converter.recover(original, damaged, images, original.parent / "out.onnx", settings())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", {"seconds": 90}),
        ("10m", {"seconds": 600}),
        ("1.5h", {"seconds": 5400}),
        ("20e", {"epochs": 20}),
    ],
)
def test_lengths(text: str, expected: dict[str, float]) -> None:
    assert recovery_length(text) == expected


@pytest.mark.parametrize("text", ["", "m", "10", "-3m", "nanm", "10d"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="90s, 10m or 1h"):
        recovery_length(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": None},
        {"seconds": 3.0},
        {"batch": 1},
        {"rate": 0.0},
        {"augment": ("turn",)},
        {"temperature": 0.0},
        {"refit": 1.5},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        settings(**changes)


def test_the_command_recovers_and_says_what_came_of_it(files: tuple[Path, Path, Path]) -> None:
    original, damaged, images = files
    out = original.parent / "out.onnx"
    result = CliRunner().invoke(
        app,
        [
            *("recover", str(original), str(damaged), "--images", str(images), "--out", str(out)),
            *(
                "--for",
                "8e",
                "--step-images",
                "16",
                "--rate",
                "0.02",
                "--precision",
                "float32",
                "--augment",
                "none",
            ),
            *("--json", str(out.with_suffix(".json"))),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "recovered   loss" in result.output
    assert "16 held-out images" in result.output
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["format"] == "twofold-recovery-1"
    assert written["after"]["loss"] < written["before"]["loss"]


class Once:
    """A data reader that cannot start again."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._batches = iter(np.split(images, 10))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


def test_one_reader_serves_both(files: tuple[Path, Path, Path]) -> None:
    original, _, images = files
    found = converter.convert(
        original,
        Once(np.load(images)),
        original.parent / "out.onnx",
        converter.Budget(macs=4),
        calibration=converter.CalibrationSettings(patches=512, batch=16, images=80),
        timing=False,
        recovery=settings(epochs=1, gradual=1),
    )
    assert found.recovery is not None
    assert found.recovery["images"] + found.recovery["held_out"] == 160
    assert found.calibration["data"].startswith("80 ")


def test_weights_in_nodes_are_trained_too(files: tuple[Path, Path, Path]) -> None:
    original, _, images = files
    model = onnx.load(original)
    for weight in model.graph.initializer:
        node = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    save_model(model, original)
    conversion = convert(original, images, original.parent / "out.onnx")
    assert conversion.recovery is not None
    assert conversion.recovery["improved"]


def test_a_conversion_recovers_what_it_lost(files: tuple[Path, Path, Path]) -> None:
    original, _, images = files
    out = original.parent / "out.onnx"
    conversion = convert(original, images, out)
    assert conversion.recovery is not None
    assert set(conversion.recovery["notes"]) <= set(conversion.notes)
    assert conversion.recovery["after"]["loss"] < conversion.recovery["before"]["loss"]
    assert conversion.macs_reduction >= 4
    assert conversion.out_digest == file_digest(out)
