"""Sessions, their inputs, one run, and what onnxruntime's refusals turn into."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from converter import runtime as runtime_module
from converter.config import Runtime
from converter.errors import CalibrationError, ConfigError, ModelError
from converter.runtime import machine, model_inputs, open_session, run, weight_bytes

ONE = Runtime(threads=1)
MATMUL = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }
"""


def matmul() -> onnx.ModelProto:
    return parse_model(MATMUL)


@pytest.mark.parametrize("form", ["proto", "bytes", "path"])
def test_runs_every_form_of_a_model(tmp_path: Path, form: str) -> None:
    model = matmul()
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    given = {"proto": model, "bytes": model.SerializeToString(), "path": path}[form]
    (y,) = run(open_session(given, ONE), None, {"x": np.ones((4, 3), np.float32)})
    np.testing.assert_array_equal(y, np.tile(np.float32([9, 12]), (4, 1)))


def test_session_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ort.SessionOptions] = []
    genuine = ort.InferenceSession

    def record(model: bytes, options: ort.SessionOptions, providers: list[str]) -> object:
        assert providers == ["CPUExecutionProvider"]
        seen.append(options)
        return genuine(model, options, providers=providers)

    monkeypatch.setattr(runtime_module.ort, "InferenceSession", record)
    open_session(matmul(), Runtime(threads=2))
    open_session(matmul(), Runtime(threads=2), spinning=False, optimise=False)
    deployed, quiet = seen
    assert (deployed.intra_op_num_threads, deployed.inter_op_num_threads) == (2, 1)
    assert deployed.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert deployed.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert quiet.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert quiet.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_weights_beyond_the_limit_go_through_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "IN_MEMORY", 4096)
    weight = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N, 40] x) => (float[N, 50] y) { y = MatMul(x, w) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    before = model.SerializeToString()
    x = np.ones((2, 40), np.float32)
    (y,) = run(open_session(model, ONE), ["y"], {"x": x})
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-5)  # float32 sums of 40 terms
    assert model.SerializeToString() == before


def test_weight_bytes_counts_initializers_and_constants() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y)'
        "<float[3] a = {1, 2, 3}, int64[2] b = {1, 2}>"
        "{ c = Constant<value = float[5] {1, 2, 3, 4, 5}>() y = Relu(x) }"
    )
    assert weight_bytes(model.graph) == 3 * 4 + 2 * 8 + 5 * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float y) { y = Foo(x) }',
            "Foo",
        ),
        (
            '<ir_version: 8, opset_import: ["": 99]> g (float x) => (float y) { y = Relu(x) }',
            "Opset 99",
        ),
        (
            '<ir_version: 99, opset_import: ["": 17]> g (float x) => (float y) { y = Relu(x) }',
            "IR version",
        ),
        (
            '<ir_version: 8, opset_import: ["": 17]> g (float x) => (float y) { y = Relu(q) }',
            "'q'",
        ),
    ],
)
def test_refused_models_name_the_model_and_the_reason(
    text: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        open_session(parse_model(text), ONE, label="net.onnx")
    message = str(caught.value)
    assert message.startswith("net.onnx: ")
    assert said in message
    assert "\n" not in message
    assert "ONNXRuntimeError" not in message
    assert "/onnxruntime" not in message
    assert capfd.readouterr().err == ""


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"^noise\.onnx: "):
        open_session(path, ONE)


def test_cuda_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runtime_module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(ConfigError, match=r"pip install onnxruntime-gpu in its place"):
        open_session(matmul(), Runtime("cuda"))


def test_cuda_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        runtime_module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    monkeypatch.setattr(runtime_module.ort, "InferenceSession", lambda *_, **__: on_cpu)
    with pytest.raises(ConfigError, match="check the CUDA driver"):
        open_session(matmul(), Runtime("cuda"))


@pytest.mark.parametrize("source", ["proto", "session"])
def test_inputs_leave_initializers_out(source: str) -> None:
    model = parse_model(
        '<ir_version: 3, opset_import: ["" : 9]>'
        "g (float[batch, 3, 8] x, float[3] w, int64[2] i) => (float[batch, 3, 8] y, int64[2] j)"
        "{ y = Relu(x) j = Identity(i) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "w"))
    inputs = model_inputs(model if source == "proto" else open_session(model, ONE))
    assert [(each.name, each.shape, each.dtype) for each in inputs] == [
        ("x", ("batch", 3, 8), np.dtype(np.float32)),
        ("i", (2,), np.dtype(np.int64)),
    ]


@pytest.mark.parametrize("written", [None, -1, 0])
def test_a_free_axis_without_a_name_is_none(written: int | None) -> None:
    model = matmul()
    axis = model.graph.input[0].type.tensor_type.shape.dim[0]
    axis.Clear()
    if written is not None:
        axis.dim_value = written
    assert model_inputs(model)[0].shape == (None, 3)
    assert model_inputs(open_session(model, ONE))[0].shape == (None, 3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (helper.make_tensor_value_info("x", TensorProto.STRING, [1]), "no tensor of"),
        (helper.make_tensor_value_info("x", TensorProto.FLOAT, None), "rank"),
        (helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1]), "not a tensor"),
    ],
)
def test_inputs_that_cannot_be_fed(value: onnx.ValueInfoProto, said: str) -> None:
    model = helper.make_model(helper.make_graph([], "g", [value], []))
    with pytest.raises(ModelError, match=said):
        model_inputs(model, label="net.onnx")


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"x": np.ones((2, 4), np.float32)},
        {"x": np.ones((2, 3), np.float64)},
        {"x": np.ones(3, np.float32)},
        {"x": np.ones((2, 3), np.float32), "z": np.ones(1, np.float32)},
    ],
    ids=["missing", "size", "type", "rank", "unknown"],
)
def test_feeds_that_do_not_fit(feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(CalibrationError, match=r"^net\.onnx does not take this input: [^\n]+$"):
        run(open_session(matmul(), ONE), None, feeds, label="net.onnx")


def test_a_node_that_fails_is_the_model(capfd: pytest.CaptureFixture[str]) -> None:
    model = parse_model(MATMUL.replace("float[N, 3]", "float[N, M]"))
    with pytest.raises(ModelError, match=r"^net\.onnx: a node failed"):
        run(open_session(model, ONE), None, {"x": np.ones((2, 5), np.float32)}, label="net.onnx")
    assert capfd.readouterr().err == ""


def test_an_output_that_is_no_array() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }"
    )
    with pytest.raises(ModelError, match="an output is a list"):
        run(open_session(model, ONE), None, {"x": np.ones(2, np.float32)})


def test_machine_is_ready_for_json() -> None:
    facts = json.loads(json.dumps(machine()))
    assert facts["versions"]["onnxruntime"] == ort.__version__
    assert facts["cores"] >= facts["usable_cores"] >= 1
    assert facts["processor"]
    assert all(isinstance(each, str) for each in facts["instructions"])


def test_machines_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "cpuinfo"
    monkeypatch.setattr("converter.runtime.Path", lambda _: table)
    seen = []
    for flags in ("fpu sse4_2 fma avx2", "fpu avx2 avx512f avx512_vnni"):
        table.write_text(
            f"processor : 0\nmodel name : Some CPU\nflags : {flags}\n\nprocessor : 1\n"
        )
        seen.append((machine()["processor"], machine()["instructions"]))
    assert seen == [
        ("Some CPU", ["avx2", "fma"]),
        ("Some CPU", ["avx2", "avx512_vnni", "avx512f"]),
    ]
