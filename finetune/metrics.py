"""Exact CMC, mAP and mINP of a person search, without sorting the gallery.

Protocol (Market-1501 and its successors): for each query the gallery entries of the same identity *and* the same
camera are dropped, junk (pid -1) is dropped for every query, distractors (pid 0) and unlabelled entries stay as wrong
answers. A query without a match left, or without an identity (pid <= 0), is skipped and counted.

Order: higher score first; entries of equal score in the order of their gallery rows, lower row first. Scores are
computed once in float32 and compared exactly. The rank of a match is one more than the number of kept entries before
it, so counting replaces sorting: one pass over the gallery, then one a match over the entries that score at least as
high as the worst match.

For a query with R matches at the ranks r_1 < ... < r_R:
AP = (1/R) sum_k k / r_k (no interpolation), INP = R / r_R, and CMC-k asks whether r_1 <= k.
mINP: Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", eq. 7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

JUNK = -1  # pid of gallery entries that count neither as right nor as wrong
CHUNK_BYTES = 128 << 20  # memory for the scores of one chunk of queries


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How well a gallery was searched; all fractions in 0..1, means over the valid queries."""

    mAP: float
    cmc: np.ndarray  # float64 [max_rank]; cmc[k - 1] is the fraction with a match among the first k kept entries
    mINP: float
    valid: int  # queries that count
    skipped: int  # queries without identity or without a match left
    ap: np.ndarray  # float64 [M], NaN for skipped queries

    def rank(self, k: int) -> float:
        """CMC-k; beyond max_rank the last value that was stored."""
        return float(self.cmc[min(k, len(self.cmc)) - 1])

    @property
    def rank1(self) -> float:
        return self.rank(1)

    @property
    def rank5(self) -> float:
        return self.rank(5)

    @property
    def rank10(self) -> float:
        return self.rank(10)

    def numbers(self) -> dict[str, float]:
        """The scalars by name, for a log or a table."""
        return {
            "mAP": self.mAP,
            "rank1": self.rank1,
            "rank5": self.rank5,
            "rank10": self.rank10,
            "mINP": self.mINP,
            "valid": self.valid,
            "skipped": self.skipped,
        }


class GalleryLabels:
    """Who is on which gallery row; finds the rows of an identity without a pass over the gallery."""

    def __init__(self, pids: np.ndarray, camids: np.ndarray):
        """pids, camids: int64 [N]."""
        assert pids.shape == camids.shape == (len(pids),)
        self.camids = camids
        self.junk = np.flatnonzero(pids == JUNK)
        self.order = np.argsort(pids, kind="stable")  # stable: the rows of one identity stay in ascending order
        self.sorted = pids[self.order]

    def split(self, pid: int, camid: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a query (pid, camid) must find, and rows of that identity that it must not see, both ascending."""
        if pid <= 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        first, end = np.searchsorted(self.sorted, (pid, pid + 1))
        rows = self.order[first:end]
        same_camera = self.camids[rows] == camid
        return rows[~same_camera], rows[same_camera]


def rank_matches(
    scores: np.ndarray, query_pids: np.ndarray, query_camids: np.ndarray, gallery: GalleryLabels
) -> list[np.ndarray]:
    """Ranks of all matches of each query among its kept gallery entries.

    scores: finite float [B, N], higher is nearer. query_pids, query_camids: int64 [B]. Returns B ascending int64 arrays
    of 1-based ranks; an empty one is a skipped query.
    """
    assert scores.shape == (len(query_pids), len(gallery.camids)), f"scores {scores.shape}"
    ranks = []
    for row, pid, camid in zip(scores, query_pids, query_camids, strict=True):
        matches, hidden = gallery.split(pid, camid)
        if not len(matches):
            ranks.append(np.empty(0, np.int64))
            continue
        row = row.copy()
        row[hidden] = row[gallery.junk] = -np.inf  # before no match, so they are never counted
        levels = row[matches]
        near = row[row >= levels.min()]
        found = np.empty(len(matches), np.int64)
        for k, (match, level) in enumerate(zip(matches, levels, strict=True)):
            found[k] = 1 + np.count_nonzero(near > level)
            if np.count_nonzero(near == level) > 1:
                found[k] += np.count_nonzero(row[:match] == level)
        ranks.append(np.sort(found))
    return ranks


def summarise(ranks: Sequence[np.ndarray], max_rank: int = 50) -> Retrieval:
    """Metrics from the ranks of the matches of each query (see rank_matches); UserError when every query is skipped."""
    ap = np.full(len(ranks), np.nan)
    inp, first = [], []
    for query, found in enumerate(ranks):
        if len(found):
            ap[query] = np.mean(np.arange(1, len(found) + 1) / found)
            inp.append(len(found) / found[-1])
            first.append(found[0])
    valid = len(first)
    if not valid:
        raise UserError(
            f"none of the {len(ranks)} queries has a match in the gallery on another camera; check that query and "
            "gallery belong together and that identities (pid > 0) and cameras are labelled"
        )
    cmc = np.cumsum(np.bincount(np.minimum(first, max_rank + 1), minlength=max_rank + 2))[1 : max_rank + 1] / valid
    return Retrieval(float(np.nanmean(ap)), cmc, float(np.mean(inp)), valid, len(ranks) - valid, ap)


def _check(query: EmbeddingTable, gallery: EmbeddingTable) -> None:
    for name, table in (("query", query), ("gallery", gallery)):
        if not len(table):
            raise UserError(f"the {name} table is empty; there is nothing to evaluate")
        finite = np.isfinite(table.features).all(axis=1)
        if not finite.all():
            key = table.keys[int(np.argmin(finite))]
            raise UserError(
                f"{np.count_nonzero(~finite)} {name} features are not finite, the first is that of {key!r}; "
                "the checkpoint is damaged or diverged"
            )
    if query.features.shape[1] != gallery.features.shape[1]:
        raise UserError(
            f"query features have {query.features.shape[1]} dimensions and gallery features "
            f"{gallery.features.shape[1]}; embed both with the same model"
        )
    if (query.camids == UNKNOWN).all() and (gallery.camids == UNKNOWN).all():
        # every entry of the right person would count as seen by the same camera, and every query would be skipped
        raise UserError(
            "query and gallery have no camera labels, but a match must come from another camera; label camids"
        )


def evaluate(query: EmbeddingTable, gallery: EmbeddingTable, max_rank: int = 50, chunk: int | None = None) -> Retrieval:
    """Search every query in the gallery by inner product of the features as they are (L2-normalise for cosine).

    max_rank: length of the CMC curve, >= 1. chunk: queries scored at once; by default as many as fit in CHUNK_BYTES.
    """
    assert max_rank >= 1
    _check(query, gallery)
    labels = GalleryLabels(gallery.pids, gallery.camids)
    chunk = chunk or max(1, CHUNK_BYTES // (4 * len(gallery)))
    ranks: list[np.ndarray] = []
    for start in range(0, len(query), chunk):
        part = slice(start, start + chunk)
        scores = query.features[part] @ gallery.features.T
        ranks += rank_matches(scores, query.pids[part], query.camids[part], labels)
    return summarise(ranks, max_rank)
