from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.passes.splitting import (
    WAYS,
    Exact,
    Run,
    assert_same,
    build,
    ops,
    optimised,
    random,
    split,
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opset", [7, 11, 17])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6)])
@pytest.mark.parametrize("scheme", ["channel", "tucker"])
@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0>"])
def test_a_gemm_is_replaced_exactly(
    run: Run,
    exact: Exact,
    way: str,
    scheme: str,
    opset: int,
    bias: tuple[int, ...] | None,
    attributes: str,
) -> None:
    if bias is None and opset < 11:
        opset = 11  # before it a Gemm has its bias
    arrays = {"w": random(6, 5) if "transB" in attributes else random(5, 6)}
    operands = "x, w"
    if bias is not None:
        operands, arrays["b"] = "x, w, b", random(*bias, seed=2)
    ir = 3 if opset == 7 else 8
    model = build(
        f"h = Gemm{attributes}({operands}) y = Relu(h)", arrays, x=(4, 5), opset=opset, ir=ir
    )
    changed, _ = split(model, lambda layer: exact(layer, way, scheme))
    assert_same(run, model, changed)
    factors = 3 if scheme == "tucker" else 2
    assert Counter(ops(changed)) == {
        "Gemm": {"sparse": 1, "low rank": factors}.get(way, 1 + factors),
        "Relu": 1,
        **({"Gather": 1} if way in ("parts", "overlap") else {}),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("x", [(4, 5), (2, 4, 5), (2, 3, 4, 5), (5,)])
@pytest.mark.parametrize("bias", [None, (6,), (1,)])
@pytest.mark.parametrize("scheme", ["channel", "tucker"])
def test_a_matmul_is_replaced_exactly(
    run: Run, exact: Exact, way: str, scheme: str, x: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    arrays = {"w": random(5, 6)}
    body = "h = MatMul(x, w) y = Relu(h)"
    if bias is not None:
        arrays["b"] = random(*bias, seed=2)
        body = "h = MatMul(x, w) k = Add(h, b) y = Relu(k)"
    model = build(body, arrays, x=x, opset=13)
    changed, results = split(model, lambda layer: exact(layer, way, scheme))
    assert len(results) == 1
    assert_same(run, model, changed)
    assert changed.graph.node[-2].output == ["h" if bias is None else "k"]
    assert not {"w", "b"}.intersection(tensor.name for tensor in changed.graph.initializer)


def test_onnxruntime_fuses_relu_into_the_last_gemm(tmp_path: Path, exact: Exact) -> None:
    arrays = {"w": random(6, 5), "b": random(6), "v": random(3, 6)}
    body = "h = Gemm<transB = 1>(x, w, b) i = Relu(h) y = Gemm<transB = 1>(i, v)"
    changed, _ = split(build(body, arrays, x=(4, 5)), lambda layer: exact(layer, "parts"))
    found = Counter(ops(optimised(changed, tmp_path)))
    assert set(found) <= {"Gemm", "FusedGemm", "Gather"}
    assert found["FusedGemm"] == 1
