"""Exact CMC, mAP and mINP of a person search, without ranking the gallery.

Which entries a query sees is said by `Protocol` and, in words, in docs/evaluation.md. Order: higher score first;
entries of equal score in the order of their gallery rows, lower row first. Scores are computed once in float32 and
compared exactly. The rank of a match is one more than the number of kept entries before it, so counting replaces
ranking: a query with R matches costs R passes over one row of scores, which stays in the processor's cache; with many
matches one sort of the values is cheaper. Neither moves indices, and no matrix of the whole is ever held.

For a query with R matches at the ranks r_1 < ... < r_R:
AP = (1/R) sum_k k / r_k (no interpolation), INP = R / r_R, and CMC-k asks whether r_1 <= k.
mINP: Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", eq. 7.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

DISTRACTOR = 0  # pid of gallery entries that are nobody's match: they count as wrong
JUNK = -1  # pid of gallery entries that count neither as right nor as wrong
CHUNK_BYTES = 128 << 20  # memory for the scores of one chunk of queries
MANY = 32  # matches from which on one sort of the row's values is cheaper than a pass a match

Scores = Callable[[slice], np.ndarray]  # part of the query rows -> float32 [B, N], higher is nearer


class Protocol(Section):
    """Which gallery entries a query may see."""

    # entries of the query's identity on the query's camera. drop: they are neither right nor wrong, as in Market-1501
    # and its successors. keep: they are right, for sets without cameras; only the query image itself is dropped
    same_camera: Literal["drop", "keep"] = "drop"

    def rules(self) -> str:
        """The rules in one sentence, to be printed with the numbers."""
        if self.same_camera == "drop":
            left_out = "gallery images of the query's identity on its camera are left out"
        else:
            left_out = "only the query image itself is left out, matches may come from the same camera"
        return f"{left_out}; junk (pid -1) is left out; distractors (pid 0) count as wrong"


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How well a gallery was searched; all fractions in 0..1, means over the valid queries."""

    mAP: float
    cmc: np.ndarray  # float64 [max_rank]; cmc[k - 1] is the fraction with a match among the first k kept entries
    mINP: float
    valid: int  # queries that count
    skipped: int  # queries without identity or without a match left
    ap: np.ndarray  # float64 [M], average precision; NaN for skipped queries
    inp: np.ndarray  # float64 [M], inverse negative penalty; NaN for skipped queries
    first: np.ndarray  # int64 [M], rank of the first match, from 1; 0 for skipped queries
    matches: np.ndarray  # int64 [M], matches that were to be found; 0 for skipped queries

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

    def __init__(self, pids: np.ndarray, camids: np.ndarray, protocol: Protocol | None = None):
        """pids, camids: int64 [N]. protocol: that of Market-1501 by default."""
        assert pids.shape == camids.shape == (len(pids),)
        self.camids = camids
        self.keep = (protocol or Protocol()).same_camera == "keep"
        self.junk = np.flatnonzero(pids == JUNK)
        self.order = np.argsort(pids, kind="stable")  # stable: the rows of one identity stay in ascending order
        self.sorted = pids[self.order]

    def split(self, pid: int, camid: int, own: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a query must find, and rows that it must not see (beside junk), both ascending.

        own: row of the query image itself, -1 where it is not in the gallery; asked for by same_camera=keep only,
        because dropping the camera drops it too.
        """
        if pid <= 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        first, end = np.searchsorted(self.sorted, (pid, pid + 1))
        rows = self.order[first:end]
        if self.keep:
            return rows[rows != own], np.array([own] if own >= 0 else [], np.int64)
        same_camera = self.camids[rows] == camid
        return rows[~same_camera], rows[same_camera]


def own_rows(query: EmbeddingTable, gallery: EmbeddingTable) -> np.ndarray:
    """Gallery row with the key of each query, int64 [M]; -1 where there is none."""
    names = gallery.keys.names
    order = np.argsort(names, kind="stable")
    at = order[np.minimum(np.searchsorted(names, query.keys.names, sorter=order), len(names) - 1)]
    return np.where(names[at] == query.keys.names, at, -1)


def _count(row: np.ndarray, matches: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Unordered ranks of the matches, int64 [R]. row: [N], what is hidden at -inf. before: bool [N] to write into."""
    levels = row[matches]
    found = np.empty(len(matches), np.int64)
    if len(matches) > MANY:
        values = np.sort(row)
        low, high = (np.searchsorted(values, levels, side) for side in ("left", "right"))
        found[:] = 1 + len(row) - high
        for k in np.flatnonzero(high - low > 1):  # others score the same; those in lower rows come before
            found[k] += np.count_nonzero(row[: matches[k]] == levels[k])
        return found
    for k, (match, level) in enumerate(zip(matches, levels, strict=True)):
        # the rule for equal scores costs no pass of its own: in lower rows they count, in higher rows they do not
        np.greater_equal(row[:match], level, out=before[:match])
        np.greater(row[match:], level, out=before[match:])
        found[k] = 1 + np.count_nonzero(before)
    return found


def rank_matches(
    scores: np.ndarray,
    query_pids: np.ndarray,
    query_camids: np.ndarray,
    gallery: GalleryLabels,
    own: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Ranks of all matches of each query among its kept gallery entries.

    scores: finite float [B, N], higher is nearer; left as they are. query_pids, query_camids: int64 [B]. own: int64
    [B], see own_rows; None: no query is in the gallery. Returns B ascending int64 arrays of 1-based ranks; an empty one
    is a skipped query.
    """
    assert scores.shape == (len(query_pids), len(gallery.camids)), f"scores {scores.shape}"
    own = np.full(len(query_pids), -1) if own is None else own
    row, before = np.empty(scores.shape[1], scores.dtype), np.empty(scores.shape[1], bool)
    ranks = []
    for values, pid, camid, itself in zip(scores, query_pids, query_camids, own, strict=True):
        matches, hidden = gallery.split(pid, camid, itself)
        if not len(matches):
            ranks.append(np.empty(0, np.int64))
            continue
        np.copyto(row, values)  # also brings the row into the cache for the passes to come
        row[hidden] = row[gallery.junk] = -np.inf  # before no match, so they are never counted
        ranks.append(np.sort(_count(row, matches, before)))
    return ranks


def summarise(ranks: Sequence[np.ndarray], max_rank: int = 50) -> Retrieval:
    """Metrics from the ranks of the matches of each query (see rank_matches); UserError when every query is skipped."""
    ap, inp = np.full(len(ranks), np.nan), np.full(len(ranks), np.nan)
    first, matches = np.zeros(len(ranks), np.int64), np.array([len(found) for found in ranks], np.int64)
    for query in np.flatnonzero(matches):
        found = ranks[query]
        ap[query] = np.mean(np.arange(1, len(found) + 1) / found)
        inp[query] = len(found) / found[-1]
        first[query] = found[0]
    valid = int(np.count_nonzero(matches))
    if not valid:
        raise UserError(
            f"none of the {len(ranks)} queries has a match left in the gallery (with same_camera=drop it must come "
            "from another camera); check that query and gallery belong together and that identities (pid > 0) and "
            "cameras are labelled"
        )
    counts = np.bincount(np.minimum(first[matches > 0], max_rank + 1), minlength=max_rank + 2)
    cmc = np.cumsum(counts)[1 : max_rank + 1] / valid
    return Retrieval(
        *(float(np.nanmean(ap)), cmc, float(np.nanmean(inp))), valid, len(ranks) - valid, ap, inp, first, matches
    )


def check_tables(query: EmbeddingTable, gallery: EmbeddingTable, protocol: Protocol) -> None:
    """UserError where a search with these tables can have no meaning."""
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
    unlabelled = (query.camids == UNKNOWN).all() and (gallery.camids == UNKNOWN).all()
    if unlabelled and protocol.same_camera == "drop":
        # every entry of the right person would count as seen by the same camera, and every query would be skipped
        raise UserError(
            "query and gallery have no camera labels, but a match must come from another camera; label camids, or set "
            "same_camera=keep in the protocol: then matches may come from the same camera"
        )


def threads() -> int:
    """Threads to use: OMP_NUM_THREADS where it is set, else the cores that this process may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def score_parts(
    query: EmbeddingTable, gallery: EmbeddingTable, chunk: int | None = None, scores: Scores | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive parts of the query rows with their scores, float32 [B, N].

    chunk: queries at once; by default as many as fit in CHUNK_BYTES. scores: see `evaluate`. Without `scores` the array
    is the same memory each time: it is valid until the next part and may be written into.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * len(gallery)))
    # one buffer for all parts: fresh memory for each would cost as much as half of the product
    held = None if scores else np.empty((min(chunk, len(query)), len(gallery)), np.float32)
    there = gallery.features.T if scores else gallery.features.astype(np.float32, copy=False).T
    for start in range(0, len(query), chunk):
        part = slice(start, min(start + chunk, len(query)))
        if scores is None:
            asked = query.features[part].astype(np.float32, copy=False)
            yield part, np.matmul(asked, there, out=held[: len(asked)])
        else:
            given = scores(part)
            assert given.shape == (part.stop - start, len(gallery)), f"scores {given.shape} of {part}"
            assert np.isfinite(given).all(), f"scores of {part} are not finite"
            yield part, given


def evaluate(
    query: EmbeddingTable,
    gallery: EmbeddingTable,
    protocol: Protocol | None = None,
    max_rank: int = 50,
    chunk: int | None = None,
    scores: Scores | None = None,
    meter: Meter | None = None,
) -> Retrieval:
    """Search every query in the gallery by inner product of the features as they are (L2-normalise for cosine).

    protocol: that of Market-1501 by default. max_rank: length of the CMC curve, >= 1. chunk: queries scored at once; by
    default as many as fit in CHUNK_BYTES. scores: other scores than the inner product, finite, one call for each part
    of the query rows, in order. meter: is advanced by queries. Raises UserError, see check_tables and summarise.
    """
    assert max_rank >= 1
    protocol = protocol or Protocol()
    check_tables(query, gallery, protocol)
    labels = GalleryLabels(gallery.pids, gallery.camids, protocol)
    own = own_rows(query, gallery) if labels.keep else np.full(len(query), -1)
    ranks: list[np.ndarray] = []
    count = threads()
    with ThreadPoolExecutor(count) as pool:  # numpy lets other threads run while it compares, sorts and copies
        for part, values in score_parts(query, gallery, chunk, scores):
            cuts = np.linspace(part.start, part.stop, count + 1).astype(int)
            pieces = [slice(a, b) for a, b in itertools.pairwise(cuts) if b > a]

            def work(piece: slice, values: np.ndarray = values, start: int = part.start) -> list[np.ndarray]:
                rows = values[piece.start - start : piece.stop - start]
                return rank_matches(rows, query.pids[piece], query.camids[piece], labels, own[piece])

            for found in pool.map(work, pieces):
                ranks += found
            if meter:
                meter.advance(part.stop - part.start)
    return summarise(ranks, max_rank)
