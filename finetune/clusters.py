"""Groups of images that look alike: the pseudo-labels of a training without labels.

DBSCAN (Ester et al. 1996) on the k-reciprocal Jaccard distance, as SpCL (arXiv 2006.02713) and Cluster Contrast (arXiv
2103.11568) do it. Only pairs within eps are ever kept, so memory grows with the images and not with their square.
k-means and Infomap are the alternatives.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN, KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import sort_graph_by_row_values

from finetune.rerank import RerankConfig, jaccard
from recipes.errors import UserError
from recipes.load import Section
from shards.neighbours import search
from shards.seeds import generator

NOISE = -1  # label of an image that belongs to no cluster


class ClustersConfig(Section):
    """How images are grouped; the defaults are those of Cluster Contrast on Market-1501."""

    kind: Literal["dbscan", "infomap", "kmeans"] = "dbscan"
    k1: int = Field(30, ge=2)  # neighbours that must be mutual, the image itself included
    k2: int = Field(6, ge=1)  # rows averaged into the row of weights, itself included; 1 = none
    eps: float = Field(0.6, gt=0, lt=1)  # Jaccard distance of neighbours; published: 0.4 to 0.7, by data
    min_samples: int = Field(4, ge=1)  # images within eps, itself included, that make an image the core of a cluster
    # where eps gives fewer than two clusters it goes by steps up (all is noise) or down (all is one), inside the range
    eps_step: float = Field(0.05, gt=0, lt=1)
    eps_range: tuple[float, float] = (0.3, 0.9)  # in 0..1
    clusters: int | None = Field(None, ge=2)  # of kmeans, which has to be told; the others find it
    infomap_neighbours: int = Field(15, ge=2)  # links of each image; published with Cluster Contrast
    infomap_cosine: float = Field(0.5, ge=-1, le=1)  # the least similarity that is a link
    infomap_smallest: int = Field(5, ge=1)  # images of a cluster; smaller ones are noise

    @model_validator(mode="after")
    def _fits(self) -> "ClustersConfig":
        low, high = self.eps_range
        if not 0 < low <= self.eps <= high < 1:
            raise ValueError(f"eps_range must be 0 < low <= eps <= high < 1, not {self.eps_range} around {self.eps}")
        if (self.kind == "kmeans") != (self.clusters is not None):
            raise ValueError("clusters, their number, belongs to kind = kmeans: give both or neither")
        return self


class Found(NamedTuple):
    """Clusters of N images."""

    labels: np.ndarray  # int64 [N]: 0..K-1, every one of them used, or NOISE
    eps: float | None  # that gave them; None: it has no part in this kind

    @property
    def count(self) -> int:
        """K."""
        return int(self.labels.max(initial=NOISE)) + 1


def dbscan(near: csr_matrix, eps: float, min_samples: int) -> np.ndarray:
    """Labels int64 [N] of DBSCAN.

    near: 1 - distance, float32 sparse [N, N] of `jaccard`; pairs that do not stand there are farther than eps. An image
    with min_samples of them within eps, itself included, is a core; cores within eps of each other are one cluster,
    numbered by its first core; another image within eps of a core joins the first of such clusters; the rest is NOISE.
    """
    distances = csr_matrix((np.maximum(1 - near.data, 0), near.indices.copy(), near.indptr), shape=near.shape)
    distances = sort_graph_by_row_values(distances, copy=False, warn_when_not_sorted=False)  # in its own arrays
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_.astype(np.int64)


def _by_dbscan(features: np.ndarray, config: ClustersConfig) -> Found:
    if max(config.k1, config.k2) > len(features):
        raise UserError(
            f"method.clusters.k1 = {config.k1} and k2 = {config.k2} ask for more neighbours than the {len(features)} "
            "images that there are; set them lower"
        )
    shape = RerankConfig(k1=config.k1, k2=config.k2, variant="clustering")
    first = found = Found(dbscan(jaccard(features, shape, config.eps), config.eps, config.min_samples), config.eps)
    if found.count > 1:
        return found
    low, high = config.eps_range
    near = jaccard(features, shape, high)
    step = config.eps_step * (-1 if (found.labels != NOISE).mean() > 0.5 else 1)
    while found.count < 2 and low <= (eps := round(found.eps + step, 6)) <= high:
        found = Found(dbscan(near, eps, config.min_samples), eps)
    return found if found.count > 1 else first


def _by_kmeans(features: np.ndarray, config: ClustersConfig, seed: int) -> Found:
    if config.clusters > len(features):
        raise UserError(f"method.clusters.clusters = {config.clusters}, but there are {len(features)} images")
    state = int(generator(seed, "clusters").integers(2**31))
    labels = KMeans(config.clusters, n_init=1, random_state=state).fit_predict(features)
    return Found(np.unique(labels, return_inverse=True)[1].astype(np.int64), None)


def _by_infomap(features: np.ndarray, config: ClustersConfig, seed: int) -> Found:
    """Rosvall & Bergstrom 2008, arXiv 0707.0609: two levels, directed links to the nearest images."""
    try:
        from infomap import Infomap  # an optional package
    except ImportError as error:
        raise UserError(
            "method.clusters.kind = infomap needs the package infomap: install it (pip install infomap), or choose "
            "dbscan or kmeans"
        ) from error
    count = min(config.infomap_neighbours, len(features))
    cosines, rows = search(features, features, count)
    owners = np.repeat(np.arange(len(features)), count)
    links = (cosines.ravel() >= config.infomap_cosine) & (rows.ravel() != owners)
    network = Infomap(f"--two-level --directed --silent --seed {1 + seed % (2**31 - 1)}")
    for row, other, weight in zip(owners[links], rows.ravel()[links], cosines.ravel()[links], strict=True):
        network.add_link(int(row), int(other), float(weight))
    labels = np.full(len(features), NOISE, np.int64)  # of an image without a link
    if links.any():
        network.run()
        for node in network.tree:
            if node.is_leaf:
                labels[node.node_id] = node.module_id
    return Found(without_small(labels, config.infomap_smallest), None)


def without_small(labels: np.ndarray, smallest: int) -> np.ndarray:
    """Labels int64 [N] whose clusters of fewer than `smallest` images are NOISE, the others numbered 0..K-1."""
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    stays = (names != NOISE) & (sizes >= smallest)
    return np.where(stays, np.cumsum(stays) - 1, NOISE)[inverse]


def find(features: np.ndarray, config: ClustersConfig, seed: int) -> Found:
    """Group images by their features, float32 [N, F], L2-normalised. A pure function; seed: of kmeans and infomap.

    Fewer than two clusters may be found: the caller knows what to do then.
    """
    if config.kind == "dbscan":
        return _by_dbscan(features, config)
    return (_by_kmeans if config.kind == "kmeans" else _by_infomap)(features, config, seed)


def majority(labels: np.ndarray, names: np.ndarray) -> float:
    """Share of the images whose name is the most frequent one of their cluster, 0..1.

    labels, names: int64 [N], of images that have both. 1: no cluster mixes names.
    """
    clusters, named = (np.unique(part, return_inverse=True)[1] for part in (labels, names))
    pairs, counts = np.unique(clusters * (named.max() + 1) + named, return_counts=True)
    most = np.zeros(clusters.max() + 1, np.int64)
    np.maximum.at(most, pairs // (named.max() + 1), counts)
    return float(most.sum() / len(labels))


def statistics(labels: np.ndarray, pids: np.ndarray, camids: np.ndarray) -> dict[str, Any]:
    """Numbers about clusters, for people to read; nothing of a training may depend on those that need pids.

    labels: int64 [N] of `find`. pids, camids: int64 [N]; pid <= 0 and camid < 0 are not known. Without noise:
    `purity`: share of the images that are of the most frequent identity of their cluster; `ari`: adjusted Rand index
    against the identities, 1 for the same groups, 0 for chance; `camera_purity`: as purity, with cameras: near 1 the
    clusters are cameras and not people.
    """
    sizes = np.bincount(labels[labels != NOISE])
    told: dict[str, Any] = {"clusters": len(sizes), "noise": int((labels == NOISE).sum())}
    told |= {"mean_size": float(sizes.mean()), "largest": int(sizes.max())} if len(sizes) else {}
    named = (labels != NOISE) & (pids > 0)
    if named.any():
        told["purity"] = majority(labels[named], pids[named])
        told["ari"] = float(adjusted_rand_score(pids[named], labels[named]))
    seen = (labels != NOISE) & (camids >= 0)
    if seen.any():
        told["camera_purity"] = majority(labels[seen], camids[seen])
    return told
