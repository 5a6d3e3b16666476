"""Ranked lists as pictures, on images drawn here: each is one colour, so a tile tells which image it shows."""

import io

import numpy as np
import pytest
from PIL import Image

from finetune import strips
from finetune.metrics import Protocol
from finetune.strips import CAPTION, GAP, GREEN, GREY, LABEL, RED, draw_strips, ranked
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN, Sample

TILE = (40, 80)


def table(scores, pids, camids, prefix) -> EmbeddingTable:
    features = np.asarray(scores, np.float32)[:, None]
    keys = [f"{prefix}{i}" for i in range(len(features))]
    return EmbeddingTable(features, np.asarray(pids, np.int64), np.asarray(camids, np.int64), keys)


def colour(row: int, prefix: str) -> tuple[int, int, int]:
    return (40 + 20 * row, 60, 200 if prefix == "q" else 90)


class Drawn:
    """A reader over plain images."""

    def __init__(self, prefix):
        self.prefix = prefix

    def __getitem__(self, row):
        file = io.BytesIO()
        Image.new("RGB", (20, 50), colour(row, self.prefix)).save(file, format="PNG")
        return Sample(f"{self.prefix}{row}", file.getvalue(), 1, 0, ())


#                    row  0    1    2    3    4    5     6
GALLERY = table([0.9, 0.8, 0.7, 0.7, 0.6, 0.95, 0.1], [1, 2, 1, 0, 1, -1, UNKNOWN], [0, 1, 1, 1, 2, 1, 1], "g")
QUERY = table([1.0, 1.0], [1, 9], [0, 0], "q")


def test_ranking_by_hand():
    # row 0 is the same camera, row 5 junk; rows 2 and 3 are equal: the lower first; matches at ranks 2 and 4
    hits, precision = ranked(QUERY, GALLERY, 0, top=10)
    assert [hit.row for hit in hits] == [1, 2, 3, 4, 6]
    assert [hit.right for hit in hits] == [False, True, False, True, None]
    assert [round(hit.score, 3) for hit in hits] == [0.8, 0.7, 0.7, 0.6, 0.1]
    assert precision == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert len(ranked(QUERY, GALLERY, 0, top=2)[0]) == 2


def test_queries_without_match_or_identity():
    hits, precision = ranked(QUERY, GALLERY, 1, top=3)
    assert [hit.right for hit in hits] == [False, False, False]  # row 0 is another person: it stays
    assert np.isnan(precision)
    unknown = table([1.0], [UNKNOWN], [UNKNOWN], "q")
    assert [hit.right for hit in ranked(unknown, GALLERY, 0, top=3)[0]] == [None, None, None]


def test_images_of_one_camera_count_where_the_protocol_keeps_them():
    keep = Protocol(same_camera="keep")
    hits, precision = ranked(QUERY, GALLERY, 0, top=10, protocol=keep)
    assert [hit.row for hit in hits] == [0, 1, 2, 3, 4, 6]  # only junk is left out
    assert precision == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    itself, _ = ranked(GALLERY, GALLERY, 2, top=10, protocol=keep)
    assert 2 not in [hit.row for hit in itself]


def test_captions_tell_distance_place_and_camera(tmp_path, monkeypatch):
    written = []
    plain = strips._Sheet.tile
    monkeypatch.setattr(strips._Sheet, "tile", lambda *given: (written.append(given[-1]), plain(*given)))
    drawn(tmp_path, [("model", QUERY, GALLERY)], [0])
    assert written == [
        *(("query", "cam 0"), ("d 0.200", "1: cam 1"), ("d 0.300", "2: cam 1"), ("d 0.300", "3: cam 1")),
        *(("d 0.400", "4: cam 2"), ("d 0.900", "5: cam 1")),
    ]


def tiles(picture: np.ndarray, places: int, line: int = 0) -> list[np.ndarray]:
    """The tiles of one strip, found by the known pitch; the label above and the captions below are left out."""
    width, height = TILE
    top = GAP + LABEL + line * (height + LABEL + CAPTION + GAP)
    lefts = [GAP + place * (width + GAP) + (GAP if place else 0) for place in range(places)]
    return [picture[top : top + height, left : left + width].astype(int) for left in lefts]


