"""The nearest images of a gallery among those that a filter lets through, and their vectors, with any index.

An index of faiss answers without a filter, so it is asked for more and more until enough of its answers pass.
"""

import faiss
import numpy as np

from finetune.rerank import RerankConfig, Reranked
from finetune.vector_index import VectorIndex

MOST = 5000  # answers of an index that is not Flat: of ten times as many one of codes reads vectors from the disk
GROWTH = 4  # times as many answers at the next attempt
CANDIDATES = 200  # images that re-ranking puts in order
K1, K2, LAM = 20, 6, 0.3  # of the published re-ranking; it knows whole galleries, fewer candidates get smaller ones


def nearest(
    index: VectorIndex, feature: np.ndarray, count: int, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Cosines float32 [n] and ids int64 [n], best first, n <= count, and whether there are as many as could be:
    False where the index looks into a part of the gallery only, and that part holds too few that are allowed.

    feature: float32 [D] of length 1. allowed: bool [N], in the order of index.ids.
    """
    wanted, exhaustive = min(count, int(allowed.sum())), index.factory == "Flat"
    most = len(index.ids) if exhaustive else min(len(index.ids), max(MOST, count))
    asked = most if not exhaustive and wanted < count else min(most, count + 1)  # one more: mostly only the query goes
    while wanted:
        scores, ids = (row[0] for row in index.search(feature[None], asked))
        there = ids >= 0
        rows = np.searchsorted(index.ids, ids[there])
        passed = allowed[rows]
        if passed.sum() >= wanted or asked == most or not there.all():
            found = scores[there][passed][:count], ids[there][passed][:count]
            return *found, len(found[1]) == wanted
        asked = min(most, asked * GROWTH)
    return np.zeros(0, np.float32), np.zeros(0, np.int64), True


def vectors(index: VectorIndex, ids: np.ndarray) -> np.ndarray:
    """The vectors of some images, float32 [n, D]. ids: int64 [n], of the index."""
    if not index.exact:
        return np.array(index.vectors[np.searchsorted(index.ids, ids)], np.float32)
    if index.cells is not None:
        if index.cells.direct_map.type == faiss.DirectMap.NoMap:
            index.cells.set_direct_map_type(faiss.DirectMap.Hashtable)  # where each id lies; built once
        return np.stack([index.cells.reconstruct(int(number)) for number in ids])
    return np.stack([index.index.reconstruct(int(number)) for number in ids])


def config_for(count: int) -> RerankConfig:
    """Neighbourhoods for so many candidates, at least 1: the published sizes for CANDIDATES, a tenth of fewer."""
    k1 = int(np.clip(count * K1 // CANDIDATES, 1, K1))
    return RerankConfig(k1=k1, k2=max(1, round(k1 * K2 / K1)), lam=LAM)


def reranked(feature: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray, RerankConfig]:
    """A new order of the candidates, int64 [n], nearest first, their distances in that order, float32 [n], 0..1, and
    the sizes that were used.

    k-reciprocal re-ranking (see rerank.py) as if the candidates were the whole gallery: neighbours are sought among
    them and the query, and distances are divided by the largest among them. feature: float32 [D]; candidates: float32
    [n, D], n > 0; all of length 1.
    """
    config = config_for(len(candidates))
    distances = -Reranked(feature[None], candidates, config).scores(slice(0, 1))[0]
    order = np.argsort(distances, kind="stable")
    return order, distances[order], config
