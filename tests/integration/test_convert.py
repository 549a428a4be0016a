"""`converter.convert`, the whole way, on small networks and on a trained ResNet-20."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader

import converter
from converter import Budget, CalibrationSettings, Conversion, Runtime, SolverSettings, Target
from converter.calibration.opening import open_calibration_set
from converter.errors import ModelError
from converter.plain_file import file_digest
from converter.planner.cost import ModelCost, count_cost
from converter.report.page import render_page
from converter.runtime import model_inputs

Array = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

ONE_THREAD = Runtime(threads=1)
SMALL = CalibrationSettings(batch=16, patches=512)
QUICK = SolverSettings(name="data-svd")
ADMM = SolverSettings(iterations=4, polish=1)

RESIDUAL: Shapes = {
    "w1": (12, 3, 3, 3), "b1": (12,),
    "w2": (16, 12, 3, 3), "b2": (16,),
    "w3": (16, 16, 3, 3), "b3": (16,),
    "w4": (10, 256), "b4": (10,),
}  # fmt: skip
RESIDUAL_TEXT = """
    residual (float[{batch}, 3, 8, 8] image) => (float[{batch}, 10] logits)
    {{
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
        [relu1] r1 = Relu(c1)
        [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2, b2)
        [relu2] r2 = Relu(c2)
        [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3, b3)
        [sum] s = Add(c3, r2)
        [relu3] r3 = Relu(s)
        [pool] p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r3)
        [flat] f = Flatten(p)
        [classifier] logits = Gemm<transB = 1>(f, w4, b4)
    }}
"""


def network(text: str, shapes: Shapes, seed: int = 0) -> onnx.ModelProto:
    """Model from text, with random weights: He-scaled, with a spectrum that falls."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        if len(shape) == 1:
            values *= 0.1
        else:
            left, sizes, right = np.linalg.svd(values.reshape(shape[0], -1), full_matrices=False)
            sizes *= 0.8 ** np.arange(len(sizes))
            values = ((left * sizes) @ right).reshape(shape)
            values *= np.sqrt(2 / np.prod(shape[1:])) / values.std()
        stored = numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(stored)
    onnx.checker.check_model(model, full_check=True)
    return model


def residual(batch: str | int = "batch") -> onnx.ModelProto:
    return network(RESIDUAL_TEXT.format(batch=batch), RESIDUAL)


def pictures(count: int = 48, seed: int = 1) -> Array:
    """Smooth random images: neighbours agree, as in real ones."""
    noise = np.random.default_rng(seed).normal(size=(count, 3, 8, 8))
    smooth = sum(np.roll(noise, (y, x), axis=(2, 3)) for y in (0, 1, 2) for x in (0, 1, 2))
    return (np.asarray(smooth) / 3).astype(np.float32)


