"""The page in a browser: nothing is reported, nothing overflows, and keys and eyes find their way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from converter.report.page import render_page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 740}
LEAST_SCREENSHOT = 20_000
"""Bytes of a PNG; an empty page has fewer."""

Page = Any
Show = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for found in map(shutil.which, names) if found), None)
    if program is None:
        pytest.skip("no Chromium is on the path; on Debian: apt-get install chromium")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root without
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*root, *ARGUMENTS])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path, judged: Callable[..., dict[str, Any]]) -> Iterator[Show]:
    """Open reports as a page; in the end, fail for all that the browser had to report of it."""
    said: list[str] = []
    contexts = []

    def open_page(
        *reports: Any, viewport: dict[str, int] = WIDE, colours: str = "light", **options: Any
    ) -> Page:
        path = tmp_path / "report.html"
        verdict = judged(*reports[1:])
        path.write_text(render_page(reports[0], validation=verdict), "utf-8")
        context = browser.new_context(viewport=viewport, color_scheme=colours, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda sent: said.append(sent.url) if _leaves(sent.url, path) else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def _leaves(url: str, path: Path) -> bool:
    return url != path.as_uri() and not url.startswith("data:")


def all_open(page: Page) -> Page:
    """Unfold what is folded."""
    for each in page.query_selector_all("details"):
        each.evaluate("details => { details.open = true }")
    page.click("#open")
    return page


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing(
    show: Show, quantized: Any, validation: Any, viewport: dict[str, int], colours: str
) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core is not installed")
    page = all_open(show(quantized, validation, viewport=viewport, colours=colours))
    found = axe.Axe().run(page)
    problems = [
        (each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]
    ]
    assert problems == []


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_overflows(
    show: Show,
    quantized: Any,
    validation: Any,
    viewport: dict[str, int],
    colours: str,
    tmp_path: Path,
) -> None:
    page = all_open(show(quantized, validation, viewport=viewport, colours=colours))
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == viewport["width"]
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > LEAST_SCREENSHOT
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert light == (colours == "light")


def test_the_theme_is_toggled_by_a_key(show: Show, run: Any) -> None:
    page = show(run, colours="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate(shade) == "rgb(253, 253, 251)"
    assert page.get_attribute("#theme", "aria-label") == "Switch to dark colours"
    page.keyboard.press("Space")
    assert page.evaluate(shade) == dark != "rgb(253, 253, 251)"


def test_columns_are_sorted_by_enter(show: Show, run: Any) -> None:
    page = show(run)
    assert _names(page) == ["/block1/conv1/Conv", "/block2/conv2/Conv", "/head/Gemm"]
    head = page.locator("#layers thead th", has_text="error")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert _names(page) == ["/block2/conv2/Conv", "/block1/conv1/Conv", "/head/Gemm"]
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    # a layer without an error comes last either way
    assert _names(page) == ["/block1/conv1/Conv", "/block2/conv2/Conv", "/head/Gemm"]
    assert page.locator('#layers th[aria-sort="ascending"]').count() == 0


def test_layers_are_found_and_opened(show: Show, run: Any) -> None:
    page = show(run)
    page.fill("#find", "SPATIAL")
    assert _names(page) == ["/block2/conv2/Conv"]
    assert page.inner_text("#shown") == "1 of 3 layers"
    page.fill("#find", "")
    page.select_option("#show", "replaced")
    assert len(_names(page)) == 2
    page.fill("#find", "nowhere")
    assert page.is_visible("#nothing")
    page.fill("#find", "")
    name = page.get_by_role("button", name="/block1/conv1/Conv")
    assert name.get_attribute("aria-expanded") == "false"
    assert not page.is_visible("#more-1")
    name.press("Enter")
    assert name.get_attribute("aria-expanded") == "true"
    assert "iteration limit, 120 iterations" in page.inner_text("#more-1")
    assert page.is_visible("#more-1 polyline.primal")


def test_tabs_go_from_top_to_bottom(show: Show, run: Any, validation: Any) -> None:
    page = show(run, validation)
    tops, places = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        place = page.evaluate(
            "(() => { const e = document.activeElement; if (e === document.body) return null;"
            " const box = e.getBoundingClientRect();"
            " return [e.id || e.className || e.tagName, box.top + scrollY] })()"
        )
        if place is None:
            break
        places.append(place[0])
        tops.append(place[1])
    assert places[:2] == ["skip", "theme"]
    assert {"find", "show", "open", "name"} <= set(places)
    below = tops[2:]
    assert all(later >= earlier - 20 for earlier, later in pairwise(below))


def test_many_layers_fit_a_phone(show: Show, large: Any) -> None:
    page = show(large, viewport=NARROW)
    page.click("#open")
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    assert len(_names(page)) == 150


def test_a_phone_shows_which_gates_failed(show: Show, run: Any, validation: Any) -> None:
    page = show(run, validation, viewport=NARROW)
    for words in ("passed", "failed"):
        box = page.locator(".gates td", has_text=words).first.bounding_box()
        assert box["x"] + box["width"] <= NARROW["width"]


def test_hostile_names_run_nothing(show: Show, run: Any) -> None:
    for layer in run["layers"]:
        layer["name"] = '"><script>document.title = "hacked"</script><img src=x onerror=alert(1)>'
    page = show(run)
    page.click("#open")
    assert page.title() == "fast.onnx · Twofold"
    assert page.locator("#layers img").count() == 0
    assert "<script>" in page.inner_text("#layers")


def test_everything_is_there_without_the_script(show: Show, run: Any) -> None:
    page = show(run, java_script_enabled=False)
    assert not page.is_visible("#controls")
    assert not page.is_visible("#theme")
    assert page.is_visible("#more-1")


def test_paper_is_white_and_unfolded(show: Show, run: Any, tmp_path: Path) -> None:
    page = show(run, colours="dark")
    page.emulate_media(media="print")
    assert not page.is_visible("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_text("its SHA-256").first.is_visible()
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def _names(page: Page) -> list[str]:
    """Names of the layers that are shown, from the top."""
    return [
        each.strip() for each in page.locator("#layers tbody:visible button.name").all_inner_texts()
    ]
