"""The field for sentences of the search page, in a real browser."""

import pytest
from browser import DESK, PHONE, needs_browser, opened
from page_scripts import CONTRAST

pytest.importorskip("gradio", reason="the extra `app`")

import app_served

pytestmark = needs_browser
FIELD = "or say in English whom you look for"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A gallery whose model reads sentences, and one whose model does not."""
    folder = tmp_path_factory.mktemp("pages")
    reader = app_served.sentences(folder / "text")
    people = app_served.people(folder, tmp_path_factory.getbasetemp())
    with app_served.running([reader, people]) as address:
        yield address


@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (PHONE, True)], ids=["desk-light", "phone-dark"])
def test_a_sentence_is_typed_and_answered(browser, url, size, dark):
    with opened(browser, url, size=size, dark=dark) as here:
        page = here.page
        page.wait_for_selector(".browse .tile img")
        field = page.get_by_label(FIELD)
        field.fill("a woman in a red coat")
        field.press("Enter")
        page.wait_for_selector("section.found .tile img")
        assert page.locator(".query .name").inner_text() == "Query: a woman in a red coat"
        assert page.locator(".tile").count() == 6
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(CONTRAST)[0][0] >= 4.5
        field.fill("qqq")
        field.press("Enter")
        page.wait_for_selector(".message p")
        assert "has no word that this model knows" in page.locator(".message").inner_text()
        page.get_by_label("people", exact=True).check()
        page.wait_for_selector("section.browse")
        field.wait_for(state="hidden")
        page.get_by_label("gallery", exact=True).check()
        field.wait_for(state="visible")
        assert here.told == []
        assert here.elsewhere() == []
