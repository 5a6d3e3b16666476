"""A search query by query and camera by camera, on scores chosen by hand and against the plain definition."""

import math

import numpy as np
import pytest

from finetune.breakdown import QUERY_COLUMNS, by_cameras, matching, nearest, query_rows, spread, taken
from finetune.metrics import Protocol, evaluate
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

DROP, KEEP = Protocol(), Protocol(same_camera="keep")


def table(features, pids, camids, prefix="g") -> EmbeddingTable:
    features = np.asarray(features, np.float32)
    features = features[:, None] if features.ndim == 1 else features
    keys = [f"{prefix}{i}" for i in range(len(features))]
    return EmbeddingTable(features, np.asarray(pids, np.int64), np.asarray(camids, np.int64), keys)


#                    g0   g1   g2   g3   g4   g5    g6
GALLERY = table([0.9, 0.8, 0.7, 0.7, 0.6, 0.95, 0.1], [1, 2, 1, 0, 1, -1, 2], [0, 1, 1, 1, 2, 1, 0])
QUERY = table([1, 1, 1], [1, 2, 9], [0, 1, 0], "q")


def test_what_a_query_should_find():
    assert [rows.tolist() for rows in matching(QUERY, GALLERY, DROP)] == [[2, 4], [6], []]
    assert [rows.tolist() for rows in matching(QUERY, GALLERY, KEEP)] == [[0, 2, 4], [1, 6], []]
    # a query that lies in the gallery is not its own match
    assert [rows.tolist() for rows in matching(GALLERY, GALLERY, KEEP)] == [[2, 4], [6], [0, 4], [], [0, 2], [], [1]]


def test_the_row_of_a_query_by_hand():
    matches, plain = matching(QUERY, GALLERY, DROP), evaluate(QUERY, GALLERY)
    rows = [dict(zip(QUERY_COLUMNS, row, strict=True)) for row in query_rows(QUERY, GALLERY, matches, plain, None)]
    # without g0 and g5 the order is g1 g2 g3 g4 g6: matches at ranks 2 and 4; for q1 without g1: g0 g2 g3 g4 g6
    assert rows[0] == {
        **{"key": "q0", "pid": 1, "camid": 0, "ap": pytest.approx((1 / 2 + 2 / 4) / 2), "inp": 2 / 4, "first_rank": 2},
        **{"matches": 2, "best_match": "g2", "best_match_cosine": 0.7, "ap_reranked": None},
    }
    assert (rows[1]["ap"], rows[1]["best_match"], rows[1]["best_match_cosine"]) == (1 / 5, "g6", 0.1)
    assert math.isnan(rows[2]["ap"])
    assert (rows[2]["first_rank"], rows[2]["matches"], rows[2]["best_match"]) == (None, 0, "")
    again = next(
        query_rows(QUERY, GALLERY, matches, plain, evaluate(QUERY, GALLERY, scores=lambda part: -scores(part)))
    )
    assert again[-1] == pytest.approx((1 / 2 + 2 / 3) / 2)  # backwards: g6 g4 g2 g3 g1, matches at 2 and 3


def scores(part: slice) -> np.ndarray:
    return QUERY.features[part] @ GALLERY.features.T


def test_pairs_of_cameras_by_hand():
    matches = matching(QUERY, GALLERY, DROP)
    assert by_cameras(QUERY, GALLERY, matches, DROP) == [
        # in camera 1: g1 g2 g3, the match at 2; in camera 2: g4 alone; q1 in camera 0: g0 g6
        {"query": 0, "gallery": 1, "queries": 1, "mAP": 1 / 2},
        {"query": 0, "gallery": 2, "queries": 1, "mAP": 1.0},
        {"query": 1, "gallery": 0, "queries": 1, "mAP": 1 / 2},
    ]


@pytest.mark.parametrize("protocol", [DROP, KEEP], ids=["drop", "keep"])
def test_pairs_of_cameras_against_the_definition(protocol):
    rng = np.random.default_rng(0)
    pids, camids = rng.integers(-1, 6, 80), rng.integers(0, 4, 80)
    camids[:5] = UNKNOWN
    gallery = table(rng.standard_normal((80, 4)), pids, camids)
    query = table(rng.standard_normal((30, 4)), rng.integers(1, 7, 30), rng.integers(0, 4, 30), "q")
    if protocol is KEEP:
        query = taken(gallery, np.arange(30))  # the queries lie in the gallery
    found = by_cameras(query, gallery, matching(query, gallery, protocol), protocol)
    whole = {}
    for a in range(4):
        for b in range(4):
            ones, there = taken(query, query.camids == a), taken(gallery, gallery.camids == b)
            if any(len(rows) for rows in matching(ones, there, protocol)):
                whole[a, b] = evaluate(ones, there, protocol).mAP
    assert {(pair["query"], pair["gallery"]): pair["mAP"] for pair in found} == pytest.approx(whole)
    assert any(a == b for a, b in whole) == (protocol is KEEP)


def test_without_cameras_there_are_no_pairs():
    query, gallery = (table(t.features[:, 0], t.pids, np.full(len(t), UNKNOWN), "x") for t in (QUERY, GALLERY))
    assert by_cameras(query, gallery, matching(query, gallery, KEEP), KEEP) == []


def test_queries_from_best_to_worst():
    gallery = table(np.eye(6), [1, 2, 3, 4, 5, 6], [1] * 6)
    query = table(np.eye(6)[[0, 1, 2, 3, 5, 5]], [1, 2, 3, 4, 5, 9], [0] * 6, "q")
    retrieval = evaluate(query, gallery)  # q4 has the wrong answer first, q5 no match
    assert spread(retrieval, 2) == [0, 4]
    assert spread(retrieval, 99) == [0, 1, 2, 3, 4]


def test_nearest_names_every_image():
    found = nearest(QUERY, GALLERY, 2)
    assert list(found) == ["q0", "q1", "q2"]
    assert found["q0"] == [{"key": "g5", "cosine": 0.95}, {"key": "g0", "cosine": 0.9}]
