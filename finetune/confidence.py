"""How far the numbers of a search may move by the choice of its queries: percentile bootstrap over the queries.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: the valid queries are drawn again and again
with replacement, as many as there are, and the interval holds the middle share of the means. It says nothing about
another seed of the training, another gallery or other people: queries of one person are drawn as if they were
independent, so with many queries a person the interval is too narrow.
"""

import numpy as np

from finetune.metrics import Retrieval
from shards.seeds import generator

BLOCK_BYTES = 32 << 20  # memory for the counts of one block of resamples


def intervals(
    retrieval: Retrieval, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """[low, high] of mAP, rank1, rank5, rank10 and mINP, as fractions.

    level: in 0..1, the share of resamples between low and high. resamples: >= 1. seed: which resamples; the same
    queries are drawn for every model of a set, so differences can be compared.
    """
    assert 0 < level < 1, level
    assert resamples >= 1, resamples
    valid = retrieval.matches > 0
    first = retrieval.first[valid]
    ranks = {f"rank{k}": first <= min(k, len(retrieval.cmc)) for k in (1, 5, 10)}  # as Retrieval.rank, beyond the curve
    columns = {"mAP": retrieval.ap[valid], **ranks, "mINP": retrieval.inp[valid]}
    values = np.stack([column.astype(np.float64) for column in columns.values()], axis=1)  # [V, 5]
    queries, rng = len(values), generator(seed, "bootstrap")
    means = np.empty((resamples, values.shape[1]))
    block = max(1, BLOCK_BYTES // (8 * queries))
    for start in range(0, resamples, block):
        some = means[start : start + block]
        # how often each query was drawn; a product with counts is faster than gathering the values
        counts = [np.bincount(rng.integers(queries, size=queries), minlength=queries) for _ in some]
        some[:] = np.array(counts, np.float64) @ values / queries
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(columns, low, high, strict=True)}
