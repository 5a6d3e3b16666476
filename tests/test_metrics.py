"""Metrics against numbers worked out by hand and against the rules in plain Python and fractions."""

import json
import subprocess
import sys
from fractions import Fraction

import brute_force
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import metrics
from finetune.metrics import GalleryLabels, Protocol, evaluate, rank_matches, summarise
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


@pytest.mark.row("R24")
def test_equal_scores_keep_gallery_order():
    scores = [0.5, 0.5, 0.5, 0.5]
    # matches in rows 1 and 3 -> ranks 2 and 4
    assert evaluate(*scored(scores, 1, 0, [2, 1, 2, 1], [1, 1, 1, 1])).mAP == 0.5
    # matches in rows 0 and 1 -> ranks 1 and 2
    assert evaluate(*scored(scores, 1, 0, [1, 1, 2, 2], [1, 1, 1, 1])).mAP == 1.0
    # junk in front of the match does not push it back
    assert evaluate(*scored(scores, 1, 0, [-1, 1, 1, 2], [1, 0, 1, 1])).mAP == 1.0


@pytest.mark.row("R24")
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
    np.testing.assert_array_equal(result.first, [1, 2, 0, 4])
    np.testing.assert_array_equal(result.matches, [2, 1, 0, 1])
    np.testing.assert_array_equal(result.inp, [2 / 3, 1 / 2, np.nan, 1 / 4])


@pytest.mark.row("R24")
def test_all_skipped_is_an_error_with_a_reason():
    with pytest.raises(UserError, match="another camera"):
        evaluate(*scored([0.9], 1, 0, [1], [0]))  # one camera only
    with pytest.raises(UserError, match="none of the 1 queries"):
        evaluate(*scored([0.9], 1, 0, [2], [1]))  # no match
    with pytest.raises(UserError, match=r"no camera labels.*same_camera=keep"):
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
    """Small integer features: scores are exact in float32 and often equal. Some queries are in the gallery."""
    dim = draw(st.integers(1, 3))
    cameras = draw(st.integers(1, 3))

    def one(rows, pids, keys):
        cells = draw(st.lists(st.integers(-2, 2), min_size=rows * dim, max_size=rows * dim))
        features = np.array(cells, np.float32).reshape(rows, dim)
        labels = draw(st.lists(st.sampled_from(pids), min_size=rows, max_size=rows))
        seen = draw(st.lists(st.integers(0, cameras - 1), min_size=rows, max_size=rows))
        return EmbeddingTable(features, np.array(labels), np.array(seen), keys)

    queries, images = draw(st.integers(1, 5)), draw(st.integers(1, 25))
    shared = draw(st.integers(0, queries))
    keys = [*(f"gallery-{i}" for i in range(shared)), *(f"q{i}" for i in range(queries - shared))]
    query = one(queries, [1, 2, 3, 0, -1, UNKNOWN], keys)
    names = draw(st.permutations([f"gallery-{i}" for i in range(images)]))
    return query, one(images, [1, 1, 2, 3, 4, 0, -1, UNKNOWN], names)


@pytest.mark.parametrize("many", [0, 2, 1000], ids=["sort", "either", "passes"])
@settings(max_examples=120, deadline=None)
@given(searches(), st.sampled_from(["drop", "keep"]), st.integers(1, 30), st.integers(1, 6))
@pytest.mark.row("R24")
def test_equals_the_rules_in_fractions(many, search, same_camera, max_rank, chunk):
    query, gallery = search
    expected = brute_force.search(query, gallery, max_rank, same_camera)
    counted = [one for one in expected if one]
    protocol = Protocol(same_camera=same_camera)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "MANY", many)
        if not counted:
            with pytest.raises(UserError, match="none of the"):
                evaluate(query, gallery, protocol, max_rank, chunk)
            return
        result = evaluate(query, gallery, protocol, max_rank, chunk)
    for name, skipped in (("ap", np.nan), ("inp", np.nan), ("first", 0), ("matches", 0)):
        exact = [float(one[name]) if one else skipped for one in expected]
        np.testing.assert_allclose(getattr(result, name), exact, rtol=0, atol=1e-12, err_msg=name)
    assert result.mAP == pytest.approx(float(sum(one["ap"] for one in counted) / len(counted)), abs=1e-12)
    assert result.mINP == pytest.approx(float(sum(one["inp"] for one in counted) / len(counted)), abs=1e-12)
    curve = [Fraction(sum(hits), len(counted)) for hits in zip(*(one["curve"] for one in counted), strict=True)]
    np.testing.assert_allclose(result.cmc, [float(share) for share in curve], rtol=0, atol=1e-12)
    assert (result.valid, result.skipped) == (len(counted), len(expected) - len(counted))


def test_the_slow_evaluator_by_hand():
    # kept: rows 1 (right), 2 (wrong), 3 (wrong, distractor), 0 (right); row 4 is the same camera, row 5 junk
    seen = scored([1, 4, 3, 2, 5, 6], 1, 0, [1, 1, 2, 0, 1, -1], [1, 1, 1, 1, 0, 1])
    [one] = brute_force.search(*seen, max_rank=2)
    assert one == {"ap": Fraction(3, 4), "inp": Fraction(1, 2), "first": 1, "matches": 2, "curve": [1, 1]}
    [one] = brute_force.search(*seen, max_rank=2, same_camera="keep")
    # row 0 has the query's key and is left out; row 4 counts
    assert one == {"ap": 1, "inp": 1, "first": 1, "matches": 2, "curve": [1, 1]}