def drawn(tmp_path, panels, rows, top=5):
    path = tmp_path / "new" / "strips.png"
    draw_strips(path, Drawn("q"), Drawn("g"), panels, rows, top=top, tile=TILE)
    assert [p.name for p in path.parent.iterdir()] == ["strips.png"]
    return np.asarray(Image.open(path))


def share(tile: np.ndarray, wanted: tuple[int, int, int]) -> float:
    """Part of the outermost ring of pixels that has this colour."""
    ring = np.concatenate([tile[0], tile[-1], tile[1:-1, 0], tile[1:-1, -1]])
    return float((ring == wanted).all(axis=1).mean())


def test_tiles_show_the_right_images_in_order(tmp_path):
    picture = drawn(tmp_path, [("model", QUERY, GALLERY)], [0])
    middle = [tuple(tile[40, 20]) for tile in tiles(picture, 6)]
    assert middle == [colour(0, "q")] + [colour(row, "g") for row in (1, 2, 3, 4, 6)]


def test_frames_tell_right_from_wrong_with_and_without_colour(tmp_path):
    query, wrong, right, _, _, unknown = tiles(drawn(tmp_path, [("model", QUERY, GALLERY)], [0]), 6)
    assert share(right, GREEN) == 1.0  # solid
    assert 0.3 < share(wrong, RED) < 0.8  # dashed
    assert share(unknown, GREY) == 1.0
    assert max(share(query, GREEN), share(query, RED)) == 0.0
    corner = np.s_[4:18, 22:36]  # the mark's white field
    tick, cross = ((tile[corner] != 255).any(axis=2) for tile in (right, wrong))
    assert tick.any()
    assert cross.any()
    assert (tick != cross).sum() > 20  # another shape, not only another colour
    assert (cross == cross[:, ::-1]).mean() > 0.85  # a cross is its own mirror image, a tick is not
    assert (tick == tick[:, ::-1]).mean() < 0.85
    assert (unknown[corner] == colour(6, "g")).all()


def test_each_query_has_one_strip_for_each_model(tmp_path):
    other = table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], GALLERY.pids, GALLERY.camids, "g")
    picture = drawn(tmp_path, [("random weights", QUERY, other), ("teacher", QUERY, GALLERY)], [1, 0], top=2)

    def shown(line):
        return [tuple(tile[40, 20]) for tile in tiles(picture, 3, line)]

    assert shown(0) == [colour(1, "q"), colour(6, "g"), colour(4, "g")]  # row 5 is junk
    assert shown(1) == [colour(1, "q"), colour(0, "g"), colour(1, "g")]
    assert shown(2) == [colour(0, "q"), colour(6, "g"), colour(4, "g")]
    assert shown(3) == [colour(0, "q"), colour(1, "g"), colour(2, "g")]


def test_labels_and_captions_are_written(tmp_path):
    plain = drawn(tmp_path, [("a", QUERY, GALLERY)], [0])
    longer = drawn(tmp_path, [("a much longer name of a model", QUERY, GALLERY)], [0])
    assert (plain != longer)[GAP : GAP + LABEL].any()
    assert not (plain != longer)[GAP + LABEL :].any()
    below = plain[GAP + LABEL + TILE[1] :]
    assert (below < 128).any()


def test_faults_are_explained(tmp_path):
    def strips(panels, rows, gallery_reader=None):
        draw_strips(tmp_path / "x.png", Drawn("q"), gallery_reader or Drawn("g"), panels, rows)

    with pytest.raises(UserError, match="query row 2 does not exist"):
        strips([("m", QUERY, GALLERY)], [2])
    with pytest.raises(UserError, match="at least one model and one query"):
        strips([("m", QUERY, GALLERY)], [])
    with pytest.raises(UserError, match="row 1 of the embedding table is 'g1', but the shards hold 'q1'"):
        strips([("m", QUERY, GALLERY)], [0], Drawn("q"))
    with pytest.raises(UserError, match="'q0' for 'm' and 'g0' for 'n'"):
        strips([("n", GALLERY, GALLERY), ("m", QUERY, GALLERY)], [0])

    class Broken(Drawn):
        def __getitem__(self, row):
            return Sample(f"g{row}", b"no image", 1, 0, ())

    with pytest.raises(UserError, match="image of 'g1' cannot be decoded"):
        strips([("m", QUERY, GALLERY)], [0], Broken("g"))
    assert not list(tmp_path.iterdir())
