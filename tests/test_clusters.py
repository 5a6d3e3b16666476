"""Clusters equal their definitions, written with loops; what cannot be clustered is told."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from test_rerank import dense_overlaps, unit

from finetune import clusters, rerank
from finetune.clusters import NOISE, ClustersConfig, Found, dbscan, find, majority, statistics, without_small
from finetune.rerank import RerankConfig, jaccard
from recipes.errors import UserError
from recipes.load import validate
from shards.neighbours import search

SHAPE = RerankConfig(k1=8, k2=3, variant="clustering")


def textbook(distances: np.ndarray, eps: float, min_samples: int) -> list[int]:
    """DBSCAN as its authors define it, on a dense matrix; a border image joins the first cluster that reaches it."""
    near = [np.flatnonzero(row <= eps).tolist() for row in distances]
    core, labels, number = [len(row) >= min_samples for row in near], [NOISE] * len(near), 0
    for start in range(len(near)):
        if not core[start] or labels[start] != NOISE:
            continue
        waiting = [start]
        while waiting:
            row = waiting.pop()
            if labels[row] != NOISE:
                continue
            labels[row] = number
            waiting += near[row] if core[row] else []
        number += 1
    return labels


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 40), eps=st.floats(0.05, 0.95), min_samples=st.integers(1, 6))
def test_sparse_dbscan_is_the_textbook(seed, count, eps, min_samples):
    rng = np.random.default_rng(seed)
    distances = np.triu(rng.random((count, count)), 1).astype(np.float32)
    distances[rng.random((count, count)) < 0.7] = 1
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    # a pair at distance 1 does not stand in the sparse matrix; the diagonal, at distance 0, does
    near = csr_matrix(1 - distances)
    found = dbscan(near, eps, min_samples)
    assert found.tolist() == textbook(distances, eps, min_samples)
    assert found.dtype == np.int64
    assert np.array_equal(near.toarray(), 1 - distances), "the next eps finds the same distances"


def test_a_border_image_joins_the_first_cluster():
    near = np.eye(7, dtype=np.float32)
    for one, other in [(0, 1), (1, 2), (0, 2), (4, 5), (5, 6), (4, 6), (2, 3), (3, 4)]:
        near[one, other] = near[other, one] = 0.5
    # 2 and 4 are the cores; 3 lies within eps of both
    assert dbscan(csr_matrix(near), 0.5, 4).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert textbook(1 - near, 0.5, 4) == [0, 0, 0, 0, 1, 1, 1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(30, 70), within=st.floats(0.1, 0.95))
def test_only_near_pairs_are_kept(seed, count, within):
    features = unit(seed, count)
    _, overlaps = dense_overlaps(features, SHAPE)
    wanted = np.where(1 - overlaps <= within, overlaps, 0)
    unsure = np.abs(1 - overlaps - within) < 1e-4
    found = jaccard(features, SHAPE, within).toarray()
    np.testing.assert_allclose(np.where(unsure, 0, found), np.where(unsure, 0, wanted), atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("seed", range(5))
def test_features_to_clusters_is_brute_force(seed):
    features = unit(seed, 90)
    _, overlaps = dense_overlaps(features, SHAPE)
    found = find(features, ClustersConfig(k1=8, k2=3, eps=0.6), 0)
    assert found.labels.tolist() == textbook(1 - overlaps, 0.6, 4)
    assert found.eps == 0.6
    assert found.count == len(set(found.labels[found.labels >= 0].tolist())) > 2


def test_neighbours_are_those_of_faiss():
    features = unit(7, 300, dim=16)
    ours, _ = rerank.neighbourhoods(features, 12)
    _, theirs = search(features, features, 12)
    assert np.array_equal(ours, theirs)


def test_memory_does_not_grow_with_the_square(monkeypatch):
    features, sizes = unit(3, 600, dim=32), []
    monkeypatch.setattr(rerank, "SUM_BYTES", 100_000)
    original = np.bincount

    def watched(values, weights=None, minlength=0):
        sizes.append(minlength)
        return original(values, weights, minlength)

    monkeypatch.setattr(rerank.np, "bincount", watched)
    whole = jaccard(features, SHAPE, 0.6)
    assert max(sizes) * 8 <= 100_000
    assert whole.nnz < 600 * 40


@pytest.mark.parametrize(("start", "right", "step"), [(0.5, 0.7, 1), (0.7, 0.5, -1)], ids=["all noise", "all one"])
def test_eps_goes_where_clusters_are(start, right, step, monkeypatch):
    tried = []

    def pretended(near, eps, min_samples):
        tried.append(eps)
        nothing = np.full(8, NOISE) if step > 0 else np.zeros(8, np.int64)
        return np.repeat([0, 1], 4) if (eps >= right if step > 0 else eps <= right) else nothing

    monkeypatch.setattr(clusters, "dbscan", pretended)
    found = find(unit(0, 8), ClustersConfig(k1=4, k2=2, eps=start, eps_step=0.1), 0)
    assert tried == pytest.approx([start, start + 0.1 * step, right])
    assert (found.count, found.eps) == (2, right)


def test_eps_that_is_far_too_small_is_raised():
    features, config = unit(1, 80), ClustersConfig(k1=8, k2=3, eps=0.06, eps_range=(0.05, 0.8), eps_step=0.05)
    found = find(features, config, 0)
    assert found.count > 1
    assert found.eps > 0.1
    lower = dbscan(jaccard(features, SHAPE), found.eps - 0.05, 4)
    assert lower.max() < 1, "the step before had no two clusters"
    np.testing.assert_array_equal(found.labels, dbscan(jaccard(features, SHAPE), found.eps, 4))


def test_nothing_is_found_within_the_range():
    config = ClustersConfig(k1=4, k2=2, eps=0.6, min_samples=50)
    found = find(unit(2, 40), config, 0)
    assert (found.count, found.eps, set(found.labels.tolist())) == (0, 0.6, {NOISE})


def test_kmeans_has_as_many_as_it_is_told():
    features = unit(4, 120)
    found = find(features, ClustersConfig(kind="kmeans", clusters=9), 5)
    assert (found.count, found.eps) == (9, None)
    assert set(found.labels.tolist()) == set(range(9))
    np.testing.assert_array_equal(found.labels, find(features, ClustersConfig(kind="kmeans", clusters=9), 5).labels)
    centres = np.stack([features[found.labels == name].mean(axis=0) for name in range(9)])
    nearest = ((features[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == found.labels).mean() > 0.95, "an image is in the cluster of its nearest mean"


class PretendedInfomap:
    """Has the interface of the package; its modules are the connected parts of the links, numbered from 1."""

    def __init__(self, arguments: str):
        self.arguments, self.links = arguments, []
        PretendedInfomap.last = self

    def add_link(self, source: int, target: int, weight: float) -> None:
        self.links.append((source, target, weight))

    def run(self) -> None:
        group = {row: row for link in self.links for row in link[:2]}
        for _ in group:
            for one, other, _ in self.links:
                group[one] = group[other] = min(group[one], group[other])
        self.tree = [SimpleNamespace(is_leaf=False)]
        self.tree += [SimpleNamespace(is_leaf=True, node_id=row, module_id=name + 1) for row, name in group.items()]


def test_infomap_gets_the_links_and_small_modules_are_noise(monkeypatch):
    monkeypatch.setitem(sys.modules, "infomap", SimpleNamespace(Infomap=PretendedInfomap))
    crowds = np.repeat(np.eye(4, 8), [7, 6, 2, 1], axis=0) + 0.05 * np.random.default_rng(0).standard_normal((16, 8))
    features = (crowds / np.linalg.norm(crowds, axis=1, keepdims=True)).astype(np.float32)
    config = ClustersConfig(kind="infomap", infomap_neighbours=4, infomap_cosine=0.5, infomap_smallest=5)
    found = find(features, config, 0)
    # a crowd of two and an image alone are too small
    assert found.labels.tolist() == [0] * 7 + [1] * 6 + [NOISE] * 3
    links, cosines = PretendedInfomap.last.links, features @ features.T
    assert "--two-level --directed" in PretendedInfomap.last.arguments
    for source, target, weight in links:
        assert source != target
        assert weight == pytest.approx(cosines[source, target], abs=1e-6)
        assert weight >= 0.5
    assert len(links) == 7 * 3 + 6 * 3 + 2 * 1, "3 others each, as far as they are similar"


def test_without_infomap_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "infomap", None)
    with pytest.raises(UserError, match=r"needs the package infomap: install it .*or choose dbscan or kmeans"):
        find(unit(0, 30), ClustersConfig(kind="infomap"), 0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kind": "kmeans"}, "give both or neither"),
        ({"clusters": 5}, "give both or neither"),
        ({"eps": 0.2}, "low <= eps <= high"),
        ({"k1": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit(given, told):
    with pytest.raises(UserError, match=told):
        validate(ClustersConfig, given, "clusters")


def test_too_few_images_are_told():
    with pytest.raises(UserError, match=r"method\.clusters\.k1 = 30 and k2 = 6 .* the 20 images"):
        find(unit(0, 20), ClustersConfig(), 0)
    with pytest.raises(UserError, match=r"clusters = 21, but there are 20 images"):
        find(unit(0, 20), ClustersConfig(kind="kmeans", clusters=21), 0)


def test_small_clusters_become_noise_and_names_close_up():
    labels = np.array([4, 4, 4, 2, 7, 7, NOISE, 4])
    assert without_small(labels, 2).tolist() == [0, 0, 0, NOISE, 1, 1, NOISE, 0]


def test_statistics_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, NOISE, 1])
    pids = np.array([5, 5, 5, 9, 9, 9, 5, -1])  # -1 is junk: nobody knows who it is
    camids = np.array([0, 0, 1, 1, 2, 2, 0, -2])
    told = statistics(labels, pids, camids)
    assert (told["clusters"], told["noise"], told["mean_size"], told["largest"]) == (2, 1, 3.5, 4)
    assert told["purity"] == pytest.approx(5 / 6)  # three of four, two of two
    assert told["camera_purity"] == pytest.approx(4 / 6)
    # pairs of the six: 15; together in both 3 + 1, in clusters 6 + 1, in identities 3 + 3: expected 7 * 6 / 15
    assert told["ari"] == pytest.approx((4 - 2.8) / (6.5 - 2.8))
    alone = statistics(labels, np.full(8, -2), np.full(8, -2))
    assert alone.keys() == {"clusters", "noise", "mean_size", "largest"}
    assert statistics(np.full(3, NOISE), np.ones(3, np.int64), np.zeros(3, np.int64)) == {"clusters": 0, "noise": 3}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 60))
def test_majority_is_the_share_of_the_most_frequent_names(seed, count):
    rng = np.random.default_rng(seed)
    labels, names = rng.integers(0, 6, count) * 3, rng.integers(0, 9, count) - 4
    most = sum(max(np.unique(names[labels == each], return_counts=True)[1]) for each in np.unique(labels))
    assert majority(labels, names) == pytest.approx(most / count)


def test_how_many_clusters():
    assert Found(np.array([NOISE, NOISE]), None).count == 0
    assert Found(np.array([0, 1, NOISE]), None).count == 2