def test_without_cameras_only_the_query_image_is_left_out():
    query, gallery = scored([0.9, 0.8, 0.7], 1, UNKNOWN, [2, 1, 1], [UNKNOWN] * 3)
    keep = Protocol(same_camera="keep")
    apart = EmbeddingTable(query.features, query.pids, query.camids, ["another image"])
    result = evaluate(apart, gallery, keep)
    assert (result.mAP, result.matches[0]) == (pytest.approx((1 / 2 + 2 / 3) / 2), 2)
    itself = EmbeddingTable(query.features, query.pids, query.camids, ["k1"])  # the key of gallery row 1
    result = evaluate(itself, gallery, keep)
    assert (result.mAP, result.matches[0]) == (0.5, 1)
    alone = EmbeddingTable(query.features, query.pids, query.camids, ["k0"])  # row 0: labelled as somebody else
    assert evaluate(alone, gallery, keep).mAP == 1.0


def test_own_rows_are_found_by_key():
    many = table(np.zeros((4, 1)), [1] * 4, [0] * 4)  # k0 .. k3
    asked = EmbeddingTable(np.zeros((3, 1), np.float32), *np.ones((2, 3), np.int64), ["k3", "a longer key", "k1"])
    np.testing.assert_array_equal(metrics.own_rows(asked, many), [3, -1, 1])


def test_other_scores_take_the_place_of_the_product():
    query, gallery = scored([0.9, 0.1, 0.5], 1, 0, [2, 1, 3], [1, 1, 1])
    asked = []

    def scores(part):
        asked.append(part)
        return -(query.features[part] @ gallery.features.T)

    assert evaluate(query, gallery).mAP == pytest.approx(1 / 3)
    assert evaluate(query, gallery, scores=scores).mAP == 1.0
    assert asked == [slice(0, 1)]
    with pytest.raises(AssertionError, match="not finite"):
        evaluate(query, gallery, scores=lambda part: np.full((1, 3), np.nan, np.float32))


@pytest.mark.row("R24")
def test_the_order_of_the_queries_does_not_matter():
    rng = np.random.default_rng(5)
    query = table(rng.integers(-3, 4, (37, 4)), rng.integers(1, 8, 37), rng.integers(0, 3, 37))
    gallery = table(rng.integers(-3, 4, (90, 4)), rng.integers(-1, 8, 90), rng.integers(0, 3, 90))
    order = rng.permutation(37)
    moved = EmbeddingTable(query.features[order], query.pids[order], query.camids[order], query.keys[order])
    plain, other = evaluate(query, gallery, chunk=5), evaluate(moved, gallery)
    for name in ("ap", "inp", "first", "matches"):
        np.testing.assert_array_equal(getattr(plain, name)[order], getattr(other, name))
    np.testing.assert_array_equal(plain.cmc, other.cmc)
    assert plain.mAP == pytest.approx(other.mAP, abs=1e-15)


def test_threads_do_not_change_a_number(monkeypatch):
    rng = np.random.default_rng(6)
    query = table(rng.standard_normal((23, 8)), rng.integers(1, 5, 23), rng.integers(0, 3, 23))
    gallery = table(rng.standard_normal((300, 8)), rng.integers(-1, 5, 300), rng.integers(0, 3, 300))
    found = []
    for count in ("1", "3", "64"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        assert metrics.threads() == int(count)
        found.append(evaluate(query, gallery, chunk=9))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].ap, other.ap)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert metrics.threads() >= 1


def test_half_precision_tables_are_ranked_in_single_precision():
    rng = np.random.default_rng(7)
    features = rng.standard_normal((300, 16)).astype(np.float16)
    pids, camids = rng.integers(1, 5, 300), rng.integers(0, 3, 300)
    half, single = (
        [EmbeddingTable(x[a:b], pids[a:b], camids[a:b], [f"{i}" for i in range(a, b)]) for a, b in ((0, 9), (9, 300))]
        for x in (features, features.astype(np.float32))
    )
    np.testing.assert_array_equal(evaluate(*half).ap, evaluate(*single).ap)


def test_the_meter_counts_queries():
    class Counter:
        done = 0

        def advance(self, units):
            self.done += units

    counter = Counter()
    rng = np.random.default_rng(8)
    query = table(rng.standard_normal((7, 2)), [1] * 7, [0] * 7)
    evaluate(query, table([[1.0, 0.0]], [1], [1]), chunk=3, meter=counter)
    assert counter.done == 7


def test_the_protocol_says_its_rules():
    assert "on its camera are left out" in Protocol().rules()
    assert "only the query image itself" in Protocol(same_camera="keep").rules()
    for protocol in (Protocol(), Protocol(same_camera="keep")):
        assert "junk (pid -1) is left out; distractors (pid 0) count as wrong" in protocol.rules()


@pytest.mark.row("R24")
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


def test_the_bench_compares_and_tells(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    size = ["--queries", "60", "--gallery", "400", "--identities", "20", "--textbook-queries", "30", "--checked", "40"]
    command = [sys.executable, str(small.ROOT / "bench" / "ranking.py"), *size, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["name"], told["size"], told["textbook_queries"]) == ("ranking", "60 x 400 x 384", 30)
    assert told["above_features_mb"] < 1024
    assert told["ratio"] == pytest.approx(told["textbook"] / told["ours"], rel=0.5)  # both are rounded
