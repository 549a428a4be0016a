"""The comparison with peers, on a tiny network and tiny images that are made here."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import converter
from converter.planner.cost import count_cost
from tools import peers
from tools.peers import METHODS, Case, Row, main, page
from tools.reference import TARGETS

BUDGET = 4.0  # of VGG-16, whose place the tiny network takes


def run(tiny: Path, folder: Path, *methods: str, **options: Any) -> dict[str, Row]:
    """Run the tool and give its rows by method."""
    main(
        shared=tiny,
        work=folder / "work",
        out=folder / "peers.md",
        only=None,
        method=list(methods),
        images=options.get("images"),
        seconds=0.02,
        fresh=False,
    )
    stored = json.loads((folder / "work" / "rows.json").read_text())
    return {row["method"]: Row(**row) for row in stored.values()}


def made(folder: Path, method: str) -> onnx.ModelProto:
    return onnx.load(folder / "work" / f"vgg16_cifar10-{method}-macs4.onnx")


def nodes(model: onnx.ModelProto) -> set[str]:
    return {node.name for node in model.graph.node}


def test_both_plain_svds_meet_the_budget_with_even_shares(tiny: Path, tmp_path: Path) -> None:
    rows = run(tiny, tmp_path, "svd", "spatial-svd")
    assert list(rows) == ["svd", "spatial-svd"]
    original = count_cost(onnx.load(tiny / "models" / "vgg16_cifar10.onnx"))
    whole = {layer.name: layer.macs or 0 for layer in original.layers}
    for method, row in rows.items():
        # one rank of these layers is up to a tenth of the budget, and there is no half rank
        assert BUDGET <= row.macs < 1.2 * BUDGET
        assert row.images == 12
        model = made(tmp_path, method)
        assert {"conv1", "classifier"} <= nodes(model)
        assert not {"conv2", "conv3"} & nodes(model)
        share = float(row.setting.split()[0]) / 100
        cost = {layer.name: layer.macs or 0 for layer in count_cost(model).layers}
        for name in ("conv2", "conv3"):
            parts = [macs for part, macs in cost.items() if part.startswith(f"{name}/")]
            assert len(parts) == 2
            first = next(node for node in model.graph.node if node.name.startswith(f"{name}/"))
            rank = len(_weight(model, first))
            spent = sum(parts) / whole[name]
            # the largest rank within the share, which is printed to a tenth of a percent
            assert spent <= share + 1e-3
            assert share <= spent * (rank + 1) / rank + 1e-3


def _weight(model: onnx.ModelProto, node: onnx.NodeProto) -> NDArray[Any]:
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    return numpy_helper.to_array(stored)


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (5, 4, 1, 1), (7, 4)])
def test_a_pair_of_full_rank_is_the_weight(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for factorise in (peers._channel_pair, peers._spatial_pair):
        pair = factorise(weight)
        cut = pair.cut(pair.rank, None)
        first, second = (factor.weight for factor in cut.factors)
        # a chain of kernels is their product over the rank, each axis in one of the two
        product = np.einsum("rc...,nr...->nc...", first, second)
        np.testing.assert_allclose(product, weight, atol=1e-5)  # float32 round-off of one SVD


def test_a_pair_that_is_cut_keeps_the_largest_singular_values() -> None:
    weight = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    values = np.linalg.svd(weight, compute_uv=False)
    cut = peers._channel_pair(weight).cut(2, None)
    first, second = (factor.weight for factor in cut.factors)
    # Eckart and Young: what is left is the tail
    left = np.linalg.norm(weight - second @ first)
    assert left == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)


def test_int8_keeps_the_macs_and_stacks_on_what_twofold_converts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by the clock, so small a network is best left alone
    monkeypatch.setattr(converter, "convert", partial(converter.convert, timing=False))
    rows = run(tiny, tmp_path, "twofold", "int8", "stacked")
    assert rows["twofold"].setting.endswith("of 4 layers replaced")
    assert rows["int8"].macs == 1.0
    assert rows["stacked"].macs >= BUDGET
    assert " layers in float" in rows["stacked"].setting
    for method in ("int8", "stacked"):
        assert "QuantizeLinear" in {node.op_type for node in made(tmp_path, method).graph.node}


@pytest.mark.parametrize("method", ["pruning", "wanda"])
def test_onnxsim_comes_near_the_budget(tiny: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("onnxsim", reason="the extra `peers` is not installed")
    row = run(tiny, tmp_path, method)[method]
    assert row.macs == pytest.approx(BUDGET, rel=0.1)  # channels are whole
    assert 0 < float(row.setting.removeprefix("sparsity ")) < 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing be made or timed; the methods that would have been, in order."""
    calls: list[str] = []

    def measure(case: Case, name: str, images: int | None, seconds: float) -> Row:
        assert seconds > 0
        calls.append(name)
        case.made_by(name).touch()
        return replace(row(case.name, name), images=images or 12)

    monkeypatch.setattr(peers, "_measure", measure)
    return calls


