"""Clustering a training set without labels: ours keeps pairs within eps only, the textbook way all pairs of images.

    python bench/clustering.py                     the size of Market-1501: 12,936 images, 384 numbers each
    python bench/clustering.py --images 4000       smaller
    python bench/clustering.py --spread 1.5        people that look more alike

Synthetic features around 751 centres; k-reciprocal Jaccard distance with k1 = 30, k2 = 6, then DBSCAN with eps 0.6 and
4 images. Both begin with the features and end with the clusters, which must agree but for a few images whose distances
are equal to the last bits. The textbook way is the published procedure (Zhong et al. 2017 as SpCL and Cluster Contrast
use it) written anew: neighbours by FAISS, float32 matrices of all images against each other, loops over the images;
DBSCAN is scikit-learn's in both. Each way runs in a process of its own, in turns; its memory is the most that was
resident there, imports and features included.
"""

import argparse
import os

import numpy as np
import pairs
from pairs.children import Child, memory_mb
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from finetune import clusters
from finetune.clusters import ClustersConfig
from shards.neighbours import search

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
AGREEMENT = 0.999  # adjusted Rand index of both, noise as a cluster


def features(count: int, spread: float, dim: int = 384) -> np.ndarray:
    """Unit vectors around one centre a person, about 17 each as in Market-1501, float32 [count, dim]."""
    rng = np.random.default_rng(0)
    people = max(2, count * 751 // 12_936)
    centres = rng.standard_normal((people, dim), dtype=np.float32)
    found = rng.standard_normal((count, dim), dtype=np.float32)
    found *= spread
    found += centres[rng.integers(people, size=count)]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def dense_distances(images: np.ndarray) -> np.ndarray:
    """Jaccard distances [N, N]; two dense float32 matrices at a time, as in the published code."""
    count = len(images)
    order = search(images, images, K1)[1]
    vectors = np.zeros((count, count), np.float32)

    def mutual(row: int, k: int) -> np.ndarray:
        near = order[row, :k]
        return near[(order[near, :k] == row).any(axis=1)]

    for row in range(count):
        own = mutual(row, K1)
        grown = [own]
        for other in own:
            theirs = mutual(other, round(K1 / 2) + 1)
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                grown.append(theirs)
        columns = np.unique(np.concatenate(grown))
        weight = np.exp(2 * (images[columns] @ images[row]) - 2)
        vectors[row, columns] = weight / weight.sum()
    expanded = np.zeros_like(vectors)
    for row in range(count):
        expanded[row] = vectors[order[row, :K2]].mean(axis=0)
    vectors = expanded
    del expanded
    holders = [np.flatnonzero(vectors[:, column]) for column in range(count)]
    distances = np.zeros_like(vectors)
    for row in range(count):
        shared = np.zeros(count, np.float32)
        for column in np.flatnonzero(vectors[row]):
            others = holders[column]
            shared[others] += np.minimum(vectors[row, column], vectors[others, column])
        distances[row] = 1 - shared / (2 - shared)
    del vectors, holders
    distances[distances < 0] = 0
    return distances


class Way:
    """One way of clustering, in a process of its own."""

    def __init__(self, ours: bool, count: int, spread: float):
        self.ours, self.images, self.labels = ours, features(count, spread), np.empty(0)

    def run(self) -> tuple[pairs.Seconds, float]:
        """Time of one clustering, and the most memory of this process so far, MiB."""
        return pairs.seconds(self._cluster), memory_mb("VmHWM")

    def _cluster(self) -> None:
        if self.ours:
            config = ClustersConfig(k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
            self.labels = clusters.find(self.images, config, 0).labels
        else:
            dbscan = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed")
            self.labels = dbscan.fit_predict(dense_distances(self.images))

    def found(self) -> np.ndarray:
        """The labels of the last clustering, int64 [N]."""
        return self.labels


def main() -> None:
    """Time both in turns, check that they agree, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12_936)
    parser.add_argument("--spread", type=float, default=1.0, help="of the images of a person, centres have 1")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both; the median counts")
    given = parser.parse_args()
    times: dict[bool, list[pairs.Seconds]] = {True: [], False: []}
    peaks: dict[bool, float] = {}
    size = given.images, given.spread
    with Child("ours", Way, True, *size) as mine, Child("the textbook way", Way, False, *size) as other:
        for _ in range(given.rounds):
            for ours, child in ((True, mine), (False, other)):
                taken, peaks[ours] = child.ask("run")
                times[ours].append(taken)
        labels = mine.ask("found"), other.ask("found")
    agreement = adjusted_rand_score(*labels)
    assert agreement >= AGREEMENT, f"the two ways agree to {agreement:.4f} only"
    told = {
        "size": f"{given.images} x 384, spread {given.spread:g}, k1 {K1}, k2 {K2}, eps {EPS}",
        "textbook_peak_mb": round(peaks[False]),
        "memory_ratio": round(peaks[False] / peaks[True], 2),
        "clusters": int(labels[0].max()) + 1,
        "agreement": round(float(agreement), 6),
    }
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    pairs.report("clustering", pairs.compare(times[True], times[False], 1.0), "s", peaks[True], threads, **told)


if __name__ == "__main__":
    main()
