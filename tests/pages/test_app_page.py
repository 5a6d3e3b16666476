"""The search page in a real browser: seen, searched, filtered, by keyboard, in the dark, on a phone."""

import base64
import csv
import io
import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import small
from browser import DESK, PHONE, brightness, colours, needs_browser, opened
from page_scripts import CONTRAST, DROPPED, FOCUSED
from PIL import Image

pytest.importorskip("gradio", reason="the extra `app`")

import app_served

from shards.reader import ShardReader

pytestmark = needs_browser
HOSTILE = "${document.title='x'} {{value}} `a` <img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A gallery with cameras and labels, and one of files with names that nobody should have."""
    folder = tmp_path_factory.mktemp("pages")
    people = app_served.people(folder, tmp_path_factory.getbasetemp())
    (folder / "files").mkdir()
    for number, name in enumerate([HOSTILE, "gone.png", "plain.png"]):
        Image.new("RGB", (20, 50), (80 * number, 200, 90)).save(folder / "files" / name)
    crops = app_served.searcher(folder, folder / "files", "crops", people.extractor)
    (folder / "files" / "gone.png").unlink()
    with app_served.running([people, crops]) as address:
        yield address


@pytest.fixture(scope="module")
def person(tmp_path_factory) -> dict:
    data = ShardReader([small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)], "query")[3].image
    return {"name": "person.jpg", "mimeType": "image/jpeg", "buffer": data}


@contextmanager
def visited(browser, url, **how):
    """The page with the images of the gallery; at the end nothing may have gone wrong in it."""
    with opened(browser, url, **how) as here:
        here.page.wait_for_selector(".browse .tile img")
        yield here
        assert here.told == []
        assert here.elsewhere() == []


@pytest.fixture(scope="module")
def shared(browser, url):
    with visited(browser, url) as here:
        yield here


@pytest.fixture
def here(shared):
    """A page that several tests use one after the other, without a query."""
    if shared.page.locator(".found").count():
        settled(shared, lambda: shared.page.get_by_role("button", name="New search").click(), "browse")
    if shared.page.locator("#find-name").input_value():
        shared.page.locator("#find-name").fill("")
        settled(shared, lambda: shared.page.locator("#find-name").press("Enter"), "browse")
    yield shared
    assert shared.told == []


def settled(here, action, section="found"):
    """Do something that gives another list, and wait for it."""
    before = here.page.locator("section").get_attribute("data-query")
    action()
    here.page.wait_for_selector(f'section.{section}:not([data-query="{before}"])')


def sent(here, file):
    settled(here, lambda: here.page.set_input_files("#drop-file", files=[file]))


def tiles(here) -> list[int]:
    return [int(one.get_attribute("data-id")) for one in here.page.locator(".tile").all()]


def changed(here, action):
    """Do something that changes the list under the same query, and wait for it."""
    here.page.evaluate("document.querySelector('section').dataset.old = 'yes'")
    action()
    here.page.wait_for_selector("section:not([data-old])")


def distances(here) -> list:
    """After re-ranking, of the matches as they are saved."""
    whole = here.page.get_by_role("link", name="Save as JSON").get_attribute("href")
    return [row["distance"] for row in json.loads(base64.b64decode(whole.partition(",")[2]))["answers"]]


