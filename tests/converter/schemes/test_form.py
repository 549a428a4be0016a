"""Forms and geometries as plain data."""

from __future__ import annotations

import pickle

from converter.schemes.form import KEEP, Form, Geometry


def test_a_form_reads_as_people_say_it() -> None:
    assert str(KEEP) == "keep"
    assert str(Form("spatial", (24,))) == "spatial r 24"
    assert str(Form("tucker", (16, 32), 8)) == "sparse + tucker r 16×32 s 8"
    assert str(Form("sparse", (), 8)) == "sparse s 8"
    assert Form("channel", (4,), 2).family == "sparse + channel"


def test_equal_forms_are_one_key_and_forms_have_an_order() -> None:
    assert {Form("channel", (4,)): 1}[Form("channel", (4,), 0)] == 1
    assert sorted([Form("channel", (16,)), Form("channel", (4,), 2), Form("channel", (4,))]) == [
        Form("channel", (4,)),
        Form("channel", (4,), 2),
        Form("channel", (16,)),
    ]


def test_a_geometry_counts_taps_columns_and_positions() -> None:
    conv = Geometry("Conv", 8, 5, (3, 2), (9, 8), (4, 7), bias=True)
    assert (conv.taps, conv.columns, conv.positions) == (6, 30, 28)
    gemm = Geometry("Gemm", 8, 5, (), (), (), bias=False)
    assert (gemm.taps, gemm.columns, gemm.positions) == (1, 5, 1)
    assert pickle.loads(pickle.dumps(conv)) == conv  # noqa: S301  # its own bytes


def test_what_is_folded_into_the_batch_has_more_positions_and_no_more_weights() -> None:
    conv = Geometry("Conv", 8, 5, (3, 2), (9, 8), (4, 7), bias=True, fold=3)
    assert (conv.taps, conv.columns) == (6, 30)
    assert (conv.positions, conv.in_positions) == (84, 216)
