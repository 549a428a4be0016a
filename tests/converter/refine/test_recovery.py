"""A damaged network recovers, is never worse than it was, and goes on after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

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
from converter.config import Preprocessing
from converter.errors import CalibrationError, ConfigError
from converter.model_file import save_model
from converter.plain_file import file_digest
from converter.refine import training as module
from converter.refine.pipeline import checkpoint_of
from converter.refine.recovery import Recovered, Teacher
from converter.runtime import model_inputs
from tests.converter.refine.small import RUNTIME, cut_off, settings, weights


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
    assert validation.outputs[0].relative_l2 < before.outputs[0].relative_l2  # type: ignore[operator]  # None fails too
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
    assert any("is damaged, or of other models" in note for note in found.notes)


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
    assert any("so this run began anew" in note for note in found.notes)


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
        plain = converter.recover(
            original, damaged, labelled, out, settings(epochs=1), runtime=RUNTIME
        )
        # images are judged by what is learned, and here classes have nothing to do with the answers
        assert found.before.loss > plain.before.loss + 0.3
        return
    with pytest.raises(CalibrationError, match=said):
        converter.recover(original, damaged, labelled, out, asked, runtime=RUNTIME)


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


def test_a_conversion_stays_where_it_cannot_be_recovered(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _, images = files
    monkeypatch.setattr(module.Training, "_loss", lambda *_: torch.tensor(math.nan))
    out = original.parent / "out.onnx"
    done = convert(original, images, out)
    assert done.recovery is None
    assert done.macs_before / done.macs_after >= 4
    assert any("could not be recovered, and stays as it was converted" in n for n in done.notes)
    assert len(set(done.notes)) == len(done.notes)
    converter.validate(original, out, images, time_batches=())


def test_what_is_no_image_is_neither_flipped_nor_shifted(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        flat (float[n, 6] x) => (float[n, 4] y) { y = Gemm <transB = 1> (x, w) }"""
    )
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 6)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    save_model(model, tmp_path / "flat.onnx")
    np.save(tmp_path / "x.npy", random.standard_normal((40, 6)).astype(np.float32))
    paths = [tmp_path / name for name in ("flat.onnx", "flat.onnx", "x.npy", "out.onnx")]
    found = converter.recover(*paths, settings(epochs=1), runtime=RUNTIME)
    assert any("none is flipped or shifted" in note for note in found.notes)
    found = converter.recover(*paths, settings(epochs=1, augment=()), runtime=RUNTIME)
    assert not any("none is flipped or shifted" in note for note in found.notes)


def test_of_large_answers_fewer_images_are_judged(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, damaged, images = files
    # five scores an image: so much room is left for six of them, of sixteen
    monkeypatch.setattr("converter.refine.recovery.JUDGED_BYTES", (8 << 20) // (5 * 6))
    asked = settings(epochs=1, memory_mib=16)
    found = converter.recover(
        original, damaged, images, original.parent / "out.onnx", asked, runtime=RUNTIME
    )
    assert found.held_out == 6
    assert found.images == 154
    assert any(note.startswith("6 images are held out to judge by") for note in found.notes)
