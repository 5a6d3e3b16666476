"""What the search page asks of a gallery, without a page: against brute force, and what a damaged world gives."""

import io
import os
import shutil
from types import SimpleNamespace

import app_served
import numpy as np
import pytest
import small
from PIL import Image
from test_search import CALIBRATION, a_model

from finetune import app_originals, app_uploads, app_views
from finetune.app_candidates import vectors
from finetune.app_originals import GONE, NO_IMAGES
from finetune.app_search import Query, Searcher, Settings
from finetune.extractor import Extractor
from finetune.gallery_sources import open_source
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader
from shards.schema import UNKNOWN


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Searcher:
    return app_served.people(tmp_path_factory.mktemp("people"), tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Extractor:
    return Extractor(a_model(tmp_path_factory.mktemp("model"), 0, calibration=CALIBRATION), "cpu")


def encoded(kind: str = "PNG", size: tuple[int, int] = (20, 60), **how) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, kind, **how)
    return buffer.getvalue()


def by_hand(people: Searcher, query: Query, keep: np.ndarray) -> list[int]:
    gallery = people.loaded().gallery
    cosines = vectors(gallery.index, gallery.columns.ids) @ query.feature
    return gallery.columns.ids[keep][np.argsort(-cosines[keep], kind="stable")].tolist()


def test_filters_and_the_query_itself(people):
    columns = people.loaded().gallery.columns
    number = int(columns.ids[7])
    query = people.member(number)
    own = columns.ids == number
    assert query.camid == columns.camids[7]
    for settings, keep in [
        (Settings(top=99), ~own),
        (Settings(top=99, cameras=(0,)), ~own & (columns.camids == 0)),
        (Settings(top=99, other_cameras=True), columns.camids != query.camid),
        (Settings(top=99, cameras=(query.camid,), other_cameras=True), np.zeros(len(own), bool)),
    ]:
        assert [hit.answer.id for hit in people.search(query, settings).hits] == by_hand(people, query, keep)
    assert len(people.search(query, Settings(top=5)).hits) == 5


def test_a_match_tells_label_probability_and_decision(people):
    query = people.member(int(people.loaded().gallery.columns.ids[0]))
    for hit in people.search(query, Settings(top=24)).hits:
        assert hit.right is (hit.answer.pid == query.pid)
        assert hit.same is (hit.answer.score >= CALIBRATION["threshold"])
        assert hit.probability == pytest.approx(1 / (1 + np.exp(8 - 10 * hit.answer.score)))
        assert hit.distance is None
        assert hit.label == hit.answer.key
    anonymous = Query("a.jpg", query.feature)
    assert {hit.right for hit in people.search(anonymous, Settings()).hits} == {None}
    told = people.search(anonymous, Settings(other_cameras=True)).notes
    assert told == ["The camera of the query is not known, so none is left out."]


def test_reranked_matches_keep_their_cosines(people):
    query = people.member(int(people.loaded().gallery.columns.ids[0]))
    plain, new = (people.search(query, Settings(top=35, rerank=on)) for on in (False, True))
    scores = {hit.answer.id: hit.answer.score for hit in plain.hits}
    assert {hit.answer.id: hit.answer.score for hit in new.hits} == scores
    distances = [hit.distance for hit in new.hits]
    assert distances == sorted(distances)
    assert [hit.answer.id for hit in new.hits] != [hit.answer.id for hit in plain.hits]
    assert "Re-ranked: the 35 nearest images" in new.notes[0]
    assert "k1 3, k2 1, λ 0.3" in new.notes[0]


def test_an_upload_has_the_feature_of_the_extractor(people, tmp_path_factory):
    data = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    image = ShardReader([data], "query")[0].image
    query = people.upload(app_uploads.opened("a.jpg", image))
    np.testing.assert_array_equal(query.feature, people.extractor([image])[0])
    assert people.original(query) == image
    assert [query.camid, query.pid, query.id] == [UNKNOWN, UNKNOWN, None]
    assert query.attention.shape == (6, 2)
    large = app_uploads.opened("b.bmp", encoded("BMP", (800, 800)))
    with pytest.raises(UserError, match="not at hand any more"):
        people.original(people.upload(large))


