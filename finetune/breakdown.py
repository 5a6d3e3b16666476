"""A search looked at more closely: query by query, and by pairs of cameras."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune.metrics import GalleryLabels, Protocol, Retrieval, evaluate, own_rows
from shards.embeddings import EmbeddingTable
from shards.neighbours import search

QUERY_COLUMNS = (
    *("key", "pid", "camid", "ap", "inp", "first_rank", "matches", "best_match", "best_match_cosine"),
    "ap_reranked",
)


def spread(retrieval: Retrieval, count: int) -> list[int]:
    """Query rows from the best to the worst average precision, evenly spaced."""
    valid = np.flatnonzero(~np.isnan(retrieval.ap))
    order = valid[np.argsort(-retrieval.ap[valid], kind="stable")]
    return [int(order[i]) for i in np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]


def nearest(query: EmbeddingTable, gallery: EmbeddingTable, count: int) -> dict[str, list[dict[str, Any]]]:
    """The `count` nearest gallery images of each query by FAISS, same-camera images included: key and cosine."""
    scores, rows = search(gallery.features, query.features, min(count, len(gallery)))
    return {
        key: [{"key": gallery.keys[r], "cosine": round(float(s), 6)} for s, r in zip(ss, rr, strict=True)]
        for key, ss, rr in zip(query.keys, scores, rows, strict=True)
    }


def taken(table: EmbeddingTable, rows: np.ndarray) -> EmbeddingTable:
    """Some rows of a table, in their order. rows: bool or int64."""
    return EmbeddingTable(table.features[rows], table.pids[rows], table.camids[rows], table.keys[rows])


def matching(query: EmbeddingTable, gallery: EmbeddingTable, protocol: Protocol) -> list[np.ndarray]:
    """For each query the gallery rows that it should find, ascending int64; empty where the query does not count."""
    labels = GalleryLabels(gallery.pids, gallery.camids, protocol)
    own = own_rows(query, gallery) if labels.keep else np.full(len(query), -1)
    return [labels.split(*label)[0] for label in zip(query.pids, query.camids, own, strict=True)]


def by_cameras(
    query: EmbeddingTable, gallery: EmbeddingTable, matches: Sequence[np.ndarray], protocol: Protocol
) -> list[dict[str, Any]]:
    """mAP of the queries of one camera in the gallery images of one camera, for each pair of cameras with a match.

    The images of the other cameras are not in the gallery then, so most numbers lie above the mAP of the whole.
    """
    of_query = np.repeat(np.arange(len(query)), [len(rows) for rows in matches])
    seen_by = gallery.camids[np.concatenate([*matches, np.empty(0, np.int64)])]
    found = []
    for camera in np.unique(seen_by[seen_by >= 0]).tolist():
        there = np.unique(of_query[seen_by == camera])
        there = there[query.camids[there] >= 0]
        if not len(there):
            continue
        asking = taken(query, there)
        ap = evaluate(asking, taken(gallery, gallery.camids == camera), protocol).ap
        for of in np.unique(asking.camids).tolist():
            each = ap[asking.camids == of]
            found.append({"query": of, "gallery": camera, "queries": len(each), "mAP": float(each.mean())})
    return sorted(found, key=lambda pair: (pair["query"], pair["gallery"]))


def query_rows(
    query: EmbeddingTable,
    gallery: EmbeddingTable,
    matches: Sequence[np.ndarray],
    plain: Retrieval,
    second: Retrieval | None,
) -> Iterator[tuple]:
    """A tuple of QUERY_COLUMNS for each query; None or NaN where there is no number.

    matches: see `matching`. best_match: key of the nearest right answer. second: the search after re-ranking.
    """
    for row, rows in enumerate(matches):
        best, cosine = "", None
        if len(rows):
            scores = gallery.features[rows] @ query.features[row]
            best, cosine = gallery.keys[int(rows[scores.argmax()])], round(float(scores.max()), 6)
        numbers = plain.ap[row], plain.inp[row], plain.first[row] or None, plain.matches[row], best, cosine
        yield (query.keys[row], query.pids[row], query.camids[row], *numbers, second and second.ap[row])
