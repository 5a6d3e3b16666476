"""CMC, mAP and mINP of a search the size of MSMT17: ours counts, the textbook way sorts the gallery.

    python bench/ranking.py                 # 11,659 queries x 82,161 gallery images; the textbook way on 600 queries
    python bench/ranking.py --market        # 3,368 x 19,732, both ways on all queries

Synthetic unit vectors of 384 numbers; of the gallery 14 % are distractors and 4 % junk. Both begin with the features.
The textbook way is the loop of most person-search code bases, written anew: a full matrix of distances, argsort, and
for each query a pass over its sorted row. At the size of MSMT17 its matrices alone need 11.5 GB, so it gets the first
`--textbook-queries` queries, and its time is scaled by their share; ours is always timed whole. Before that both rank
the first `--checked` queries on the same matrix of scores and must agree on the average precision of each query to
1e-12, equal scores included. Memory: the peak of ours above what is resident with the features.
"""

import argparse

import numpy as np
import pairs
from pairs.children import memory_mb

from finetune.metrics import Retrieval, evaluate, threads
from shards.embeddings import EmbeddingTable

DIM = 384
BLOCK = 4096  # rows drawn at once, so that making the features needs hardly more memory than the features


def table(name: str, pids: np.ndarray, centres: np.ndarray, cameras: int, seed: int) -> EmbeddingTable:
    """Unit vectors around one centre an identity; those of distractors and junk are around nothing."""
    rng = np.random.default_rng(seed)
    features = np.empty((len(pids), DIM), np.float32)
    for start in range(0, len(pids), BLOCK):
        rows = pids[start : start + BLOCK]
        block = rng.standard_normal((len(rows), DIM), dtype=np.float32)
        block += (0.35 * (rows > 0))[:, None].astype(np.float32) * centres[np.maximum(rows, 0)]
        features[start : start + BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    keys = [f"{name}-{row}" for row in range(len(pids))]
    return EmbeddingTable(features, pids, rng.integers(cameras, size=len(pids)), keys)


def tables(queries: int, gallery: int, identities: int, cameras: int) -> tuple[EmbeddingTable, EmbeddingTable]:
    """Query and gallery; of the gallery 14 % are distractors (pid 0), 4 % junk (pid -1)."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities + 1, DIM), dtype=np.float32)
    pids = rng.integers(1, identities + 1, gallery)
    kind = rng.random(gallery)
    pids[kind < 0.14], pids[kind > 0.96] = 0, -1
    asked = rng.integers(1, identities + 1, queries)
    return table("query", asked, centres, cameras, 1), table("gallery", pids, centres, cameras, 2)


def first(query: EmbeddingTable, count: int) -> EmbeddingTable:
    """The first `count` rows of a table."""
    return EmbeddingTable(query.features[:count], query.pids[:count], query.camids[:count], query.keys[:count])


def textbook(
    query: EmbeddingTable, gallery: EmbeddingTable, order: np.ndarray | None = None, max_rank: int = 50
) -> tuple[np.ndarray, np.ndarray, float]:
    """AP of each valid query, CMC [max_rank] and mINP by sorting.

    order: rows of the gallery from the nearest to the farthest [M, N]; made from distances where not given.
    """
    if order is None:
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
    return np.array(precisions), np.mean(cmc, axis=0), float(np.mean(inverse))


def check(query: EmbeddingTable, gallery: EmbeddingTable) -> None:
    """Both ways on the same scores, the textbook's sort stable, so that equal scores have the same order."""
    scores = query.features @ gallery.features.T
    mine = evaluate(query, gallery, scores=lambda part: scores[part])
    precisions, cmc, inverse = textbook(query, gallery, np.argsort(-scores, axis=1, kind="stable"))
    np.testing.assert_allclose(mine.ap[mine.matches > 0], precisions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(mine.cmc, cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(mine.mINP, inverse, rtol=0, atol=1e-12)


def main() -> None:
    """Check that both agree, time them, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--market", action="store_true", help="the size of Market-1501 with its junk")
    parser.add_argument("--queries", type=int, help="another number of queries")
    parser.add_argument("--gallery", type=int, help="another number of gallery images")
    parser.add_argument("--identities", type=int, help="another number of identities")
    parser.add_argument("--textbook-queries", type=int, help="queries of the textbook way (600; --market: all)")
    parser.add_argument("--checked", type=int, default=100, help="queries compared one by one on the same scores")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    queries, images, identities, cameras = (3368, 19732, 750, 6) if given.market else (11659, 82161, 3060, 15)
    queries, images = given.queries or queries, given.gallery or images
    query, gallery = tables(queries, images, given.identities or identities, cameras)
    part = first(query, min(queries, given.textbook_queries or (queries if given.market else 600)))
    found: dict[str, Retrieval | tuple[np.ndarray, np.ndarray, float]] = {}

    def ours() -> None:
        found["ours"] = evaluate(query, gallery)

    def theirs() -> None:
        found["textbook"] = textbook(part, gallery)

    before = memory_mb("VmRSS")
    pair = pairs.Pair(ours, theirs, given.rounds)
    whole, (precisions, *_) = found["ours"], found["textbook"]
    mine = whole.ap[: len(part)]
    # in the mean, not to the last bit: 2 - 2x rounds differently from x, which can swap neighbours
    assert abs(np.nanmean(mine) - precisions.mean()) < 1e-4, "the two ways disagree"
    check(first(query, given.checked), gallery)
    scale = queries / len(part)
    slow = [pairs.Seconds(time.wall * scale, time.cpu * scale) for time in pair.textbook]
    told = {
        "size": f"{queries} x {images} x {DIM}",
        "textbook_queries": len(part),
        "ms_per_query": round(min(time.wall for time in pair.ours) / queries * 1000, 4),
        "mAP": round(whole.mAP, 6),
        "matches_per_query": round(float(whole.matches[whole.matches > 0].mean()), 1),
        "above_features_mb": round(pair.peak_mb - before),
        "textbook_peak_mb": round(pairs.peak_mb()),
    }
    pairs.report("ranking", pairs.compare(pair.ours, slow, 1.0), "s", pair.peak_mb, threads(), **told)


if __name__ == "__main__":
    main()