def answer(path: Path, feeds: Mapping[str, NDArray[Any]]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def cost(path: Path, feeds: Mapping[str, NDArray[Any]]) -> ModelCost:
    return count_cost(onnx.load(path), feeds, label=str(path))


def convert(
    folder: Path,
    model: onnx.ModelProto,
    images: Array | None = None,
    budget: Budget | None = None,
    *,
    out: str = "small.onnx",
    solver: SolverSettings = QUICK,
) -> Conversion:
    """Write `model` and `images` to `folder` and convert."""
    source, data = folder / "model.onnx", folder / "images.npy"
    onnx.save(model, source)
    np.save(data, pictures() if images is None else images)
    return converter.convert(
        source,
        data,
        folder / out,
        budget or Budget(macs=2),
        calibration=SMALL,
        solver=solver,
        target=Target(ONE_THREAD),
        timing=False,
    )


def relative_error(folder: Path, feeds: Mapping[str, NDArray[Any]]) -> float:
    """Squared error of the first output over its variance."""
    wanted = answer(folder / "model.onnx", feeds)[0]
    found = answer(folder / "small.onnx", feeds)[0]
    assert found.shape == wanted.shape
    return float(((found - wanted) ** 2).mean() / wanted.var())


@pytest.mark.parametrize(
    ("budget", "solver"),
    [
        (Budget(macs=2), ADMM),
        (Budget(params=2), QUICK),
        (Budget(macs=1.8, params=2), QUICK),
        (Budget(macs=1.5), SolverSettings(name="svd")),
    ],
    ids=["macs, admm", "params", "both", "svd"],
)
def test_the_budget_is_met(tmp_path: Path, budget: Budget, solver: SolverSettings) -> None:
    done = convert(tmp_path, residual(), budget=budget, solver=solver)
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    feeds = {"image": pictures(5, seed=9)}
    before, after = cost(done.source, feeds), cost(done.out, feeds)
    assert (done.macs_before, done.macs_after) == (before.macs, after.macs)
    assert (done.params_before, done.params_after) == (before.params, after.params)
    for unit in ("macs", "params"):
        wanted = getattr(budget, unit)
        if wanted is not None:
            assert getattr(before, unit) / getattr(after, unit) >= wanted * (1 - 1e-5)
    assert relative_error(tmp_path, feeds) < 0.2  # 0.01 to 0.05, and more for svd


@pytest.mark.parametrize(("macs", "warned"), [(1.5, False), (6, True)])
def test_it_says_how_far_the_answers_are_off(tmp_path: Path, macs: float, warned: bool) -> None:
    done = convert(tmp_path, residual(), budget=Budget(macs=macs))
    feeds = {"image": pictures()[7::8]}  # what the fits kept back
    wanted, found = (answer(path, feeds)[0] for path in (done.source, done.out))
    error = np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()
    assert done.answers is not None
    assert done.answers.error == pytest.approx(error, rel=1e-3)
    assert done.answers.agreement == (found.argmax(1) == wanted.argmax(1)).mean()
    assert done.answers.images == 6
    assert any("the squared error of the answers is" in note for note in done.notes) == warned
    assert (error > 0.1) == warned


def test_where_answers_cannot_be_compared_the_conversion_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("a node failed on this input")

    monkeypatch.setattr("converter.pipeline.compare_answers", refuse)
    done = convert(tmp_path, residual())
    assert done.answers is None
    assert done.notes[-1] == (
        "how far the answers are off is not known: a node failed on this input"
    )
    assert relative_error(tmp_path, {"image": pictures(5, seed=9)}) < 0.2


def test_the_costs_of_layers_add_up(tmp_path: Path) -> None:
    done = convert(tmp_path, residual(), solver=ADMM)
    assert [each.name for each in done.layers] == ["conv1", "conv2", "conv3", "classifier"]
    for state in ("before", "after"):
        assert sum(getattr(each, f"macs_{state}") for each in done.layers) == getattr(
            done, f"macs_{state}"
        )
        assert sum(getattr(each, f"params_{state}") for each in done.layers) == getattr(
            done, f"params_{state}"
        )


def test_the_baselines_differ_and_the_data_help(tmp_path: Path) -> None:
    feeds = {"image": pictures(64, seed=9)}
    errors = {}
    for name in ("svd", "data-svd"):
        done = convert(tmp_path, residual(), solver=SolverSettings(name=name))
        errors[name] = relative_error(tmp_path, feeds)
        converted = [each for each in done.layers if each.reason is None]
        assert converted
        for each in converted:
            assert (each.scheme, each.support, each.status) == ("channel", 0, "closed form")
            assert each.trace == ()
    assert errors["data-svd"] < errors["svd"]


def test_interface_names_and_metadata_are_kept(tmp_path: Path) -> None:
    model = residual()
    model.producer_name, model.producer_version = "someone", "7"
    model.model_version, model.domain, model.doc_string = 3, "org.example", "for the tests"
    model.metadata_props.add(key="classes", value="ten of them")
    model.graph.doc_string = "a residual network"
    done = convert(tmp_path, model)
    small = onnx.load(tmp_path / "small.onnx")
    assert small.graph.input == model.graph.input
    assert small.graph.output == model.graph.output
    assert small.opset_import == model.opset_import
    added = {each.key: each.value for each in small.metadata_props}
    assert added.pop("classes") == "ten of them"
    assert set(added) == {"twofold.version", "twofold.source_sha256", "twofold.plan"}
    assert added["twofold.source_sha256"] == file_digest(tmp_path / "model.onnx")
    plan = json.loads(added["twofold.plan"])
    assert {name: each["scheme"] for name, each in plan.items()} == {
        each.name: each.scheme for each in done.layers if each.scheme != "kept"
    }
    for field in ("producer_name", "producer_version", "model_version", "domain", "doc_string"):
        assert getattr(small, field) == getattr(model, field)
    assert small.graph.name == "residual"
    assert small.graph.doc_string == model.graph.doc_string
    written = {name for node in small.graph.node for name in node.output}
    for name in ("c1", "r1", "c2", "r2", "r3", "p", "f", "logits"):
        assert name in written  # inner tensors too, but the shortcut's, whose sums are reordered
    names = [node.name for node in small.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("solver", [ADMM, QUICK], ids=["admm", "data-svd"])
def test_two_runs_write_the_same_bytes(tmp_path: Path, solver: SolverSettings) -> None:
    first = convert(tmp_path, residual(), out="first.onnx", solver=solver)
    second = convert(tmp_path, residual(), out="second.onnx", solver=solver)
    assert first.out.read_bytes() == second.out.read_bytes()
    assert first.out_digest == second.out_digest


def test_the_input_file_is_not_touched(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(residual(), source)
    before = source.read_bytes()
    source.chmod(0o444)
    stamp = source.stat().st_mtime_ns
    data = tmp_path / "images.npy"
    np.save(data, pictures())
    converter.convert(
        source, data, tmp_path / "small.onnx", Budget(macs=2), solver=QUICK, calibration=SMALL
    )
    assert source.read_bytes() == before
    assert source.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "images.npy",
        "model.onnx",
        "small.onnx",
    ]


def test_the_report_says_it_all(tmp_path: Path) -> None:
    done = convert(tmp_path, residual(), solver=ADMM)
    report = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert report["format"] == "twofold-conversion-2"
    assert report["source"] == str(tmp_path / "model.onnx")
    assert report["out"] == str(tmp_path / "small.onnx")
    assert report["source_digest"] == file_digest(done.source)
    assert report["out_digest"] == file_digest(done.out)
    assert report["macs_reduction"] == done.macs_before / done.macs_after >= 2 * (1 - 1e-5)
    assert report["settings"]["budget"] == {
        "macs": 2,
        "params": None,
        "speedup": None,
        "latency_ms": None,
    }
    assert report["settings"]["solver"]["name"] == "admm"
    assert report["settings"]["calibration"]["patches"] == 512
    assert report["calibration"]["images"] == 48
    assert report["calibration"]["memory_mib"] == SMALL.memory_mib
    assert 0 < report["calibration"]["peak_bytes"] <= SMALL.memory_mib << 20
    assert len(report["calibration"]["digest"]) == 64
    assert set(report["calibration"]["patches"]) == {each["name"] for each in report["layers"]}
    assert report["machine"]
    gains = [point["macs_reduction"] for point in report["front"]]
    assert gains == sorted(gains)
    assert len(gains) > 3
    assert report["planned"]["macs_reduction"] == pytest.approx(report["macs_reduction"])
    assert "kept" in render_page(report)
    assert report["peak_memory_mib"] > 0
    assert report["notes"] == []
    assert [each["name"] for each in report["stages"]] == [
        "read",
        "normalise",
        "record the original",
        "measure effects",
        "predict forms",
        "choose",
        "fit layers",
        "predict the front",
        "finish",
        "compare answers",
    ]
    assert all(each["seconds"] >= 0 for each in report["stages"])
    assert report["passes"]
    converted = [each for each in report["layers"] if each["reason"] is None]
    assert converted
    for each in converted:
        scheme = each["scheme"].removeprefix("sparse + ").removesuffix(" ×2")
        assert scheme in ("channel", "spatial", "depthwise", "tucker", "sparse")
        assert len(each["ranks"]) == {"sparse": 0, "tucker": 2, "depthwise": 2}.get(scheme, 1)
        assert (each["support"] > 0) == ("sparse" in each["scheme"])
        assert each["macs_after"] < each["macs_before"]
        assert 0 <= each["error"] < 1
        assert 0 <= each["effect"] < 1
        assert each["status"] in ("converged", "iteration limit", "stalled", "closed form")
        assert each["iterations"] == len(each["trace"])
        for line in each["trace"][:1]:
            assert {"primal", "dual", "objective", "rho", "rank", "support", "seconds"} < set(line)
    for each in report["layers"]:
        if each["reason"] is not None:
            assert each["scheme"] == "kept"
            assert each["error"] is None
            assert each["macs_after"] == each["macs_before"]
            assert each["params_after"] == each["params_before"]


class Reader(CalibrationDataReader):
    """Batches of five, once; the last one is smaller."""

    def __init__(self, images: Array) -> None:
        self._rest = images

    def get_next(self) -> dict[str, Array] | None:
        given, self._rest = self._rest[:5], self._rest[5:]
        return {"image": given} if len(given) else None


def test_a_calibration_data_reader_gives_what_a_file_gives(tmp_path: Path) -> None:
    plain = convert(tmp_path, residual())
    done = converter.convert(
        plain.source,
        Reader(pictures()),
        tmp_path / "read.onnx",
        Budget(macs=2),
        calibration=SMALL,
        solver=QUICK,
        target=Target(ONE_THREAD),
        timing=False,
    )
    assert done.calibration["images"] == 48
    assert "Reader" in done.calibration["data"]
    assert done.out.read_bytes() == plain.out.read_bytes()


def test_a_grouped_conv_is_left_alone_and_the_report_says_why(tmp_path: Path) -> None:
    model = network(
        """
        grouped (float[batch, 3, 8, 8] image) => (float[batch, 10] logits)
        {
            [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
            r1 = Relu(c1)
            [grouped] c2 = Conv<pads = [1, 1, 1, 1], group = 4>(r1, w2, b2)
            r2 = Relu(c2)
            [depthwise] c3 = Conv<pads = [1, 1, 1, 1], group = 16>(r2, w3)
            [conv4] c4 = Conv(c3, w4)
            r4 = Relu(c4)
            p = GlobalAveragePool(r4)
            f = Flatten(p)
            [classifier] logits = Gemm<transB = 1>(f, w5, b5)
        }
        """,
        {
            "w1": (16, 3, 3, 3), "b1": (16,),
            "w2": (16, 4, 3, 3), "b2": (16,),
            "w3": (16, 1, 3, 3),
            "w4": (16, 16, 3, 3),
            "w5": (10, 16), "b5": (10,),
        },
    )  # fmt: skip
    done = convert(tmp_path, model, budget=Budget(macs=1.3))
    assert done.macs_reduction >= 1.3 * (1 - 1e-5)
    layers = {each.name: each for each in done.layers}
    assert list(layers) == ["conv1", "grouped", "depthwise", "conv4", "classifier"]
    assert "4 groups" in str(layers["grouped"].reason)
    assert "depthwise" in str(layers["depthwise"].reason)
    before = {each.name: each for each in cost(done.source, {"image": pictures(1)}).layers}
    small = onnx.load(done.out)
    nodes = {node.name: node for node in small.graph.node}
    weights = {each.name: each for each in small.graph.initializer}
    kept = {each.name: each for each in model.graph.initializer}
    for name, weight in (("grouped", "w2"), ("depthwise", "w3")):
        assert layers[name].scheme == "kept"
        assert layers[name].macs_after == layers[name].macs_before == before[name].macs
        assert layers[name].params_after == before[name].params
        assert nodes[name].input[1] == weight
        np.testing.assert_array_equal(
            numpy_helper.to_array(weights[weight]), numpy_helper.to_array(kept[weight])
        )


@pytest.mark.parametrize("count", [48, 46], ids=["whole batches", "a rest"])
def test_a_model_of_a_fixed_batch(tmp_path: Path, count: int) -> None:
    done = convert(tmp_path, residual(batch=4), pictures(count))
    assert done.macs_reduction >= 2 * (1 - 1e-5)
    assert done.calibration["images"] == count
    assert done.macs_before == cost(done.source, {"image": pictures(4)}).macs
    assert onnx.load(done.out).graph.input == onnx.load(done.source).graph.input
    assert relative_error(tmp_path, {"image": pictures(4, seed=9)}) < 0.5


def test_two_inputs_from_an_npz_file(tmp_path: Path) -> None:
    model = network(
        """
        two (float[batch, 3, 8, 8] image, float[batch, 4] extra) => (float[batch, 10] logits)
        {
            [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
            r1 = Relu(c1)
            [conv2] c2 = Conv(r1, w2, b2)
            r2 = Relu(c2)
            p = GlobalAveragePool(r2)
            f = Flatten(p)
            both = Concat<axis = 1>(f, extra)
            [classifier] logits = Gemm<transB = 1>(both, w3, b3)
        }
        """,
        {
            "w1": (12, 3, 3, 3), "b1": (12,),
            "w2": (16, 12, 3, 3), "b2": (16,),
            "w3": (10, 20), "b3": (10,),
        },
    )  # fmt: skip
    source, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(model, source)
    extra = np.random.default_rng(5).normal(size=(48, 4)).astype(np.float32)
    np.savez(data, image=pictures(), extra=extra)
    done = converter.convert(
        source,
        data,
        tmp_path / "small.onnx",
        Budget(macs=2),
        calibration=SMALL,
        solver=QUICK,
        timing=False,
    )
    assert done.macs_reduction >= 2 * (1 - 1e-5)
    feeds = {"image": pictures(16, seed=9), "extra": extra[:16]}
    assert relative_error(tmp_path, feeds) < 0.5
    without = {**feeds, "extra": np.zeros_like(extra[:16])}
    assert not np.allclose(answer(done.out, feeds)[0], answer(done.out, without)[0])


def test_an_operator_without_gradient_costs_a_note_and_no_more(tmp_path: Path) -> None:
    text = RESIDUAL_TEXT.format(batch="batch").replace("r1 = Relu(c1)", "r1 = Softsign(c1)")
    done = convert(tmp_path, network(text, RESIDUAL), solver=ADMM)
    (note,) = done.notes
    assert "every layer counts alike" in note
    assert "Softsign" in note
    assert done.macs_reduction >= 2 * (1 - 1e-5)
    assert relative_error(tmp_path, {"image": pictures(16, seed=9)}) < 0.5
    assert done.to_dict()["notes"] == (note,)


def test_parameters_count_what_is_added_too(tmp_path: Path) -> None:
    """Layers without a bias get one; the budget holds nevertheless."""
    text = RESIDUAL_TEXT.format(batch="batch")
    for k in (1, 2, 3, 4):
        text = text.replace(f"w{k}, b{k})", f"w{k})")
    shapes = {name: shape for name, shape in RESIDUAL.items() if name.startswith("w")}
    done = convert(tmp_path, network(text, shapes), budget=Budget(params=3.5))
    assert done.params_reduction >= 3.5 * (1 - 1e-5)


def test_planted_structure_is_found(tmp_path: Path) -> None:
    """Weights of rank 1 with two strong channels: the sparse part takes these, and wins by far."""
    model = residual()
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name in ("w2", "w3"):
            shape = tuple(tensor.dims)
            low = np.outer(rng.normal(size=shape[0]), rng.normal(size=np.prod(shape[1:])))
            weight = 0.025 * low.reshape(shape)
            weight[:, [2, 7]] += 0.25 * rng.normal(size=(shape[0], 2, 3, 3))
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), tensor.name))
    feeds = {"image": pictures(64, seed=9)}
    convert(tmp_path, model, solver=QUICK)
    low_rank_alone = relative_error(tmp_path, feeds)
    done = convert(tmp_path, model, solver=ADMM)
    assert all(each.support >= 2 for each in done.layers[1:3])
    assert relative_error(tmp_path, feeds) < low_rank_alone / 5
    nodes = [node.op_type for node in onnx.load(done.out).graph.node]
    assert nodes.count("Gather") == 2