def fits(here) -> bool:
    return here.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    "size, dark",
    [
        pytest.param(DESK, False, id="desk-light"),
        pytest.param(PHONE, True, id="phone-dark"),
        pytest.param(DESK, True, id="desk-dark", marks=pytest.mark.soak),
        pytest.param(PHONE, False, id="phone-light", marks=pytest.mark.soak),
    ],
)
def test_the_page_is_seen(browser, url, person, size, dark):
    with visited(browser, url, size=size, dark=dark) as here:
        for state in ("empty", "results", "message"):
            if state == "results":
                sent(here, person)
            if state == "message":
                here.page.set_input_files("#drop-file", files=[{**person, "buffer": b"x"}])
                here.page.wait_for_selector(".message p")
                here.page.get_by_text("Choose an image").scroll_into_view_if_needed()
                box = here.page.locator(".message p").bounding_box()
                assert box["y"] + box["height"] < size[1], "the sentence stands beside what went wrong"
            whole = here.screenshot(full_page=True)
            assert colours(whole[::4, ::4]) > 60, state
            assert (brightness(whole) < 0.5) is dark
            assert fits(here), state
            for part in (".head", ".drop", ".bar", ".tiles"):
                assert colours(seen_of(whole, here, part)) > 5, (state, part)
            worst = here.page.evaluate(CONTRAST)
            assert worst[0][0] >= 4.5, worst
            images = here.page.locator("img").all()
            assert len(images) >= 12
            assert all(image.get_attribute("alt") for image in images)
            assert here.page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 8)")
        headings = here.page.evaluate("[...document.querySelectorAll('h1, h2')].map((one) => one.tagName)")
        assert headings == ["H1", "H2"]


def seen_of(whole: np.ndarray, here, part: str) -> np.ndarray:
    """Pixels of a part of the page, thinned."""
    box = here.page.evaluate(
        "(part) => { const b = document.querySelector(part).getBoundingClientRect();"
        "return [b.x + scrollX, b.y + scrollY, b.right + scrollX, b.bottom + scrollY].map(Math.round); }",
        part,
    )
    return whole[box[1] : box[3] : 3, box[0] : box[2] : 3]


def test_search_filter_rerank_attention(browser, url, person):
    with visited(browser, url) as here:
        page = here.page
        sent(here, person)
        assert page.locator("h2").inner_text() == "12 nearest images"
        assert page.evaluate("document.activeElement.id") == "found-title", "the keyboard is where the new list begins"
        first = tiles(here)
        assert page.locator(".tile .score").first.inner_text().startswith("1 · cosine 0.")
        told = page.locator(".tile .same, .tile .other").all_inner_texts()
        assert len(told) == 12
        assert all(re.fullmatch(r"(✓ )?(\d+%|over 99%|under 1%) same person", one) for one in told)
        changed(here, lambda: page.get_by_label("24", exact=True).check())
        assert tiles(here)[:12] == first
        assert len(tiles(here)) == 24
        assert set(distances(here)) == {None}
        changed(here, lambda: page.get_by_label("Re-rank").check())
        assert distances(here) == sorted(distances(here))
        assert "k-reciprocal" in page.locator(".found").inner_text()
        changed(here, lambda: page.get_by_label("Show attention").check())
        assert page.locator(".tile img").count() == 48
        assert page.locator(".tile img").nth(1).get_attribute("alt") == "attention in match 1"
        assert page.locator(".query img").count() == 2
        page.get_by_label("Only these cameras").click()
        changed(here, lambda: page.get_by_role("option", name="camera 1").click())
        assert set(page.locator(".tile .camera").all_inner_texts()) == {"camera 1"}
        changed(here, lambda: page.get_by_label("Re-rank").uncheck())
        assert set(page.locator(".tile .camera").all_inner_texts()) == {"camera 1"}, "the filter stays"


def test_a_result_becomes_the_query_and_back(here, person):
    page = here.page
    sent(here, person)
    first = tiles(here)
    settled(here, lambda: page.locator(".tile").nth(2).click())
    assert first[2] not in tiles(here)
    assert "identity" in page.locator(".query").inner_text()
    assert {"right", "wrong"} & set(page.locator(".tile").first.get_attribute("class").split())
    settled(here, lambda: page.get_by_role("button", name="Back").click())
    assert tiles(here) == first
    settled(here, lambda: page.get_by_role("button", name="New search").click(), "browse")
    assert page.locator("h2").inner_text() == "Images of the gallery"


def test_images_of_the_gallery_by_name_and_others(here):
    page, before = here.page, tiles(here)
    settled(here, lambda: page.get_by_role("button", name="Other images").click(), "browse")
    assert not set(before) & set(tiles(here))
    name = page.locator(".tile .name").first.inner_text()
    page.get_by_label("Name contains").fill(name.upper())
    settled(here, lambda: page.keyboard.press("Enter"), "browse")
    assert page.locator(".tile .name").all_inner_texts() == [name]
    page.get_by_label("Name contains").fill("nobody <b>")
    settled(here, lambda: page.keyboard.press("Enter"), "browse")
    assert "No image of the gallery has “nobody <b>” in its name" in page.locator(".browse").inner_text()


