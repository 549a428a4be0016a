"""Sections of the page: each in its place, the others as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.reliability import write_section


def test_a_section_is_put_in_its_place_and_leaves_the_others_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section("Faults", ["none", "at all"], page)
    write_section("Real graphs", ["many"], page)
    text = page.read_text()
    assert text.startswith("# Reliability\n")
    assert text.endswith("## Real graphs\n\nmany\n\n## Faults\n\nnone\nat all\n")
    write_section("Real graphs", ["more", "", "### Cases", "", "some"], page)
    assert page.read_text() == text.replace("many", "more\n\n### Cases\n\nsome")
    write_section("Faults", ["none", "at all"], page)
    assert page.read_text() == text.replace("many", "more\n\n### Cases\n\nsome")


def test_a_section_that_the_page_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no section 'Fault'"):
        write_section("Fault", [], tmp_path / "page.md")