def test_nothing_is_written_where_the_budget_is_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(converter.ConfigError, match="out of reach"):
        convert(tmp_path, residual(), budget=Budget(macs=1000))
    assert not (tmp_path / "small.onnx").exists()


def test_a_trained_resnet_keeps_its_answers(tmp_path: Path, shared: Path) -> None:
    source = shared / "models" / "resnet20_cifar10.onnx"
    preprocessing = converter.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    done = converter.convert(
        source,
        shared / "data" / "cifar10" / "calib",
        tmp_path / "small.onnx",
        Budget(macs=1.5),
        preprocessing=preprocessing,
        calibration=CalibrationSettings(images=200, patches=2048),
        solver=QUICK,
        timing=False,
    )
    assert done.macs_reduction >= 1.5 * (1 - 1e-5)
    assert done.calibration["images"] == 200
    inputs = model_inputs(onnx.load(source), label=str(source))
    val = shared / "data" / "cifar10" / "val"
    data = open_calibration_set(val, inputs, preprocessing, images=200)
    (batch,) = data.batches(200)
    wanted, found = answer(source, batch.feeds)[0], answer(done.out, batch.feeds)[0]
    agreement = float((wanted.argmax(1) == found.argmax(1)).mean())
    assert agreement >= 0.85  # 0.93 as measured
