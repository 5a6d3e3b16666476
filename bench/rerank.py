"""k-reciprocal re-ranking: ours is sparse, the textbook way keeps dense matrices of all images against each other.

    python bench/rerank.py                     the size of Market-1501; the textbook way takes minutes and gigabytes
    python bench/rerank.py --queries 700 --gallery 3300      smaller, both
    python bench/rerank.py --msmt17            the size of MSMT17, ours alone, with its memory

Synthetic features: 3,368 queries and 15,913 gallery images, about 26 of a person, 384 numbers each; k1 = 20, k2 = 6,
lambda = 0.3. Both begin with the features, end with the final distances of all queries to the gallery, and must agree.
The textbook way is the published procedure (Zhong et al. 2017) written anew: full matrices, a full argsort, a loop over
the images.
"""

import argparse
import os
import threading
from collections.abc import Callable

import numpy as np
import pairs
from pairs.children import memory_mb

from finetune.rerank import RerankConfig, Reranked

K1, K2, LAM = 20, 6, 0.3


def features(count: int, identities: int, dim: int = 384) -> np.ndarray:
    """Unit vectors around one centre an identity, float32 [count, dim]."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    found = 0.5 * centres[rng.integers(identities, size=count)] + rng.standard_normal((count, dim), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def textbook(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Final distances [M, N] with dense float32 matrices."""
    images = np.concatenate([query, gallery])
    distances = 2 - 2 * images @ images.T
    distances /= distances.max(axis=1, keepdims=True)
    order = np.argsort(distances, axis=1).astype(np.int32)
    count, vectors = len(images), np.zeros_like(distances)

    def mutual(row: int, k: int) -> np.ndarray:
        near = order[row, :k]
        return near[(order[near, :k] == row).any(axis=1)]

    for row in range(count):
        own = mutual(row, K1 + 1)
        grown = [own]
        for other in own:
            theirs = mutual(other, round(K1 / 2) + 1)
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                grown.append(theirs)
        columns = np.unique(np.concatenate(grown))
        weight = np.exp(-distances[row, columns])
        vectors[row, columns] = weight / weight.sum()
    vectors = np.stack([vectors[order[row, :K2]].mean(axis=0) for row in range(count)])
    holders = [np.flatnonzero(vectors[:, column]) for column in range(count)]
    final = np.empty((len(query), len(gallery)), np.float32)
    for row in range(len(query)):
        shared = np.zeros(count, np.float32)
        for column in np.flatnonzero(vectors[row]):
            others = holders[column]
            shared[others] += np.minimum(vectors[row, column], vectors[others, column])
        final[row] = (1 - shared / (2 - shared))[len(query) :]
    return (1 - LAM) * final + LAM * distances[: len(query), len(query) :]


def ours(query: np.ndarray, gallery: np.ndarray, use: Callable[[slice, np.ndarray], None]) -> None:
    """Final scores, 256 queries at a time."""
    found = Reranked(query, gallery, RerankConfig(k1=K1, k2=K2, lam=LAM))
    for start in range(0, len(query), 256):
        part = slice(start, min(start + 256, len(query)))
        use(part, found.scores(part))


class Resident:
    """The largest resident memory while something runs, MiB, sampled every 20 ms."""

    def __enter__(self) -> "Resident":
        self.most, self.done = 0.0, threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, memory_mb("VmRSS"))


def main() -> None:
    """Check that both agree, time them, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=3368)
    parser.add_argument("--gallery", type=int, default=15913)
    parser.add_argument("--rounds", type=int, default=3, help="turns of both; the median counts")
    parser.add_argument("--msmt17", action="store_true", help="11,659 queries, 82,161 gallery images, ours alone")
    given = parser.parse_args()
    queries, gallery = (11_659, 82_161) if given.msmt17 else (given.queries, given.gallery)
    images = features(queries + gallery, max(2, (queries + gallery) // 26))
    query, rest = images[:queries], images[queries:]
    final = np.empty((queries, 0 if given.msmt17 else gallery), np.float32)

    def keep(part: slice, scores: np.ndarray) -> None:
        if not given.msmt17:
            final[part] = -scores

    ours(query[:64], rest[:512], lambda *_: None)  # libraries loaded
    with Resident() as memory:
        mine = [pairs.seconds(lambda: ours(query, rest, keep))]
    size = f"{queries} + {gallery} x 384, k1 {K1}, k2 {K2}"
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    if given.msmt17:
        numbers = {"ratio": None, "ours": round(mine[0].wall, 1), "textbook": None}
        pairs.report("rerank", numbers, "s", memory.most, threads, size=size)
        return
    found: dict[str, np.ndarray] = {}
    other: list[pairs.Seconds] = []
    with Resident() as dense:
        for turn in range(given.rounds):
            if turn:
                mine.append(pairs.seconds(lambda: ours(query, rest, keep)))
            other.append(pairs.seconds(lambda: found.update(textbook=textbook(query, rest))))
    difference = np.abs(final - found["textbook"])
    # neighbours whose distances are equal to the last bits may change places: a handful of pairs then differ
    share = float((difference > 1e-4).mean())
    assert share < 1e-4, f"{share:.2%} of the distances differ by more than 1e-4"
    told = {
        "worst_difference": float(difference.max()),
        "share_above_1e-4": share,
        "textbook_peak_mb": round(dense.most),
    }
    pairs.report("rerank", pairs.compare(mine, other, 1.0), "s", memory.most, threads, size=size, **told)


if __name__ == "__main__":
    main()
