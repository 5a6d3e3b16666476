"""The page of runs in a real browser, from disk and without a network: seen, in the dark, on a phone, by keyboard."""

import re

import pytest
import report_runs
import small
from browser import DESK, PHONE, brightness, colours, needs_browser, opened
from page_scripts import CONTRAST, FOCUSED

pytestmark = needs_browser
SCRIPT = str(small.ROOT / "finetune" / "report.py")
PAGES = ("pretraining", "tuned", "compared")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folder with a page of a pretraining, one of a fine-tune, and one of four runs."""
    runs, out = report_runs.made(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("report")
    for name, given in zip(PAGES, ([runs.pretraining], [runs.tuned], runs[1:]), strict=True):
        assert small.run([SCRIPT, *map(str, given), "--out", str(out / f"{name}.html")]) == 0
    return out


@pytest.fixture(scope="module")
def visited(browser, pages):
    """Opens a page; at the end nothing may have gone wrong in it."""

    def visit(name, size=DESK, dark=False):
        return opened(browser, f"file://{pages}/{name}.html", size, dark=dark, online=False)

    return visit


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (PHONE, True)], ids=["desk-light", "phone-dark"])
def test_every_section_is_seen(visited, name, size, dark):
    with visited(name, size, dark) as found:
        whole = found.screenshot(full_page=True)
        assert (brightness(whole) < 0.5) == dark
        background = whole[-1, 0]
        sections = found.page.locator("main > section")
        for i in range(sections.count()):
            box = sections.nth(i).bounding_box()
            top, bottom = int(box["y"]), int(box["y"] + box["height"])
            seen = whole[top:bottom:2, ::2]
            assert (seen != background).any(axis=-1).mean() > 0.01, f"section {i} is empty"
            assert colours(seen) > 3
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert found.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        worst = found.page.evaluate(CONTRAST)
        assert worst[0][0] >= 4.5, worst
        assert not found.told
        assert not found.elsewhere()


def test_curves_are_drawn_and_read_by_the_pointer(visited):
    with visited("compared") as found:
        chart = found.page.locator(".chart", has_text="Loss").first
        strokes = chart.locator("path.line[d]").evaluate_all(
            "all => all.filter(one => one.getTotalLength() > 30).map(one => getComputedStyle(one).stroke"
            " + getComputedStyle(one).strokeDasharray)"
        )
        assert len(set(strokes)) == 2, "told apart by colour and dashes"
        picture = chart.locator("svg[role=img]")
        box = picture.bounding_box()
        picture.scroll_into_view_if_needed()
        picture.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
        assert re.fullmatch(r"[\d.,-]+ · [\d.,-]+", chart.locator(".readout").text_content())
        found.page.mouse.move(2, 2)
        assert chart.locator(".readout").text_content() == ""


def test_by_keyboard(visited):
    with visited("tuned") as found:
        reached = []
        for _ in range(12):
            found.page.keyboard.press("Tab")
            what, seen = found.page.evaluate(FOCUSED)
            assert seen, f"the focus on {what!r} is not seen"
            reached.append(what)
        assert reached[:5] == ["Skip to the numbers", "Results", "Ranked lists", "Curves", "Data"]
        assert "Table of results" in reached
        summary = found.page.locator("#recipe summary")
        summary.focus()
        assert not found.page.locator("table.recipe").is_visible()
        found.page.keyboard.press("Enter")
        assert found.page.locator("table.recipe").is_visible()
        found.page.locator(".jump").focus()
        found.page.keyboard.press("Enter")
        assert found.page.evaluate("document.activeElement.id") == "main"
        assert not found.told


def test_it_is_whole_without_its_script(browser, pages):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(f"file://{pages}/pretraining.html")
    assert page.locator(".chart").count() > 10
    assert page.locator("details[open] .picture img").first.is_visible()
    context.close()
