"""The documentation in a browser, read from disk without a network: it looks like something, and its search finds."""

import os
import subprocess
import sys

import pytest
from browser import DESK, PHONE, brightness, colours, needs_browser, opened
from small import ROOT

pytestmark = needs_browser
SHOWN = ("index", "recipes", "reference/method")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Its folder."""
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=quiet)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("page", SHOWN)
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_is_there(site, browser, page, size, dark):
    with opened(browser, f"file://{site}/{page}.html", size, dark=dark, online=False) as found:
        seen = found.screenshot()
        assert colours(seen) > 20
        assert (brightness(seen) < 0.5) == dark
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert found.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), (
            "a picture is missing"
        )
        assert not found.told
        assert not found.elsewhere()


def test_the_search_works_from_disk(site, browser):
    with opened(browser, f"file://{site}/index.html", DESK, online=False) as found:
        found.page.keyboard.press("/")
        found.page.keyboard.type("calibration", delay=10)
        found.page.wait_for_selector(".md-search-result__item")
        titles = found.page.locator(".md-search-result__item h1").all_inner_texts()
        assert "Evaluation: what the numbers mean" in titles
        found.page.locator(".md-search-result__link").first.click()
        found.page.wait_for_load_state()
        assert "calibration" in found.page.locator("article").inner_text().lower()
        assert not found.told
        assert not found.elsewhere()


def test_the_keyboard_reaches_the_text(site, browser):
    with opened(browser, f"file://{site}/comparison.html", DESK, online=False) as found:
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("document.activeElement.textContent.trim()") == "Skip to content"
        found.page.keyboard.press("Enter")
        assert "#" in found.page.url
