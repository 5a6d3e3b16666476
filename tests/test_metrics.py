"""Metrics against numbers worked out by hand and against a plain evaluator that sorts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics import GalleryLabels, evaluate, rank_matches, summarise
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN


def table(features, pids, camids) -> EmbeddingTable:
    features = np.asarray(features, np.float32)
    keys = [f"k{i}" for i in range(len(features))]
    return EmbeddingTable(features, np.asarray(pids, np.int64), np.asarray(camids, np.int64), keys)


def scored(scores, pid, camid, pids, camids):
    """A one-dimensional set in which the one query's scores are `scores`."""
    return table([[1.0]], [pid], [camid]), table(np.asarray(scores)[:, None], pids, camids)


def by_sorting(query, gallery, max_rank):
    """The textbook: sort, filter, walk. Python floats and integers only."""
    aps, inps, curves = [], [], []
    for feature, pid, camid in zip(query.features, query.pids, query.camids, strict=True):
        scores = [float(np.dot(feature, other)) for other in gallery.features]
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
        kept = [
            row
            for row in order
            if gallery.pids[row] != -1 and not (gallery.pids[row] == pid and gallery.camids[row] == camid)
        ]
        right = [pid > 0 and gallery.pids[row] == pid for row in kept]
        if not any(right):
            aps.append(float("nan"))
            continue
        hits, precisions, last = 0, [], 0
        for rank, good in enumerate(right, start=1):
            if good:
                hits, last = hits + 1, rank
                precisions.append(hits / rank)
        aps.append(sum(precisions) / hits)
        inps.append(hits / last)
        curves.append([1.0 if any(right[:k]) else 0.0 for k in range(1, max_rank + 1)])
    return aps, inps, curves


def test_one_query_by_hand():
    # kept order: wrong, right, wrong (distractor), right -> ranks 2 and 4; row 0 is the same camera, row 5 junk
    scores = [0.99, 0.9, 0.8, 0.7, 0.6, 0.95]
    result = evaluate(*scored(scores, 1, 0, pids=[1, 2, 1, 0, 1, -1], camids=[0, 1, 1, 1, 2, 1]), max_rank=4)
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-15)
    assert result.mINP == pytest.approx(2 / 4, abs=1e-15)
    np.testing.assert_array_equal(result.cmc, [0, 1, 1, 1])
    assert (result.rank1, result.rank5, result.valid, result.skipped) == (0.0, 1.0, 1, 0)


def test_same_person_same_camera_is_neither_right_nor_wrong():
    seen = scored([0.9, 0.5], 1, 0, pids=[1, 1], camids=[0, 1])
    assert evaluate(*seen).mAP == 1.0
    other = scored([0.9, 0.5], 1, 0, pids=[2, 1], camids=[0, 1])  # another person on the query's camera stays
    assert evaluate(*other).mAP == 0.5


def test_equal_scores_keep_gallery_order():
    scores = [0.5, 0.5, 0.5, 0.5]
    # matches in rows 1 and 3 -> ranks 2 and 4
    assert evaluate(*scored(scores, 1, 0, [2, 1, 2, 1], [1, 1, 1, 1])).mAP == 0.5
    # matches in rows 0 and 1 -> ranks 1 and 2
    assert evaluate(*scored(scores, 1, 0, [1, 1, 2, 2], [1, 1, 1, 1])).mAP == 1.0
    # junk in front of the match does not push it back
    assert evaluate(*scored(scores, 1, 0, [-1, 1, 1, 2], [1, 0, 1, 1])).mAP == 1.0


def test_skipped_queries_do_not_enter_the_mean():
    query = table([[1.0], [1.0], [1.0]], [1, 7, UNKNOWN], [0, 0, 0])
    gallery = table([[0.9], [0.8], [0.7]], [2, 1, UNKNOWN], [1, 1, 1])
    result = evaluate(query, gallery)
    assert (result.valid, result.skipped) == (1, 2)
    assert result.mAP == 0.5
    np.testing.assert_array_equal(result.ap, [0.5, np.nan, np.nan])


def test_curve_is_longer_than_the_gallery():
    result = evaluate(*scored([0.9, 0.8], 1, 0, [2, 1], [1, 1]), max_rank=5)
    np.testing.assert_array_equal(result.cmc, [0, 1, 1, 1, 1])
    beyond = summarise([np.array([7])], max_rank=5)
    np.testing.assert_array_equal(beyond.cmc, np.zeros(5))
    assert beyond.rank10 == 0.0  # not stored: the last stored value


