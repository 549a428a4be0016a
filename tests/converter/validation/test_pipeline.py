"""Comparisons of two models against closed forms and numpy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.parser import parse_model

from converter.calibration.sets import Batch
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ModelError, ValidationError
from converter.latency import speedup
from converter.model_file import model_digest, save_model
from converter.plain_file import file_digest
from converter.validation.findings import Validation
from converter.validation.pipeline import validate

ONE = Runtime(threads=1)
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
IDENTITY = "g (float[N, 3] x) => (float[N, 3] y) { y = Identity(x) }"


class Arrays:
    """A calibration set of arrays in memory."""

    def __init__(
        self,
        labels: np.ndarray | None = None,
        names: tuple[str, ...] | None = None,
        **arrays: np.ndarray,
    ) -> None:
        self.arrays, self.labels, self.class_names = arrays, labels, names

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            feeds = {name: array[part] for name, array in self.arrays.items()}
            count = len(next(iter(feeds.values())))
            yield Batch(feeds, None if self.labels is None else self.labels[part], count)

    def describe(self) -> str:
        return "arrays"

    def digest(self) -> str:
        return ""


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = parse_model(HEAD + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in weights.items()
    )
    return model


def compare(
    original: onnx.ModelProto | Path,
    converted: onnx.ModelProto | Path,
    data: Arrays,
    **options: Any,
) -> Validation:
    return validate(original, converted, data, ONE, **{"time_batches": (), **options})


def plus(offset: object, classes: int = 3) -> onnx.ModelProto:
    text = f"g (float[N, {classes}] x) => (float[N, {classes}] y) {{ y = Add(x, c) }}"
    return build(text, c=np.asarray(offset, np.float32))


# ---- output error


def test_a_known_offset_gives_known_errors() -> None:
    x = np.float32([[0, 2, 4], [1, 3, 8]])
    (found,) = compare(build(IDENTITY), plus([1, 0, -2]), Arrays(x=x)).outputs
    assert found.name == "y"
    assert found.elements == 6
    assert found.max_abs == 2
    assert found.mean_abs == 1
    assert found.median_abs == 1
    assert found.p99_abs == pytest.approx(np.quantile([0, 0, 1, 1, 2, 2], 0.99))
    assert found.span == 8
    assert found.max_relative == 0.25
    assert found.relative_l2 == pytest.approx(math.sqrt(10 / (0 + 4 + 16 + 1 + 9 + 64)))
    assert found.tolerance == 1  # at x = 0: 1 ≤ t + t·0, above 2 ≤ t + t·4
    assert found.sampled is None
    assert (found.nonfinite_original, found.nonfinite_converted) == (0, 0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_the_batch_size_changes_nothing(images: int, batch: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((images, 3)).astype(np.float32)
    offset = generator.standard_normal(3).astype(np.float32)
    labels = generator.integers(0, 3, images)
    found = compare(build(IDENTITY), plus(offset), Arrays(labels, x=x), batch=batch)
    errors = np.abs((x + offset).astype(np.float64) - x)
    (output,) = found.outputs
    assert output.max_abs == errors.max()
    assert output.mean_abs == pytest.approx(errors.mean())
    assert output.median_abs == np.median(errors)
    assert output.p99_abs == np.quantile(errors, 0.99)
    assert output.relative_l2 == pytest.approx(np.linalg.norm(errors) / np.linalg.norm(x))
    assert output.tolerance == pytest.approx((errors / (1 + np.abs(x))).max())
    assert found.images == images
    best, other = x.argmax(1), (x + offset).argmax(1)
    assert found.agreement is not None
    assert found.agreement.top1 == pytest.approx((best == other).mean())
    assert found.accuracy is not None
    assert found.accuracy.original == pytest.approx((best == labels).mean())
    assert found.accuracy.converted == pytest.approx((other == labels).mean())


def test_every_output_is_compared_by_name() -> None:
    first = build("g (float[N, 3] x) => (float[N, 3] a, int64[2] s) { a = Relu(x) s = Shape(x) }")
    second = build("g (float[N, 3] x) => (int64[2] s, float[N, 3] a) { s = Shape(x) a = Abs(x) }")
    found = compare(first, second, Arrays(x=np.float32([[-1, 2, -3]])))
    assert [(each.name, each.max_abs) for each in found.outputs] == [("a", 3), ("s", 0)]


def test_several_inputs() -> None:
    text = "g (float[N, 3] x, float[N, 1] z) => (float[N, 3] y) { y = %s(x, z) }"
    data = Arrays(x=np.ones((4, 3), np.float32), z=np.full((4, 1), 2, np.float32))
    assert compare(build(text % "Add"), build(text % "Sub"), data, batch=3).outputs[0].max_abs == 4


def test_zero_outputs_have_no_relative_error() -> None:
    zero = Arrays(x=np.zeros((2, 3), np.float32))
    same = compare(build(IDENTITY), plus([0, 0, 0]), zero).outputs[0]
    assert (same.max_relative, same.relative_l2) == (0, 0)
    off = compare(build(IDENTITY), plus([1, 0, 0]), zero).outputs[0]
    assert (off.max_relative, off.relative_l2, off.max_abs) == (None, None, 1)


def test_non_finite_outputs_are_counted_and_left_out() -> None:
    root = build("g (float[N, 3] x) => (float[N, 3] y) { y = Sqrt(x) }")
    x = np.float32([[1, 4, 9], [1, -4, 9]])
    found = compare(build(IDENTITY), root, Arrays(np.array([2, 2]), x=x))
    (output,) = found.outputs
    assert (output.nonfinite_original, output.nonfinite_converted) == (0, 1)
    assert output.elements == 6
    assert output.max_abs == 6
    assert output.mean_abs == pytest.approx((0 + 2 + 6 + 0 + 6) / 5)
    assert not found.finite
    assert found.agreement is not None
    assert found.agreement.top1 == 0.5  # the second image has a score that is no number
    assert found.accuracy is not None
    assert (found.accuracy.original, found.accuracy.converted) == (1, 0.5)
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_finite_at_all() -> None:
    log = build("g (float[N, 3] x) => (float[N, 3] y) { y = Log(x) }")
    found = compare(build(IDENTITY), log, Arrays(x=-np.ones((2, 3), np.float32)))
    (output,) = found.outputs
    assert (output.max_abs, output.median_abs, output.span, output.tolerance) == (None,) * 4
    assert output.nonfinite_converted == 6
    json.dumps(found.to_dict(), allow_nan=False)


# ---- classes


def test_accuracy_and_its_standard_error_from_disagreements() -> None:
    classes = np.eye(3, dtype=np.float32)
    # The converted model swaps the classes 0 and 1: images of class 2 stay right.
    swap = build("g (float[N, 3] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=classes[[1, 0, 2]])
    answers = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 2])
    labels = np.array([0, 0, 0, 0, 2, 2, 2, 2, 2, 1])
    found = compare(build(IDENTITY), swap, Arrays(labels, tuple("abc"), x=classes[answers]))
    assert found.agreement is not None
    assert (found.agreement.output, found.agreement.top1, found.agreement.top5) == ("y", 0.6, None)
    accuracy = found.accuracy
    assert accuracy is not None
    assert (accuracy.images, accuracy.original, accuracy.converted) == (10, 0.8, 0.6)
    assert (accuracy.lost, accuracy.won) == (3, 1)
    assert accuracy.drop_points == pytest.approx(20)
    # Per image the difference is 1 three times, −1 once, else 0: its standard deviation over √n.
    differences = np.array([1] * 3 + [-1] + [0] * 6)
    assert accuracy.standard_error_points == pytest.approx(100 * differences.std() / math.sqrt(10))


@pytest.mark.parametrize(
    ("labels", "count", "doubted"),
    [
        ("in another order", 120, True),
        ("in another order", 60, False),  # too few to tell
        ("right for half of them", 120, False),
        ("of one class", 120, False),
        ("right, and all but two of one class", 120, False),
        ("one class but for chance", 120, True),
    ],
)
def test_an_accuracy_of_chance_is_doubted(labels: str, count: int, doubted: bool) -> None:
    rows = np.arange(count)
    answers = rows % 4
    if "one class" in labels and labels != "of one class":
        answers = (rows >= count - 2).astype(int)
    given = {
        "right, and all but two of one class": answers,
        "one class but for chance": (rows < 2).astype(int),
        "in another order": (rows + rows // 4) % 4,
        "right for half of them": np.where(rows % 8 < 4, answers, (answers + 1) % 4),
        "of one class": np.zeros_like(rows),
    }[labels]
    model = build("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }")
    found = compare(model, model, Arrays(given, x=np.eye(4, dtype=np.float32)[answers]))
    accuracy = found.accuracy
    assert accuracy is not None
    if labels == "of one class":
        assert accuracy.chance is accuracy.chance_error is None
    else:
        # of labels in any other order
        random = np.random.default_rng(0)
        right = [(answers == random.permutation(given)).mean() for _ in range(4000)]
        assert accuracy.chance == pytest.approx(np.mean(right), abs=0.005)
        assert accuracy.chance_error == pytest.approx(np.std(right), rel=0.1)
    assert accuracy.by_chance == doubted
    assert any("no more often than by chance" in note for note in found.notes) == doubted
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("odd", "count", "noted"), [(0, 100, True), (1, 100, False), (0, 99, False)]
)
def test_the_same_answer_to_all_images_is_noted(odd: int, count: int, noted: bool) -> None:
    x = np.tile(np.float32([1, 3, 2]), (count, 1))
    x[:odd] = [3, 1, 2]
    found = compare(build(IDENTITY), build(IDENTITY), Arrays(x=x))
    assert any("the same best class" in note for note in found.notes) == noted


def test_top_five_looks_for_the_originals_best() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { y = %s(x) }"
    x = np.float32([[8, 7, 6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1, 1, 9]])
    turned = build(text % "Neg")
    found = compare(build(text % "Identity"), turned, Arrays(x=x)).agreement
    assert found is not None
    assert (found.top1, found.top5) == (0, 0)
    same = compare(build(text % "Identity"), build(text % "Abs"), Arrays(x=x)).agreement
    assert same is not None
    assert (same.top1, same.top5) == (1, 1)
    # The best class moves to fifth place for the first image, and stays best for the second.
    fifth = compare(
        build(text % "Identity"), plus([-3.5, 0, 0, 0, 0, 0, 0, 0], 8), Arrays(x=x)
    ).agreement
    assert fifth is not None
    assert (fifth.top1, fifth.top5) == (0.5, 1)


def test_scores_with_trailing_axes_of_length_one() -> None:
    text = "g (float[N, 3, 1, 1] x) => (float[N, 3, 1, 1] y) { y = %s(x) }"
    x = np.float32([[-1, 0, -9], [3, 2, 1]]).reshape(2, 3, 1, 1)
    found = compare(build(text % "Identity"), build(text % "Abs"), Arrays(x=x)).agreement
    assert found is not None
    assert found.top1 == 0.5


@pytest.mark.parametrize("shape", ["N, 3, 4", "N, 1"])
def test_outputs_that_are_no_scores(shape: str) -> None:
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}"
    x = np.ones([2 if size == "N" else int(size) for size in shape.split(", ")], np.float32)
    found = compare(build(text), build(text), Arrays(np.zeros(2, np.int64), x=x))
    assert (found.agreement, found.accuracy) == (None, None)
    assert len(found.notes) == 1


def test_a_scalar_beside_the_scores() -> None:
    text = """g (float[N, 3] x) => (float m, float[N, 3] y)
        { m = ReduceMax<keepdims = 0>(x) y = Identity(x) }"""
    found = compare(build(text), build(text), Arrays(x=np.ones((2, 3), np.float32)))
    assert found.agreement is not None
    assert found.agreement.output == "y"


def test_other_numbers_of_classes_leave_accuracy_out() -> None:
    data = Arrays(np.zeros(5, np.int64), ("cat", "dog"), x=np.ones((5, 3), np.float32))
    found = compare(build(IDENTITY), build(IDENTITY), data, batch=2)
    assert found.accuracy is None
    assert found.agreement is not None
    assert found.notes == (
        "the images have 2 classes and output 'y' has 3, so accuracy is left out",
    )


def test_labels_that_are_no_classes() -> None:
    data = Arrays(np.array([0, 3]), x=np.ones((2, 3), np.float32))
    with pytest.raises(CalibrationError, match="labels go from 0 to 3, and output 'y' has"):
        compare(build(IDENTITY), build(IDENTITY), data)


# ---- fixed batches


def test_a_fixed_batch_is_filled_and_the_filling_left_out() -> None:
    fixed = IDENTITY.replace("N", "4")
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    offset = build(fixed.replace("Identity(x)", "Add(x, c)"), c=[0, 0, 1])
    found = compare(
        build(fixed),
        offset,
        Arrays(np.full(6, 2), x=x),
        batch=32,
        time_batches=(1, 4),
        seconds=0.02,
    )
    assert found.images == 6
    assert found.outputs[0].elements == 18
    assert found.accuracy is not None
    assert found.accuracy.images == 6
    one, four = found.latencies
    assert (one.batch, one.original, one.speedup) == (1, None, None)
    assert one.skipped == "the model has a fixed batch of 4"
    assert four.original is not None
    assert four.original.batch == 4


def test_a_fixed_batch_beside_a_free_one() -> None:
    x = np.ones((3, 3), np.float32)
    found = compare(build(IDENTITY), build(IDENTITY.replace("N", "2")), Arrays(x=x))
    assert (found.images, found.outputs[0].max_abs) == (3, 0)


# ---- cost and latency


def test_costs_and_their_reductions(tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) %s"
    generator = np.random.default_rng(0)
    down, up = generator.standard_normal((8, 2)), generator.standard_normal((2, 8))
    whole = build(text % "{ y = MatMul(x, w) }", w=down @ up)
    split = build(text % "{ h = MatMul(x, a) y = MatMul(h, b) }", a=down, b=up)
    paths = [tmp_path / "whole.onnx", tmp_path / "split.onnx"]
    for path, model in zip(paths, (whole, split), strict=True):
        onnx.save(model, path)
    data = Arrays(x=generator.standard_normal((5, 8)).astype(np.float32))
    found = compare(*paths, data, time_batches=(1, 16), seconds=0.02)
    assert (found.original.macs, found.converted.macs, found.macs_reduction) == (64, 32, 2)
    assert (found.original.params, found.converted.params, found.params_reduction) == (64, 32, 2)
    assert [found.original.bytes, found.converted.bytes] == [path.stat().st_size for path in paths]
    assert found.bytes_reduction == found.original.bytes / found.converted.bytes
    assert found.outputs[0].max_relative is not None
    assert found.outputs[0].max_relative < 1e-6  # float32 round-off of sums of 8 terms
    for latency, batch in zip(found.latencies, (1, 16), strict=True):
        assert latency.original is not None
        assert latency.converted is not None
        assert latency.speedup is not None
        assert latency.original.batch == latency.converted.batch == batch
        assert latency.speedup == speedup(latency.original, latency.converted)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["macs_reduction"] == 2
    assert plain["latencies"][1]["batch"] == 16


def test_nothing_left_has_no_reduction() -> None:
    found = compare(plus([1, 2, 3]), build(IDENTITY), Arrays(x=np.ones((1, 3), np.float32)))
    assert (found.params_reduction, found.macs_reduction) == (None, None)


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    data = Arrays(x=np.ones((5, 3), np.float32))
    compare(build(IDENTITY), build(IDENTITY), data, batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# ---- refusals


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("g (float[N, 3] z) => (float[N, 3] y) { y = Relu(z) }", "has no input 'x'"),
        ("g (float[N, 3] x, float[N, 3] z) => (float[N, 3] y) { y = Add(x, z) }", "no input 'z'"),
        ("g (float[N, 3] x) => (float[N, 3] u) { u = Relu(x) }", "has no output 'y'"),
        ("g (double[N, 3] x) => (float[N, 3] y) { y = Cast<to = 1>(x) }", "input 'x' is float32"),
        ("g (float[N, 4] x) => (float[N, 3] y) { y = Relu(x) }", r"\['N', 4\]"),
        ("g (float[N, 3, 1] x) => (float[N, 3] y) { y = Relu(x) }", r"\['N', 3, 1\]"),
        ("g (float[N, 3] x) => (double[N, 3] y) { y = Cast<to = 11>(x) }", "output 'y' is float "),
        ("g (float[N, 3] x) => (float[N, 4] y) { y = Relu(x) }", "output 'y'"),
    ],
)
def test_models_that_do_not_belong_together(other: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        compare(build(IDENTITY), build(other), Arrays(x=np.ones((2, 3), np.float32)))


def test_outputs_whose_real_shapes_differ() -> None:
    first = build("g (float[N, 3] x) => (float[A, B] y) { y = Relu(x) }")
    second = build("g (float[N, 3] x) => (float[A, B] y) { y = Transpose(x) }")
    with pytest.raises(ValidationError, match=r"shape \[2, 3\] in the original and \[3, 2\]"):
        compare(first, second, Arrays(x=np.ones((2, 3), np.float32)))


def test_text_outputs() -> None:
    text = "g (float[N, 3] x) => (string[N, 3] y) { y = Cast<to = 8>(x) }"
    with pytest.raises(ValidationError, match="numbers"):
        compare(build(text), build(text), Arrays(x=np.ones((2, 3), np.float32)))


def test_no_images() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        compare(build(IDENTITY), build(IDENTITY), Arrays(x=np.ones((0, 3), np.float32)))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"time_batches": (1, 0)}])
def test_batches_of_nothing(sizes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="batch"):
        compare(build(IDENTITY), build(IDENTITY), Arrays(x=np.ones((1, 3), np.float32)), **sizes)


def test_the_refused_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(build(IDENTITY.replace("Identity(x)", "Relu(q)")), path)
    with pytest.raises(ModelError, match=r"odd\.onnx"):
        compare(build(IDENTITY), path, Arrays(x=np.ones((1, 3), np.float32)))


def test_a_reference_model_equals_itself(shared: Path) -> None:
    path = shared / "models" / "resnet20_cifar10.onnx"
    x = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    found = compare(path, path, Arrays(np.zeros(6, np.int64), input=x), batch=4)
    (output,) = found.outputs
    assert (output.name, output.elements, output.max_abs) == ("logits", 60, 0)
    assert found.agreement is not None
    assert (found.agreement.top1, found.agreement.top5) == (1, 1)
    assert found.macs_reduction == found.params_reduction == found.bytes_reduction == 1
    assert found.accuracy is not None
    one = pytest.approx(100 / found.accuracy.images)
    assert (found.accuracy.drop_points, found.accuracy.standard_error_points) == (0, one)


# ---- the worst images


def test_the_worst_images_are_told_with_their_classes() -> None:
    x = np.float32([[3, 2, 0], [9, 0, 0], [0, 5, 0], [0, 0, 7]])
    labels = np.array([0, 0, 1, 2])
    found = compare(
        build(IDENTITY), plus([0, 2, 0]), Arrays(labels, ("a", "b", "c"), x=x), batch=3, worst=2
    )
    assert [each.index for each in found.worst] == [0, 2]  # another class, then the largest error
    assert (found.worst[0].original, found.worst[0].converted, found.worst[0].label) == (0, 1, 0)
    assert found.worst[1].error == pytest.approx(2 / 5)
    assert found.class_names == ("a", "b", "c")
    assert found.data == "arrays"
    assert compare(build(IDENTITY), plus([0, 2, 0]), Arrays(x=x), worst=0).worst == ()


def test_names_that_are_not_those_of_the_scores_are_left_out() -> None:
    x = np.eye(3, dtype=np.float32)
    found = compare(build(IDENTITY), plus([0, 2, 0]), Arrays(None, ("a", "b"), x=x))
    assert found.class_names is None


def test_files_are_told_by_name_and_digest(tmp_path: Path) -> None:
    onnx.save(build(IDENTITY), tmp_path / "a.onnx")
    found = compare(tmp_path / "a.onnx", plus([0, 2, 0]), Arrays(x=np.eye(3, dtype=np.float32)))
    assert found.original.file == str(tmp_path / "a.onnx")
    assert found.original.digest == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()
    assert found.converted.file is found.converted.digest is None


def test_the_digest_is_that_of_a_conversion_also_where_weights_lie_beside_the_model(
    tmp_path: Path,
) -> None:
    save_model(plus(np.arange(1200.0), 1200), tmp_path / "a.onnx", external_above=0)
    assert (tmp_path / "a.onnx.data").exists()
    images = Arrays(x=np.zeros((2, 1200), np.float32))
    found = compare(tmp_path / "a.onnx", tmp_path / "a.onnx", images)
    assert found.original.digest == found.converted.digest == model_digest(tmp_path / "a.onnx")
    assert found.original.digest != file_digest(tmp_path / "a.onnx")


def test_none_of_a_few_images_says_little() -> None:
    images = Arrays(labels=np.arange(3), x=np.eye(3, dtype=np.float32))
    accuracy = compare(build(IDENTITY), build(IDENTITY), images).accuracy
    assert accuracy is not None
    assert (accuracy.drop_points, accuracy.standard_error_points) == (0, pytest.approx(100 / 3))
