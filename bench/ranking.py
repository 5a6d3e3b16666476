"""CMC, mAP and mINP of a search the size of Market-1501: ours counts, the textbook way sorts the gallery.

    python bench/ranking.py

Synthetic features: 3,368 queries, 19,732 gallery entries with junk and distractors, 384 numbers each. Both begin with
the features and must agree. The textbook way is the loop of most person-search code bases, written anew: a full matrix
of distances, argsort, and for each query a pass over its sorted row.
"""

import argparse
import os

import numpy as np
import pairs

from finetune.metrics import evaluate
from shards.embeddings import EmbeddingTable

CAMERAS = 6


def tables(queries: int, gallery: int, identities: int, dim: int) -> tuple[EmbeddingTable, EmbeddingTable]:
    """Unit vectors around one centre an identity; of the gallery 14 % are distractors (pid 0), 4 % junk (pid -1)."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities + 1, dim), dtype=np.float32)

    def table(pids: np.ndarray, name: str) -> EmbeddingTable:
        features = 0.35 * centres[np.maximum(pids, 0)] + rng.standard_normal((len(pids), dim), dtype=np.float32)
        features[pids <= 0] = rng.standard_normal((int((pids <= 0).sum()), dim), dtype=np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        keys = [f"{name}-{row}" for row in range(len(pids))]
        return EmbeddingTable(features, pids, rng.integers(CAMERAS, size=len(pids)), keys)

    pids = rng.integers(1, identities + 1, gallery)
    kind = rng.random(gallery)
    pids[kind < 0.14], pids[kind > 0.96] = 0, -1
    return table(rng.integers(1, identities + 1, queries), "query"), table(pids, "gallery")


def textbook(query: EmbeddingTable, gallery: EmbeddingTable, max_rank: int = 50) -> tuple[float, np.ndarray, float]:
    """mAP, CMC [max_rank], mINP by sorting."""
    distances = 2 - 2 * query.features @ gallery.features.T  # squared, of unit vectors
    order = np.argsort(distances, axis=1)
    matches = gallery.pids[order] == query.pids[:, None]
    cmc, precisions, inverse = [], [], []
    for row in range(len(query)):
        found = order[row]
        same_camera = (gallery.pids[found] == query.pids[row]) & (gallery.camids[found] == query.camids[row])
        kept = matches[row][~(same_camera | (gallery.pids[found] == -1))].astype(np.int32)
        if not kept.any():
            continue
        total = kept.cumsum()
        cmc.append(np.minimum(total, 1)[:max_rank])
        precisions.append((total / np.arange(1, len(kept) + 1) * kept).sum() / kept.sum())
        inverse.append(kept.sum() / (np.flatnonzero(kept)[-1] + 1))
    return float(np.mean(precisions)), np.mean(cmc, axis=0), float(np.mean(inverse))


def main() -> None:
    """Check that both agree, time them, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=3368)
    parser.add_argument("--gallery", type=int, default=19732)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    query, gallery = tables(given.queries, given.gallery, identities=750, dim=384)
    found: dict[str, tuple[float, np.ndarray, float]] = {}

    def ours() -> None:
        retrieval = evaluate(query, gallery)
        found["ours"] = retrieval.mAP, retrieval.cmc, retrieval.mINP

    def theirs() -> None:
        found["textbook"] = textbook(query, gallery)

    pair = pairs.Pair(ours, theirs, given.rounds)
    # not to the last bit: 2 - 2 x rounds differently from x, which can swap neighbours
    for mine, other in zip(found["ours"], found["textbook"], strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-4)
    size = f"{given.queries} x {given.gallery} x 384"
    told = {"size": size, "mAP": round(found["ours"][0], 6), "textbook_peak_mb": round(pairs.peak_mb())}
    # only the matrix product, the same in both, can use more than one thread
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    pairs.report("ranking", pair.numbers(1.0), "s", pair.peak_mb, threads, **told)


if __name__ == "__main__":
    main()