def test_several_queries_by_hand():
    # ranks {1, 3}, {2}, {4} -> AP (1 + 2/3)/2, 1/2, 1/4; INP 2/3, 1/2, 1/4
    result = summarise([np.array([1, 3]), np.array([2]), np.array([], int), np.array([4])], max_rank=3)
    assert result.mAP == pytest.approx((5 / 6 + 1 / 2 + 1 / 4) / 3, abs=1e-15)
    assert result.mINP == pytest.approx((2 / 3 + 1 / 2 + 1 / 4) / 3, abs=1e-15)
    np.testing.assert_allclose(result.cmc, [1 / 3, 2 / 3, 2 / 3], rtol=0, atol=1e-15)
    assert (result.valid, result.skipped) == (3, 1)


def test_all_skipped_is_an_error_with_a_reason():
    with pytest.raises(UserError, match="another camera"):
        evaluate(*scored([0.9], 1, 0, [1], [0]))  # one camera only
    with pytest.raises(UserError, match="none of the 1 queries"):
        evaluate(*scored([0.9], 1, 0, [2], [1]))  # no match
    with pytest.raises(UserError, match="no camera labels"):
        evaluate(*scored([0.9], 1, UNKNOWN, [1], [UNKNOWN]))


def test_bad_tables_are_refused():
    with pytest.raises(UserError, match=r"not finite.*'k1'"):
        evaluate(*scored([0.9, np.nan], 1, 0, [1, 2], [1, 1]))
    with pytest.raises(UserError, match="1 dimensions and gallery features 2"):
        evaluate(table([[1.0]], [1], [0]), table([[1.0, 2.0]], [1], [1]))
    with pytest.raises(UserError, match="gallery table is empty"):
        evaluate(table([[1.0]], [1], [0]), table(np.empty((0, 1)), [], []))


@st.composite
def searches(draw):
    """Small integer features: scores are exact in float32 and often equal."""
    dim = draw(st.integers(1, 3))
    cameras = draw(st.integers(1, 3))

    def one(rows, pids):
        cells = draw(st.lists(st.integers(-2, 2), min_size=rows * dim, max_size=rows * dim))
        features = np.array(cells, np.float32).reshape(rows, dim)
        labels = draw(st.lists(st.sampled_from(pids), min_size=rows, max_size=rows))
        seen = draw(st.lists(st.integers(0, cameras - 1), min_size=rows, max_size=rows))
        return table(features, labels, seen)

    query = one(draw(st.integers(1, 5)), [1, 2, 3, 0, -1, UNKNOWN])
    gallery = one(draw(st.integers(1, 25)), [1, 1, 2, 3, 4, 0, -1, UNKNOWN])
    return query, gallery, draw(st.integers(1, 30)), draw(st.integers(1, 6))


@settings(max_examples=300, deadline=None)
@given(searches())
def test_equals_sorting(search):
    query, gallery, max_rank, chunk = search
    aps, inps, curves = by_sorting(query, gallery, max_rank)
    if not inps:
        with pytest.raises(UserError, match="none of the"):
            evaluate(query, gallery, max_rank, chunk)
        return
    result = evaluate(query, gallery, max_rank, chunk)
    np.testing.assert_allclose(result.ap, aps, rtol=0, atol=1e-12)
    assert result.mAP == pytest.approx(np.nanmean(aps), abs=1e-12)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-12)
    np.testing.assert_allclose(result.cmc, np.mean(curves, axis=0), rtol=0, atol=1e-12)
    assert (result.valid, result.skipped) == (len(inps), len(aps) - len(inps))


def test_gallery_order_does_not_matter_without_ties():
    rng = np.random.default_rng(3)
    scores = rng.permutation(40 * 300).reshape(40, 300).astype(np.float32)  # all different, exact in float32
    pids, camids = rng.integers(-1, 12, 300), rng.integers(0, 4, 300)
    query_pids, query_camids = rng.integers(1, 12, 40), rng.integers(0, 4, 40)
    plain = rank_matches(scores, query_pids, query_camids, GalleryLabels(pids, camids))
    order = rng.permutation(300)
    moved = rank_matches(scores[:, order], query_pids, query_camids, GalleryLabels(pids[order], camids[order]))
    assert sum(map(len, plain)) > 400
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_are_left_as_they_were():
    scores = np.array([[3.0, 2.0, 1.0]], np.float32)
    rank_matches(scores, np.array([1]), np.array([0]), GalleryLabels(np.array([1, -1, 1]), np.array([0, 0, 1])))
    np.testing.assert_array_equal(scores, [[3.0, 2.0, 1.0]])


def test_numbers_differ_by_one_unit_in_the_last_place_are_not_ties():
    below, above = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    assert evaluate(*scored([below, above], 1, 0, [2, 1], [1, 1])).mAP == 1.0
    assert evaluate(*scored([above, below], 1, 0, [2, 1], [1, 1])).mAP == 0.5
