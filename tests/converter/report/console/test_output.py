"""Names are no commands, and pipes get wide tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from converter.report.console.conversion import print_conversion
from converter.report.console.output import output_console, print_message
from converter.report.words import printable
from tests.converter.report.console.samples import CONVERSION, LAYER, wide


def test_names_are_neither_markup_nor_commands() -> None:
    console, stream = wide()
    print_conversion(
        replace(CONVERSION, layers=(replace(LAYER, name="[red]a\x1b[2J\nb[/]"),)), (), console
    )
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "[red]a�[2J b[/]" in text
    assert printable("a\tb\x07") == "a b�"


def test_message_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_message("error: " + "word " * 100 + "\nend")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("twofold: error: word")


def test_a_pipe_gets_wide_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_console().width > 200
    print_conversion(CONVERSION)
    assert "sparse + channel" in capsys.readouterr().out
