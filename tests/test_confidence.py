"""Bootstrap intervals against the normal approximation, by hand, and over repeated draws of the queries."""

import numpy as np
import pytest

from finetune.confidence import intervals
from finetune.metrics import Retrieval, summarise

NAMES = ["mAP", "rank1", "rank5", "rank10", "mINP"]


def drawn(seed: int, queries: int = 400) -> Retrieval:
    """Queries with one to six matches at random ranks; a tenth is skipped."""
    rng = np.random.default_rng(seed)
    ranks = []
    for _ in range(queries):
        count = 0 if rng.random() < 0.1 else rng.integers(1, 7)
        ranks.append(np.sort(rng.choice(np.arange(1, 41), count, replace=False)))
    return summarise(ranks)


def test_they_are_as_wide_as_the_standard_error_says():
    found = drawn(0)
    valid = found.matches > 0
    values = {"mAP": found.ap[valid], "mINP": found.inp[valid], "rank1": found.first[valid] <= 1}
    told = intervals(found, resamples=4000)
    assert list(told) == NAMES
    for name, column in values.items():
        error = column.std() / np.sqrt(valid.sum())
        assert told[name] == pytest.approx(
            [column.mean() - 1.96 * error, column.mean() + 1.96 * error], abs=0.25 * error
        )
    for name, (low, high) in told.items():
        assert low < found.numbers()[name] < high


def test_nine_of_ten_samples_hold_the_truth():
    everybody = drawn(1, queries=20_000).mAP
    inside = 0
    for seed in range(100):
        low, high = intervals(drawn(100 + seed, queries=150), level=0.9, resamples=300)["mAP"]
        inside += low <= everybody <= high
    assert 82 <= inside <= 97


def test_they_follow_level_and_seed():
    found = drawn(2)
    assert intervals(found) == intervals(found)
    assert intervals(found) != intervals(found, seed=1)
    wide, narrow = intervals(found, level=0.99), intervals(found, level=0.5)
    for name in NAMES:
        assert wide[name][0] < narrow[name][0] < narrow[name][1] < wide[name][1]


def test_blocks_do_not_change_them(monkeypatch):
    found = drawn(3)
    whole = intervals(found, resamples=50)
    monkeypatch.setattr("finetune.confidence.BLOCK_BYTES", 1)
    for name, interval in intervals(found, resamples=50).items():
        assert interval == pytest.approx(whole[name], abs=1e-12)


def test_one_query_and_perfect_queries_have_no_width():
    one = summarise([np.array([], int), np.array([2, 3])])
    assert intervals(one)["mAP"] == pytest.approx([7 / 12, 7 / 12])
    perfect = summarise([np.array([1])] * 5)
    assert intervals(perfect) == {name: [1.0, 1.0] for name in NAMES}


def test_a_short_curve_ends_where_it_was_stored():
    short = summarise([np.array([k]) for k in (1, 2, 7)], max_rank=3)
    told = intervals(short, resamples=200)
    assert short.rank10 == pytest.approx(2 / 3)
    assert told["rank10"] == told["rank5"]
    assert told["rank10"][0] <= short.rank10 <= told["rank10"][1]
