"""Half precision: two bytes a weight, the same interface, near answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from converter.config import Runtime
from converter.errors import ModelError
from converter.quantization import half as module
from converter.quantization.half import in_float16
from converter.runtime import open_session, run

Network = Callable[..., onnx.ModelProto]


def test_fp16_has_weights_of_two_bytes_and_the_same_inputs_and_outputs(
    network: Network, images: NDArray[np.float32]
) -> None:
    model = network()
    before = model.SerializeToString()
    half = in_float16(model, Path("model.onnx"))
    assert model.SerializeToString() == before
    onnx.checker.check_model(half, full_check=True)
    assert {each.data_type for each in half.graph.initializer} == {TensorProto.FLOAT16}
    assert list(half.graph.input) == list(model.graph.input)
    assert [each.name for each in half.graph.output] == ["scores"]
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    found, wanted = (
        run(open_session(each, Runtime(threads=1)), None, {"image": images})[0]
        for each in (half, model)
    )
    # 11 significant bits, in sums of up to 108 products that partly cancel
    np.testing.assert_allclose(found, wanted, atol=0.01 * float(np.abs(wanted).max()))


def test_weights_that_are_inputs_too_are_halved(network: Network) -> None:
    model = network()
    weights = {each.name: each for each in model.graph.initializer}
    for name, each in weights.items():
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, list(each.dims))
        )
    half = in_float16(model, Path("model.onnx"))
    assert [each.name for each in half.graph.input] == ["image"]
    assert {each.data_type for each in half.graph.initializer} == {TensorProto.FLOAT16}


def test_what_the_library_cannot_do_is_one_sentence(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("a name\nis twice there")

    monkeypatch.setattr(module, "convert_float_to_float16", fails)
    with pytest.raises(
        ModelError, match=r"cannot put m\.onnx into float16: a name is twice there; "
    ):
        in_float16(network(), Path("m.onnx"))