def test_what_was_removed_is_not_found_any_more(tmp_path, model):
    for number in range(6):
        path = tmp_path / "crops" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(size=(20, 40 + number)))
    people = app_served.searcher(tmp_path, tmp_path / "crops", model=model)
    query = people.member(2)
    gone = np.array([False, True, True, False, False, False])
    people.loaded().gallery.remove(gone)
    assert sorted(hit.answer.id for hit in people.search(query, Settings()).hits) == [0, 3, 4, 5]
    with pytest.raises(UserError, match="not in the gallery any more"):
        people.member(1)
    assert people.examples("", 0, 9)[1] == 4
    shutil.rmtree(people.folder)
    with pytest.raises(UserError, match="cannot be read any more; the terminal of the server") as error:
        people.search(query, Settings())
    assert str(tmp_path) not in str(error.value)


def test_examples_are_spread_and_found_by_name(people):
    keys = [str(key) for key in people.loaded().gallery.columns.keys]
    hits, total = people.examples("", 0, 6)
    assert [total, len(hits)] == [len(keys), 6]
    assert {hit.label for hit in hits}.isdisjoint({hit.label for hit in people.examples("", 1, 6)[0]})
    some = keys[5][-6:].upper()
    hits, total = people.examples(some, 0, 100)
    assert {hit.label for hit in hits} == {key for key in keys if some.lower() in key.lower()}
    assert total == len(hits) > 0
    assert people.examples("nobody", 3, 6) == ([], 0)
    pages = [hit.label for page in range(-(-len(keys) // 7)) for hit in people.examples("figure", page, 7)[0]]
    assert pages == keys


def test_originals_that_cannot_be_shown(tmp_path, model, capsys):
    crops = tmp_path / "secret place" / "crops"
    for name in ("a.png", "sub/b.png", "c.png", os.fsdecode(b"bad\xff.png")):
        (crops / name).parent.mkdir(parents=True, exist_ok=True)
        (crops / name).write_bytes(encoded())
    people = app_served.searcher(tmp_path, crops, model=model)
    (crops / "a.png").unlink()
    (crops / "c.png").write_bytes(b"not any more")
    hits = {hit.label: hit for hit in people.examples("", 0, 9)[0]}
    assert {label: hit.missing for label, hit in hits.items()} == {
        **{"a.png": GONE, "c.png": GONE, "sub/b.png": "", "bad\ufffd.png": ""}
    }
    assert hits["sub/b.png"].pixels.shape == (60, 20, 3)
    assert "a.png cannot be read" in capsys.readouterr().err, "the terminal knows why"
    page = app_views.browse(list(hits.values()), 4, "", 0, 0, False)
    assert "secret place" not in page
    assert page.count(GONE) == 2
    found = people.search(people.member(hits["a.png"].answer.id), Settings(attention=True))
    assert [hit.attention is None for hit in found.hits] == [hit.pixels is None for hit in found.hits]


def test_a_gallery_that_names_files_outside_of_its_folder(tmp_path, model):
    (tmp_path / "outside.png").write_bytes(encoded())
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.png").write_bytes(encoded())
    originals = app_served.searcher(tmp_path, tmp_path / "crops", model=model).loaded().originals
    assert originals.pixels(0).shape == (60, 20, 3)
    for key in ("../outside.png", str(tmp_path / "outside.png")):
        hostile = SimpleNamespace(sources=np.zeros(1, np.int64), keys=[key])
        outside = app_originals.Originals(
            SimpleNamespace(columns=hostile, facts={"sources": [{"kind": "folder", "path": str(tmp_path / "crops")}]})
        )
        with pytest.raises(app_originals.Missing):
            outside.read(0)


def test_sets_that_moved_and_tables(tmp_path, tmp_path_factory, model, capsys):
    data = tmp_path / "set"
    shutil.copytree(small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED), data)
    people = app_served.searcher(tmp_path, data, model=model)
    assert not people.examples("", 0, 3)[0][0].missing
    data.rename(tmp_path / "moved")
    again = Searcher(people.loaded().gallery, model)
    assert {hit.missing for hit in again.examples("", 0, 3)[0]} == {GONE}
    assert str(data) in capsys.readouterr().err
    gallery = people.loaded().gallery
    facts = {"model": model.fingerprint, "input": {k: v for k, v in model.input.items() if k != "flip"}}
    columns = gallery.columns
    features = vectors(gallery.index, columns.ids)
    EmbeddingTable(features, columns.pids, columns.camids, columns.keys, facts).save(tmp_path / "table")
    assert open_source(str(tmp_path / "table")).kind == "table"
    of_table = app_served.searcher(tmp_path, tmp_path / "table", "of-table", model)
    query = of_table.member(3)
    assert [query.pixels, query.missing, query.attention] == [None, NO_IMAGES, None]
    assert len(of_table.search(query, Settings(attention=True)).hits) == 12
