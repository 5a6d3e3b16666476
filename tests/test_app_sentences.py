"""Sentences on the search page: what they find, unknown words, galleries whose model reads none."""

import re

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the extra `app`")

import app_served
from app_served import Visitor
from test_search import CALIBRATION

from finetune.app_search import LONGEST, Searcher, Settings
from finetune.verification import Calibration
from recipes.errors import UserError

ASKED = "a woman in a red coat"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Searcher:
    return app_served.sentences(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Searcher:
    return app_served.people(tmp_path_factory.mktemp("people"), tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def url(reader, people):
    with app_served.running([reader, people]) as address:
        yield address


def by_hand(reader: Searcher, text: str) -> list[int]:
    (feature,), _ = reader.extractor.sentences([text])
    found = reader.loaded().gallery.search(feature[None], 6)[0]
    return [answer.id for answer in found]


def ids(html: str) -> list[int]:
    return [int(number) for number in re.findall(r'data-id="(\d+)"', html)]


def test_a_sentence_has_the_feature_of_the_extractor_and_finds_the_nearest(reader):
    query = reader.sentence(f"  {ASKED} \n")
    assert query.name == ASKED
    np.testing.assert_array_equal(query.feature, reader.extractor.sentences([ASKED])[0][0])
    assert [hit.answer.id for hit in reader.search(query, Settings()).hits] == by_hand(reader, ASKED)
    assert (query.pixels, query.attention, query.notes) == (None, None, ())
    (told,) = reader.sentence(f"{ASKED} wearing spats").notes
    assert told == "Words unknown to this model and left out: 'wearing', 'spats'."


def test_a_threshold_for_pictures_is_none_for_sentences(reader, monkeypatch):
    gallery = reader.loaded().gallery
    monkeypatch.setattr(gallery, "calibration", Calibration(**CALIBRATION))
    number = int(gallery.columns.ids[0])
    assert {hit.same for hit in reader.search(reader.member(number), Settings()).hits} != {None}
    found = reader.search(reader.sentence(ASKED), Settings()).hits
    assert {(hit.same, hit.probability) for hit in found} == {(None, None)}


@pytest.mark.parametrize("text", ["", "  ", 7, None])
def test_an_empty_sentence_is_told(reader, text):
    with pytest.raises(UserError, match="Say whom you look for"):
        reader.sentence(text)


def test_a_long_sentence_is_cut(reader):
    assert len(reader.sentence("coat " * 1000).name) <= LONGEST


def test_the_page_answers_a_sentence(url, reader):
    visitor = Visitor(url, "speaker")
    found = visitor.ask("submit", given=[ASKED])
    assert found["success"]
    assert ids(found["result"]) == by_hand(reader, ASKED)
    assert f"<strong>Query:</strong> {ASKED}" in found["result"]
    assert "how well a sentence and an image fit" in found["result"]
    bad = visitor.ask("submit", given=["xyzzy <b>"])
    assert "has no word that this model knows" in bad["message"]
    assert "<b>" not in bad["message"]
    assert "value" not in bad["result"], "what was shown stays"
    again = visitor.ask("submit", given=["red"])
    assert "Back to the query before" in again["result"]
    assert ids(visitor.ask("back", {})["result"]) == by_hand(reader, ASKED)


def test_another_gallery_is_searched_by_the_sentence_if_it_can(url):
    visitor = Visitor(url, "mover")
    visitor.ask("submit", given=[ASKED])
    place = next(
        one for one in visitor.config["dependencies"] if len(one["outputs"]) > 5 and one["targets"][0][1] == "input"
    )
    given = {"data": [None, 1, *visitor.controls], "fn_index": place["id"], "session_hash": "mover", "event_data": None,
             "trigger_id": place["targets"][0][0]}  # fmt: skip
    assert visitor.client.post("/gradio_api/queue/join", json=given).status_code == 200
    whole = visitor.client.get("/gradio_api/queue/data", params={"session_hash": "mover"}).text
    assert "was not trained with sentences; search it with a picture" in whole
    refused = visitor.ask("submit", given=[ASKED])
    assert "was not trained with sentences" in refused["message"]
