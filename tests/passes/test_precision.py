"""A model is told by its operators and weights."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from passes.precision import precision_of

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[n, 2] x) => (float[n, 2] y)'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<float[2, 2] w = {1, 0, 0, 1}> { y = MatMul (x, w) }", None),
        (
            "<float s = {0.1}, int8[2, 2] w = {1, 0, 0, 1}>"
            "{ f = DequantizeLinear (w, s)  y = MatMul (x, f) }",
            "quantized",
        ),
        (
            "<float s = {0.1}, uint8 z = {0}> { q = QuantizeLinear (x, s, z)"
            "  y = DequantizeLinear (q, s, z) }",
            "quantized",
        ),
        (
            "<float16[2, 2] w = {1, 0, 0, 1}>"
            "{ h = Cast <to = 10> (x)  m = MatMul (h, w)  y = Cast <to = 1> (m) }",
            "float16",
        ),
        # a constant of float16 that no layer reads tells nothing
        (
            "<float16[2] c = {1, 0}, float[2, 2] w = {1, 0, 0, 1}>"
            "{ d = Cast <to = 1> (c)  m = MatMul (x, w)  y = Add (m, d) }",
            None,
        ),
    ],
)
def test_formats(text: str, found: str | None) -> None:
    model = onnx.parser.parse_model(HEAD + text)
    onnx.checker.check_model(model)
    assert precision_of(model) == found
