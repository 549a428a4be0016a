"""The comparison of fits: equal weights, true errors, and sections that keep each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from converter.errors import ConfigError
from converter.schemes import SCHEMES, Effort, Form, Geometry, cost_of
from converter.solver.problem import Problem
from passes.activation import Activation
from tools.objectives import TITLE, Table, _dense, _form, _with_section, main

TEXT = """<ir_version: 8, opset_import: ["": 17]>
two (float[batch, 8, 6, 6] x) => (float[batch, 12, 6, 6] y) {
    [first] a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    [relu] r = Relu(a)
    [second] b = Conv(r, w2)
    [last] y = Relu(b)
}"""


def geometry(outputs: int = 64, channels: int = 32) -> Geometry:
    return Geometry("Conv", outputs, channels, (3, 3), (4, 4), (4, 4), bias=True)


@pytest.mark.parametrize("share", [1 / 2, 1 / 4])
@pytest.mark.parametrize(
    ("scheme", "support"),
    [
        ("channel", 0),
        ("tucker", 0),
        ("spatial", 0),
        ("depthwise", 1),
        ("depthwise", 2),
        ("spatial", 4),
    ],
)
def test_forms_have_nearly_the_weights_that_they_may(
    scheme: str, support: int, share: float
) -> None:
    shape = geometry()
    form = _form(shape, scheme, support, share)
    assert form is not None
    assert (form.scheme, form.support) == (scheme, 0 if scheme == "depthwise" else support)
    weights = cost_of(shape, form)[1] - shape.outputs
    whole = shape.outputs * shape.columns
    # one rank more would be too much
    assert 0.9 * share * whole < weights <= share * whole


def test_there_is_no_form_of_less_than_one_rank() -> None:
    small = geometry(4, 2)
    assert _form(small, "spatial", 2, 1 / 2) is None
    assert _form(small, "tucker", 0, 1 / 16) is None


@pytest.mark.parametrize(
    "form",
    [
        Form("channel", (3,)),
        Form("spatial", (3,), 1),
        Form("tucker", (2, 3), 2),
        Form("depthwise", (2, 4)),
    ],
    ids=str,
)
def test_the_dense_weight_answers_as_the_fit_said(form: Form) -> None:
    shape = Geometry("Conv", 6, 4, (3, 2), (4, 4), (4, 4), bias=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator)
    patches = torch.randn(400, 24, generator=generator)
    unseen = torch.arange(400) % 4 == 3
    problem = Problem(
        weight=weight,
        bias=torch.zeros(6),
        channels=4,
        features=patches,
        basis=None,
        eligible=torch.arange(4),
        target=patches @ weight.T,
        offset=None,
        unseen=unseen,
        activation=Activation("relu"),
    )
    solution = SCHEMES[form.scheme].fit(problem, shape, form, Effort(trade=False))
    found = (patches @ _dense(shape, form, solution).T + solution.bias).relu()
    wanted = problem.target.relu()
    missed = float((found - wanted)[unseen].square().sum(1).mean())
    seen = wanted[~unseen]
    spread = float((seen - seen.mean(0)).square().sum(1).mean())
    assert missed / spread == pytest.approx(solution.unseen, rel=1e-3)


def test_a_section_replaces_its_own_and_keeps_the_others() -> None:
    page = _with_section("", "a", "one\n\n| t |")
    assert page == f"{TITLE}\n\n## a\n\none\n\n| t |\n"
    both = _with_section(page, "b", "two")
    assert both == f"{page}\n## b\n\ntwo\n"
    assert _with_section(both, "a", "new") == f"{TITLE}\n\n## a\n\nnew\n\n## b\n\ntwo\n"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A model of two layers, and images for it."""
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (12, 8, 3, 3)), ("w2", (12, 12, 1, 1))):
        array = rng.normal(size=shape).astype(np.float32) / 4
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "two.onnx")
    np.save(tmp_path / "images.npy", rng.normal(size=(40, 8, 6, 6)).astype(np.float32))
    return tmp_path / "two.onnx", tmp_path / "images.npy"


def test_both_tables_stand_on_one_page(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = small
    page = tmp_path / "page.md"
    for table in Table:
        main(model, images, table, layer=["first"], images=40, patches=512, out=page)
    text = page.read_text(encoding="utf-8")
    assert text.count("\n## ") == 2
    assert "## ADMM against data-metric SVD: two" in text
    beside = text.split("## S beside spatial: two")[1]
    rows = [line for line in beside.splitlines() if line.startswith("| first | 12×8×3×3 ")]
    assert [row.split(" | ")[2] for row in rows] == ["0.5", "0.25"]
    for row in rows:
        errors = [float(cell.split()[0]) for cell in row.strip("| ").split(" | ")[3:]]
        assert len(errors) == 7
        assert all(0 < error < 1 for error in errors)


def test_an_unknown_layer_is_refused(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = small
    with pytest.raises(ConfigError, match=r"two\.onnx has no layer third"):
        main(model, images, layer=["third"], out=tmp_path / "page.md")
