"""k-reciprocal re-ranking equals its definition, written with loops and sets over dense matrices."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import rerank
from finetune.metrics import evaluate
from finetune.rerank import RerankConfig, Reranked, jaccard
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable

SEARCH = RerankConfig(k1=6, k2=3, lam=0.3)


def unit(seed: int, count: int, dim: int = 8) -> np.ndarray:
    """Features in a few crowds, so that neighbourhoods overlap; no two distances are equal."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(2, count // 6), dim))
    features = centres[rng.integers(len(centres), size=count)] + 0.5 * rng.standard_normal((count, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def dense_overlaps(features: np.ndarray, config: RerankConfig) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances as the variant has them, and 1 - Jaccard distance, both float64 [N, N]."""
    features = features.astype(np.float64)
    distances = 2 - 2 * features @ features.T
    count, search = len(features), config.variant == "search"
    order = np.argsort(distances, axis=1)
    if search:
        distances = distances / distances.max(axis=1, keepdims=True)
    k1 = config.k1 + 1 if search else config.k1
    half = int(np.around(config.k1 / 2)) + 1

    def mutual(row: int, k: int) -> set[int]:
        """Neighbours of `row` that have it among their own k first."""
        return {int(other) for other in order[row, :k] if row in order[other, :k]}

    vectors = np.zeros((count, count))
    for row in range(count):
        own = mutual(row, k1)
        grown = set(own)
        for other in own:
            theirs = mutual(other, min(half, k1))
            if len(theirs & own) > 2 / 3 * len(theirs):
                grown |= theirs
        columns = sorted(grown)
        weight = np.exp(-distances[row, columns])
        vectors[row, columns] = weight / weight.sum()
    vectors = np.stack([vectors[order[row, : config.k2]].mean(axis=0) for row in range(count)])
    smaller = np.stack([np.minimum(row, vectors).sum(axis=1) for row in vectors])
    return distances, smaller / (2 - smaller)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(24, 60),
    k1=st.integers(1, 12),
    k2=st.integers(1, 6),
    lam=st.sampled_from([0.0, 0.3, 1.0]),
    variant=st.sampled_from(["search", "clustering"]),
    tile=st.sampled_from([1, 16, 64]),
)
def test_it_is_the_dense_definition(seed, count, k1, k2, lam, variant, tile):
    config = RerankConfig(k1=k1, k2=min(k2, k1), lam=lam, variant=variant)
    features, queries = unit(seed, count), count // 3
    distances, overlaps = dense_overlaps(features, config)
    final = (1 - lam) * (1 - overlaps) + lam * distances
    with mock.patch.object(rerank, "TILE", tile):
        np.testing.assert_allclose(jaccard(features, config).toarray(), overlaps, atol=1e-5)
        found = Reranked(features[:queries], features[queries:], config)
    scores = np.concatenate([found.scores(slice(0, 5)), found.scores(slice(5, queries))])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(-scores, final[:queries, queries:], atol=1e-5)


def test_small_blocks_change_nothing(monkeypatch):
    features = unit(1, 70)
    whole, again = jaccard(features, SEARCH).toarray(), Reranked(features[:20], features[20:], SEARCH)
    scores = again.scores(slice(0, 20))
    monkeypatch.setattr(rerank, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(rerank, "TILE", 17)
    monkeypatch.setattr(rerank, "SUM_BYTES", 3000)
    np.testing.assert_allclose(jaccard(features, SEARCH).toarray(), whole, atol=1e-7)
    np.testing.assert_allclose(Reranked(features[:20], features[20:], SEARCH).scores(slice(0, 20)), scores, atol=1e-6)


def test_nearest_rows_and_largest_distances_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(rerank, "TILE", 20)
    features = unit(2, 130)
    rows, largest = rerank.neighbourhoods(features, 17)
    distances = 2 - 2 * features @ features.T
    assert rows.tolist() == np.argsort(distances, axis=1)[:, :17].tolist()
    np.testing.assert_allclose(largest, distances.max(axis=1), atol=1e-6)


def test_a_popular_neighbour_costs_no_memory(monkeypatch):
    """All have image 0 among their nearest: pairs in one piece would be the square of the images."""
    rng = np.random.default_rng(0)
    features = np.concatenate([np.eye(1, 32), 0.7 * np.eye(1, 32) + 0.2 * rng.standard_normal((600, 32))])
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    found = Reranked(features[:300], features[300:], RerankConfig(k1=20, k2=6))
    whole, sizes, pairs = found.scores(slice(0, 300)), [], rerank.Overlaps.pairs
    monkeypatch.setattr(rerank, "SUM_BYTES", 100_000)
    monkeypatch.setattr(rerank.Overlaps, "pairs", lambda self, part: sizes.append(pairs(self, part)) or sizes[-1])
    np.testing.assert_allclose(found.scores(slice(0, 300)), whole, atol=1e-6)
    dearest = found.overlaps.costs.max()
    assert found.overlaps.costs.sum() > 20 * dearest
    assert max(len(owners) for owners, *_ in sizes) <= max(dearest, 100_000 // rerank.PAIR_BYTES)


def test_mutual_neighbours_by_hand():
    """On a line 0, 1, 3, 7: with one neighbour each, 0 and 1 are mutual; 3's nearest is 1, whose nearest is 0."""
    rows = np.array([[0, 1], [1, 0], [2, 1], [3, 2]])
    assert rerank._mutual(rows).toarray().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_it_helps_where_people_form_crowds():
    """As metrics.evaluate uses it: 40 people, 6 noisy images each on two cameras."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, 41), 6)
    features = rng.standard_normal((41, 32))[pids] + 1.1 * rng.standard_normal((240, 32))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    camids, query = np.tile([0, 1], 120), np.arange(240) % 6 == 0

    def table(rows: np.ndarray) -> EmbeddingTable:
        return EmbeddingTable(features[rows], pids[rows], camids[rows], [str(row) for row in np.flatnonzero(rows)])

    mine, others = table(query), table(~query)
    again = Reranked(mine.features, others.features, RerankConfig(k1=6, k2=3))
    plain, better = evaluate(mine, others), evaluate(mine, others, scores=again.scores)
    assert plain.mAP > 0.5
    assert better.mAP > plain.mAP + 0.05
    alone = Reranked(mine.features, others.features, RerankConfig(k1=6, k2=3, lam=1.0))
    assert evaluate(mine, others, scores=alone.scores).mAP == pytest.approx(plain.mAP, abs=1e-3)


def test_equal_images_in_a_row():
    features = np.repeat(unit(3, 4), 9, axis=0)  # more equal ones than k1
    found = jaccard(features, RerankConfig(k1=4, k2=2)).toarray()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-5)
    others = unit(3, 4)
    again = Reranked(others, features, RerankConfig(k1=4, k2=2)).scores(slice(0, 4))
    assert (again.argmax(axis=1) // 9 == np.arange(4)).all()


@pytest.mark.parametrize(
    ("query", "gallery", "k1", "told"),
    [
        (unit(0, 3), unit(1, 4), 7, "8 neighbours of 7 images; set rerank.k1 and rerank.k2 lower"),
        (2 * unit(0, 3), unit(1, 9), 2, "query row 0 has length 2"),
        (unit(0, 3), np.full((9, 8), np.nan, np.float32), 2, "gallery row 0 has length nan"),
    ],
    ids=["few", "length", "nan"],
)
def test_what_cannot_be_reranked_is_told(query, gallery, k1, told):
    with pytest.raises(UserError, match=told):
        Reranked(query, gallery, RerankConfig(k1=k1))
