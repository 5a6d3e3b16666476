"""Accept rates, open-set identification and calibration against counted pairs and known distributions."""

import math

import brute_force
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics import Protocol
from finetune.open_set import OpenSet, take_out
from finetune.pair_counts import CELLS, LAST, LEFT_OUT, Pairs, cells, edge
from finetune.verification import Calibration, calibrate, calibration_of, fit_logistic, verify
from recipes.errors import UserError
from recipes.load import validate
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

# unit vectors with few different cosines, so that equal scores are common
DIRECTIONS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1], [0.6, 0.8, 0], [0, 0.8, 0.6], [-0.8, 0, 0.6]], np.float32)


def table(features, pids, camids, name="k") -> EmbeddingTable:
    keys = [f"{name}{i}" for i in range(len(features))]
    return EmbeddingTable(np.asarray(features, np.float32), np.asarray(pids), np.asarray(camids), keys)


def people(seed: int, identities: int = 40, images: int = 12, spread: float = 0.9) -> tuple[EmbeddingTable, ...]:
    """Query and gallery of unit vectors around one centre an identity; with some distractors and junk."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((identities + 1, 16))

    def drawn(pids, name):
        features = centres[np.maximum(pids, 0)] * (pids > 0)[:, None] + spread * rng.standard_normal((len(pids), 16))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return table(features, pids, rng.integers(0, 4, len(pids)), name)

    everybody = np.arange(1, identities + 1)
    gallery = np.concatenate([np.repeat(everybody, images), np.zeros(60, int), np.full(20, -1), np.full(9, UNKNOWN)])
    return drawn(np.repeat(everybody, 3), "q"), drawn(rng.permutation(gallery), "g")


def naive(scores, threshold) -> float:
    """Share of the scores that reach the threshold."""
    return sum(score >= threshold for score in scores) / len(scores)


def test_cells_hold_what_their_edges_say():
    values = np.array([-1, -0.5, 0, 1 / CELLS, 0.3, 1], np.float32)
    neighbours = np.concatenate([values, np.nextafter(values[1:], np.float32(-2)), np.nextafter(values[:-1], 2)])
    found = cells(neighbours.astype(np.float32))
    assert found.min() == 1
    assert found.max() == LAST
    for value, cell in zip(neighbours, found, strict=True):
        assert edge(cell) <= float(np.float32(value)) < edge(cell + 1)
    assert cells(np.array([LEFT_OUT], np.float32)) == [0]


def test_pairs_by_hand():
    # cosines to the one query: same 1.0 and 0.6, different 0.8 and 0 (a distractor); junk, the same camera and an
    # unknown identity take no part
    gallery = table(
        [[1, 0], [0.6, 0.8], [0.8, 0.6], [0, 1], [1, 0], [1, 0], [1, 0]],
        [1, 1, 2, 0, -1, 1, UNKNOWN],
        [1, 1, 0, 1, 1, 0, 1],
    )
    found = verify(table([[1, 0]], [1], [0]), gallery, share=0)
    assert (found.pairs.same.sum(), found.pairs.different.sum()) == (2, 2)
    far, tar = found.pairs.rates()
    for threshold, expected in ((-1, (1, 1)), (0.5, (0.5, 1)), (0.7, (0.5, 0.5)), (0.9, (0, 0.5)), (1, (0, 0.5))):
        cell = cells(np.array([threshold], np.float32))[0]
        assert (far[cell], tar[cell]) == expected
    assert (far[-1], tar[-1]) == (0, 0)
    error, threshold = found.pairs.equal_error()
    assert error == 0.5
    assert 0.6 < threshold < 0.8
    numbers = found.numbers()
    assert numbers["tar"] == {"0.1": None, "0.01": None, "0.001": None, "0.0001": None}, "two pairs say nothing"
    assert numbers["open_set"]["dir"] == {"0.1": None, "0.01": None}
    edges, same, different = found.pairs.histogram(8)
    np.testing.assert_array_equal(edges, np.linspace(-1, 1, 9))
    np.testing.assert_array_equal(same, [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(different, [0, 0, 0, 0, 1, 0, 0, 1])


@st.composite
def searches(draw):
    """Few rows and few directions; the gallery may hold images with the keys of queries."""

    def one(rows, pids, name):
        which = draw(st.lists(st.integers(0, len(DIRECTIONS) - 1), min_size=rows, max_size=rows))
        labels = draw(st.lists(st.sampled_from(pids), min_size=rows, max_size=rows))
        return table(DIRECTIONS[which], labels, draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)), name)

    gallery = one(draw(st.integers(1, 20)), [1, 2, 3, 4, 0, -1, UNKNOWN], "k")
    return one(draw(st.integers(1, 6)), [1, 2, 3, 0, UNKNOWN], draw(st.sampled_from("kq"))), gallery


@settings(max_examples=80, deadline=None)
@given(searches(), st.sampled_from(["drop", "keep"]), st.sampled_from([0.0, 0.4, 1.0]), st.integers(1, 4))
def test_equals_counting_all_pairs(search, same_camera, share, chunk):
    query, gallery = search
    same, different = brute_force.pairs(query, gallery, same_camera)
    if not same or not different:
        with pytest.raises(UserError, match="no pair of"):
            verify(query, gallery, Protocol(same_camera=same_camera), share, chunk=chunk)
        return
    found = verify(query, gallery, Protocol(same_camera=same_camera), share, chunk=chunk)
    assert (found.pairs.same.sum(), found.pairs.different.sum()) == (len(same), len(different))
    far, tar = found.pairs.rates()
    # at edges beside the cosines that occur, of which float32 holds only a rounded value
    for cell in range(1, LAST, CELLS // 50):
        assert far[cell] == naive(different, edge(cell))
        assert tar[cell] == naive(same, edge(cell))
    removed = take_out(query.pids, share, 0)
    mated, alone = brute_force.open_set(query, gallery, removed.tolist(), same_camera)
    np.testing.assert_allclose(found.open_set.best, [float(score) for score, _ in mated], atol=1e-6)
    np.testing.assert_array_equal(found.open_set.right, [right for _, right in mated])
    np.testing.assert_allclose(found.open_set.alone, [float(score) for score in alone], atol=1e-6)


def test_thresholds_keep_their_promise():
    query, gallery = people(0)
    found = verify(query, gallery)
    scores = query.features @ gallery.features.T
    same, different = [], []
    for row, pid, camid in zip(scores, query.pids, query.camids, strict=True):
        person = gallery.pids == pid
        same += row[person & (gallery.camids != camid)].tolist()
        different += row[~person & (gallery.pids >= 0)].tolist()
    numbers = found.numbers()
    assert (numbers["same_pairs"], numbers["different_pairs"]) == (len(same), len(different))
    for far, told in numbers["tar"].items():
        if float(far) * len(different) < 10:
            assert told is None
            continue
        assert told["far"] == naive(different, told["threshold"]) <= float(far)
        assert told["tar"] == naive(same, told["threshold"])
        assert naive(different, told["threshold"] - 1 / CELLS) > float(far), "a lower threshold would do"
    assert numbers["tar"]["0.001"]["tar"] < numbers["tar"]["0.01"]["tar"] < numbers["tar"]["0.1"]["tar"] < 1
    assert numbers["tar"]["0.0001"] is None
    error = (naive(different, numbers["eer_threshold"]) + 1 - naive(same, numbers["eer_threshold"])) / 2
    assert numbers["eer"] == pytest.approx(error, abs=1e-12)
    thresholds, false, true = np.array(numbers["roc"]).T
    assert (np.diff(thresholds) > 0).all()
    assert (np.diff(false) <= 0).all()
    assert (np.diff(true) <= 0).all()
    assert false[0] == 1
    assert false[-1] <= 1 / len(different)


def test_the_chunks_do_not_change_a_number():
    whole, pieces = (verify(*people(1), chunk=chunk) for chunk in (None, 7))
    # the product of a matrix may round differently in another shape, and a cosine may lie on an edge
    assert np.abs(np.cumsum(whole.pairs.different - pieces.pairs.different)).max() <= 2
    np.testing.assert_allclose(whole.open_set.alone, pieces.open_set.alone, atol=1e-6)
    assert whole.open_set.right.mean() == pieces.open_set.right.mean()


def test_open_set_by_hand():
    alone = np.linspace(0, 0.5, 101, dtype=np.float32)[:100]
    best, right = np.array([0.9, 0.46, 0.3, 0.95], np.float32), np.array([True, True, True, False])
    point = OpenSet(0.5, 0, best, right, alone).at(0.1)
    assert point.far == 0.1, "ten of a hundred"
    assert point.threshold == pytest.approx(0.445, abs=1e-6)
    assert point.rate == 2 / 4
    assert OpenSet(0.5, 0, best, right, alone).at(0.09) is None
    equals = OpenSet(0.5, 0, best, right, np.full(100, 0.46, np.float32)).at(0.1)
    assert (equals.far, equals.rate) == (0, 1 / 4), "all or none of equal scores are accepted"
    assert OpenSet(0.5, 0, best, right, alone).at(1.0).rate == 3 / 4


def test_the_open_set_takes_out_people_by_seed():
    pids = np.repeat([5, 7, 9, 11, 0, UNKNOWN], 3)
    assert len(take_out(pids, 0.5, 0)) == 2
    assert set(take_out(pids, 1.0, 0)) == {5, 7, 9, 11}
    assert not len(take_out(pids, 0.0, 0))
    assert len({tuple(take_out(pids, 0.5, seed)) for seed in range(20)}) > 3
    found = verify(*people(2), share=0.3, seed=4)
    numbers = found.numbers()["open_set"]
    assert (numbers["known_queries"], numbers["unknown_queries"]) == (28 * 3, 12 * 3)
    assert numbers["dir"]["0.1"] is None, "3.6 false alarms are too few"
    assert verify(*people(2), share=0.9).numbers()["open_set"]["dir"]["0.1"]["dir"] > 0.2


def normal_pairs(same: float, different: float, sigma: float, count: float = 1e9) -> Pairs:
    """Expected counts of cosines from two normal distributions."""
    edges = (np.arange(1, LAST + 2) - 1) / CELLS - 1

    def counts(mean):
        below = np.array([0.5 * math.erfc((mean - x) / (sigma * math.sqrt(2))) for x in edges[::64]])
        spread = np.zeros(LAST + 1)
        spread[1 + 32 : 1 + 32 + 64 * (len(below) - 1) : 64] = np.diff(below)
        return np.round(count * spread).astype(np.int64)

    return Pairs(counts(same), counts(different))


def test_the_logistic_fit_finds_the_log_likelihood_ratio():
    # of two normal distributions of one width it is linear: (a - b) x / s^2 - (a^2 - b^2) / (2 s^2)
    pairs = normal_pairs(0.5, 0.1, 0.12)
    slope, intercept = fit_logistic(pairs, 0.5)
    assert slope == pytest.approx(0.4 / 0.12**2, rel=1e-3)
    assert intercept == pytest.approx(-(0.25 - 0.01) / (2 * 0.12**2), rel=1e-3)
    rare, shifted = fit_logistic(pairs, 0.01)
    assert rare == pytest.approx(slope, rel=1e-3)
    assert shifted == pytest.approx(intercept + math.log(0.01 / 0.99), rel=1e-3)


def test_a_calibration_says_what_a_cosine_means():
    pairs = normal_pairs(0.5, 0.1, 0.12)
    found = calibration_of(pairs, "two bells", far=1e-3)
    assert found.threshold == pytest.approx(0.1 + 3.0902 * 0.12, abs=1e-3)
    assert found.far <= found.asked_far == 1e-3
    assert found.tar == pytest.approx(0.5 * math.erfc((found.threshold - 0.5) / (0.12 * math.sqrt(2))), abs=1e-3)
    assert found.probability(0.3) == pytest.approx(0.5, abs=1e-3), "halfway"
    assert found.probability(0.3, prior=0.01) == pytest.approx(0.01, abs=1e-4)
    np.testing.assert_array_equal(found.same(np.array([found.threshold, found.threshold - 1e-9])), [True, False])
    assert (np.diff(found.probability(np.linspace(-1, 1, 50))) >= 0).all()
    assert validate(Calibration, found.model_dump(mode="json"), "config.json") == found


def test_people_who_are_far_apart_get_a_finite_slope():
    found = calibrate(*people(3, spread=0.02), far=1e-2, title="apart")
    assert found.tar == 1
    assert 10 < found.slope < 1e5
    assert found.probability(0.99) > 0.99 > 0.01 > found.probability(0.4)


def test_probabilities_hold_on_other_people():
    found = calibrate(*people(4, identities=120), far=1e-2, title="some", prior=0.2)
    other = verify(*people(5, identities=120)).pairs
    middles = (np.arange(LAST + 1) - 0.5) / CELLS - 1
    weights = 0.2 * other.same / other.same.sum(), 0.8 * other.different / other.different.sum()
    probability = found.probability(middles)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (probability >= low) & (probability < low + 0.2)
        same, different = (weight[inside].sum() for weight in weights)
        assert same / (same + different) == pytest.approx(low + 0.1, abs=0.15)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(UserError, match=r"small has 63360 pairs of different people.*use a set with 100000.*at least"):
        calibrate(*people(0), far=1e-4, title="small")
    pairs = normal_pairs(0.1, 0.5, 0.12)
    with pytest.raises(UserError, match="no nearer to each other"):
        calibration_of(pairs, "upside down")
    query, gallery = people(0)
    longer = EmbeddingTable(2 * query.features, query.pids, query.camids, query.keys)
    with pytest.raises(UserError, match=r"query feature of 'q0' has length 2; .*L2-normalise"):
        verify(longer, gallery)
    with pytest.raises(UserError, match="no camera labels"):
        verify(*(EmbeddingTable(t.features, t.pids, np.full(len(t), UNKNOWN), t.keys) for t in (query, gallery)))