def test_a_run_that_goes_on_measures_nothing_twice(
    tiny: Path, tmp_path: Path, measured: list[str]
) -> None:
    run(tiny, tmp_path, "svd")
    run(tiny, tmp_path, "svd", "spatial-svd")
    assert measured == ["svd", "spatial-svd"]
    (tmp_path / "work" / "vgg16_cifar10-svd-macs4.onnx").unlink()
    run(tiny, tmp_path, "svd", "spatial-svd")
    assert measured == ["svd", "spatial-svd", "svd"]


def test_a_quick_look_does_not_mix_with_the_rows_of_all_images(
    tiny: Path, tmp_path: Path, measured: list[str]
) -> None:
    run(tiny, tmp_path, "svd")
    run(tiny, tmp_path, "spatial-svd", images=6)
    assert [line.split(" | ")[1::3] for line in _body((tmp_path / "peers.md").read_text())] == [
        ["plain spatial SVD", "6", "-0.50 ± 0.25", "40"]
    ]
    run(tiny, tmp_path, "svd")
    assert [line.split(" | ")[1] for line in _body((tmp_path / "peers.md").read_text())] == [
        "plain SVD"
    ]
    assert measured == ["svd", "spatial-svd"]


def test_unknown_methods_and_missing_packages_are_said_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no method magic; choose of twofold, svd"):
        run(tiny, tmp_path, "svd", "magic")
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"the method wanda needs onnxsim: pip install .*peers"):
        run(tiny, tmp_path, "svd", "wanda")
    assert not (tmp_path / "work").exists()


def row(model: str, method: str) -> Row:
    return Row(
        model=model,
        method=method,
        budget=2.0,
        setting="sparsity 0.3",
        macs=2.01,
        file=1.9,
        images=5000,
        before=88.0,
        after=87.5,
        error=0.25,
        batch_1=(1.5, 1.4, 1.6),
        batch_32=(1.9, 1.8, 2.0),
        seconds=40.4,
    )


def _body(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_the_page_has_its_rows_in_order_and_says_where_they_come_from() -> None:
    text = page([row("VGG-16", "int8"), row("VGG-16", "twofold"), row("ResNet-20", "wanda")])
    assert [line.split(" | ")[:2] for line in _body(text)] == [
        ["| ResNet-20, MACs ÷ 2", "onnxsim `apply_structured_wanda_pruning`"],
        ["| VGG-16, MACs ÷ 2", "Twofold"],
        ["| VGG-16, MACs ÷ 2", "onnxruntime `quantize_static` int8"],
    ]
    assert (
        "| 2.01 | 1.90 | 5,000 | 88.00 % | 87.50 % | -0.50 ± 0.25 | 1.50 (1.40–1.60) | "
        "1.90 (1.80–2.00) | 40 | sparsity 0.3 |"
    ) in text
    assert "python -m tools.peers" in text
    assert "AIMET" in text
    assert "onnxruntime 1." in text


def test_every_reference_model_has_a_budget_and_every_method_a_label() -> None:
    assert {target.name for target in TARGETS} == peers.BUDGETS.keys()
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