def test_bad_uploads_are_answered_with_a_sentence(here, person):
    page = here.page
    sent(here, person)
    before = tiles(here)
    large = bytes(app_served.MAX_BYTES + 1000)
    for data, told in ((b"no picture", "holiday.jpg is not a JPEG"), (large, "at most 300 kB are taken"),
                       (b"", "holiday.jpg is empty")):  # fmt: skip
        page.set_input_files("#drop-file", files=[{"name": "holiday.jpg", "mimeType": "a/b", "buffer": data}])
        page.wait_for_selector(f'.message p:has-text("{told}")')
        assert page.locator(".message").get_attribute("role") == "alert"
        assert tiles(here) == before, "what was found stays"
    sent(here, person)
    assert page.locator(".message p").count() == 0, "the sentence goes with the next good picture"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(here, person, way):
    text = base64.b64encode(person["buffer"]).decode()
    settled(here, lambda: here.page.evaluate(DROPPED, [way, text]))
    assert "mine.jpg" in here.page.locator(".query").inner_text()
    assert len(tiles(here)) == 12


def test_by_keyboard_alone(browser, url, person):
    with visited(browser, url) as here:
        page, order = here.page, []
        for _ in range(13):
            page.keyboard.press("Tab")
            order.append(page.evaluate(FOCUSED))
        names = [name for name, _ in order]
        assert names == [
            *("drop-file", "people", "crops", "12", "24", "48", "Only these cameras (none: all)"),
            *("Other cameras than the query's", "Re-rank", "Show attention", "find-name", "Find", "Other images"),
        ]
        assert [name for name, seen in order if not seen] == []
        page.locator(".tile").nth(1).focus()
        wanted = tiles(here)[1]
        settled(here, lambda: page.keyboard.press("Enter"))
        assert wanted not in tiles(here)
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED)[0] == "New search"
        for _ in range(3):
            page.keyboard.press("Tab")
        settled(here, lambda: page.keyboard.press("Space"))
        assert page.get_by_role("button", name="Back").count() == 1


def test_the_list_is_saved(here, person):
    sent(here, person)
    with here.page.expect_download() as table:
        here.page.get_by_role("link", name="Save as CSV").click()
    with here.page.expect_download() as whole:
        here.page.get_by_role("link", name="Save as JSON").click()
    assert [table.value.suggested_filename, whole.value.suggested_filename] == [
        *("matches-people.csv", "matches-people.json")
    ]
    told = json.loads(Path(whole.value.path()).read_text())
    assert [row["id"] for row in told["answers"]] == tiles(here)
    assert [told["gallery"], told["images"], told["query"]] == ["people", 36, "person.jpg"]
    rows = list(csv.DictReader(io.StringIO(Path(table.value.path()).read_text())))
    assert [int(row["id"]) for row in rows] == tiles(here)


def test_another_gallery_with_hostile_names_and_a_missing_original(browser, url, person):
    with visited(browser, url) as here:
        page = here.page
        sent(here, person)
        settled(here, lambda: page.get_by_label("crops", exact=True).check())
        assert "Gallery crops: 3 images" in page.locator(".head").inner_text()
        assert "person.jpg" in page.locator(".query").inner_text(), "the same picture is searched for"
        assert HOSTILE in page.locator(".tile .name").all_inner_texts()
        assert page.locator(".tile .missing").inner_text().startswith("The original is not there any more")
        assert not page.get_by_label("Only these cameras").is_visible()
        assert page.title() == "Search people"
        settled(here, lambda: page.get_by_role("button", name="New search").click(), "browse")
        settled(here, lambda: page.locator(".tile", has_text="${document").click())
        assert page.title() == "Search people"
        assert HOSTILE in page.locator(".query").inner_text()
