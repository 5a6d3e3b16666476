"""k-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398), sparse: memory grows with N k, not with N squared.

Two images are near when they are among each other's neighbours, and their neighbourhoods overlap. The published code
keeps matrices of all N = queries + gallery images against each other, 35 GB of float32 for MSMT17. Here a row of
weights holds its k-reciprocal neighbours only; the distances of all pairs pass by in blocks, for their largest value.

The same neighbourhoods are the distance that Cluster Contrast and its like cluster with (`jaccard`), in their variant.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from pydantic import Field
from scipy.sparse import csr_matrix

from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter

BLOCK_BYTES = 16 << 20  # memory for a block of distances, of gathered features or of overlaps
SUM_BYTES = 4 << 20  # memory for the overlaps of a few queries: added up in no order, so they must stay in the cache
PAIR_BYTES = 40  # that a pair with a common neighbour needs while overlaps are added up
TILE = 2000  # rows that are compared with as many others at once
UNIT = 1e-3  # how far the length of a feature may be from 1


class RerankConfig(Section):
    """Sizes of the neighbourhoods; 20, 6, 0.3 is what almost every published number uses."""

    k1: int = Field(0, ge=0)  # neighbours that must be mutual; 0 = no re-ranking
    k2: int = Field(6, ge=1)  # rows averaged into the row of weights, itself included; 1 = none
    lam: float = Field(0.3, ge=0, le=1)  # share of the plain distance in the final one, beside the Jaccard distance
    # "search": k1 neighbours beside the image itself, squared distances divided by their largest in the row (Zhong et
    # al.); "clustering": k1 with the image itself, squared distances as they are (SpCL, Cluster Contrast)
    variant: Literal["search", "clustering"] = "search"


def _unit(name: str, features: np.ndarray) -> np.ndarray:
    """float32 [N, D]; UserError unless every row has length 1."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    lengths = np.linalg.norm(features, axis=1)
    if not (np.abs(lengths - 1) < UNIT).all():
        row = int(np.argmax(~(np.abs(lengths - 1) < UNIT)))
        raise UserError(
            f"re-ranking needs features of length 1, but {name} row {row} has length {lengths[row]:.3g}; "
            "L2-normalise them"
        )
    return features


def blocks(rows: int, bytes_a_row: int) -> Iterator[slice]:
    """Slices of rows that fit in BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // max(1, bytes_a_row))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def cut(costs: np.ndarray, most: int) -> Iterator[slice]:
    """Slices of consecutive rows whose costs, int [N], add up to at most `most`; a dearer row stands alone."""
    ends, start = np.cumsum(costs, dtype=np.int64), 0
    while start < len(costs):
        spent = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, spent + most, side="right")))
        yield slice(start, stop)
        start = stop


class Neighbourhoods:
    """The nearest rows of each row and the largest distance, kept while pairs pass by."""

    def __init__(self, count: int, k: int):
        self.cosines = np.full((count, k), -np.inf, np.float32)  # in no order until `nearest`
        self.rows = np.zeros((count, k), np.int32)
        self.limit = np.full(count, -np.inf, np.float32)  # the smallest of the row's cosines: what a pair must beat
        self.least = np.full(count, np.inf, np.float32)  # the smallest cosine of all that passed by

    def look(self, part: slice, others: slice, cosines: np.ndarray) -> None:
        """Pairs that were not seen before: rows of `part` against rows of `others`, float32 [B, C].

        Always the same parts; the first pairs of a part must be k or more. Writes to the rows of `part` only.
        """
        self.least[part] = np.minimum(self.least[part], cosines.min(axis=1))
        k = self.rows.shape[1]
        if self.limit[part.start] == -np.inf:  # the first pairs of these rows
            places = np.argpartition(cosines, -k, axis=1)[:, -k:]
            self.rows[part] = places + others.start
            self.cosines[part] = np.take_along_axis(cosines, places, axis=1)
            self.limit[part] = self.cosines[part].min(axis=1)
            return
        # few pairs are nearer than what is there, so that nothing else of the tile needs an order
        rows, places = np.divmod(np.flatnonzero(cosines > self.limit[part, None]), cosines.shape[1])
        counts = np.bincount(rows, minlength=len(cosines))
        better = np.flatnonzero(counts)
        if not len(better):
            return
        counts = counts[better]
        at = np.repeat(np.arange(len(better)), counts)
        slots = k + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        known = np.full((len(better), k + counts.max()), -np.inf, np.float32)
        names = np.zeros(known.shape, np.int32)
        known[:, :k], names[:, :k] = self.cosines[part][better], self.rows[part][better]
        known[at, slots], names[at, slots] = cosines[rows, places], places + others.start
        keep = np.argpartition(known, -k, axis=1)[:, -k:]
        self.cosines[part.start + better] = np.take_along_axis(known, keep, axis=1)
        self.rows[part.start + better] = np.take_along_axis(names, keep, axis=1)
        self.limit[part.start + better] = self.cosines[part.start + better].min(axis=1)

    def nearest(self) -> np.ndarray:
        """int32 [N, k]: the nearest rows of each row, itself always among them, nearest first."""
        found = np.take_along_axis(self.rows, np.argsort(-self.cosines, axis=1, kind="stable"), axis=1)
        # an image with as many equal ones may be crowded out of its own list
        without = np.flatnonzero((found != np.arange(len(found))[:, None]).all(axis=1))
        found[without, 1:] = found[without, :-1]
        found[without, 0] = without
        return found


def neighbourhoods(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest rows of each row, int32 [N, count], see `nearest`, and its largest squared distance, float32 [N].

    features: float32 [N, D] of length 1. Every pair is multiplied once, for both of its rows, tile by tile: half the
    work of searching every row by FAISS, which does not tell the largest distance either.
    """
    if count > len(features):
        raise UserError(
            f"re-ranking asks for {count} neighbours of {len(features)} images; set rerank.k1 and rerank.k2 lower"
        )
    found, size = Neighbourhoods(len(features), count), max(TILE, count)
    held = np.empty((2, min(size, len(features)) ** 2), np.float32)
    tiles = [slice(start, min(start + size, len(features))) for start in range(0, len(features), size)]
    whole = len(tiles) * (len(tiles) + 1) // 2
    with Meter(whole, "neighbours", "tiles") as meter, ThreadPoolExecutor(1) as pool:
        for place, part in enumerate(tiles):
            for others in tiles[place:]:
                shape = part.stop - part.start, others.stop - others.start
                # memory of its own for each tile would have to be zeroed by the system each time
                cosines = held[0, : shape[0] * shape[1]].reshape(shape)
                np.matmul(features[part], features[others].T, out=cosines)
                there = pool.submit(found.look, part, others, cosines)
                if others != part:
                    turned = held[1, : cosines.size].reshape(shape[::-1])
                    np.copyto(turned, cosines.T)
                    found.look(others, part, turned)
                there.result()
                meter.advance()
    return found.nearest(), np.maximum(2 - 2 * found.least, np.finfo(np.float32).tiny)


def _mutual(rows: np.ndarray) -> csr_matrix:
    """Which pairs are among each other's `rows` [N, k]: 1 where they are, float32 sparse [N, N]."""
    count, k = rows.shape
    ones = np.ones(rows.size, np.float32)
    forward = csr_matrix((ones, rows.ravel(), np.arange(0, rows.size + 1, k)), shape=(count, count))
    return forward.multiply(forward.T).tocsr()


def reciprocal(rows: np.ndarray, k1: int) -> csr_matrix:
    """The expanded k-reciprocal neighbours of each row, eq. 4 and 5 of the paper: non-zeros of a sparse [N, N].

    rows: int [N, k], neighbours, nearest first. To the mutual ones come those of a mutual neighbour's own half-sized
    set, where more than two thirds of that set are mutual neighbours here as well.
    """
    whole, half = _mutual(rows), _mutual(rows[:, : round(k1 / 2) + 1])
    sizes, parts = np.diff(half.indptr), []
    for part in blocks(len(rows), 8 * rows.shape[1] ** 2):
        mine = whole[part]
        shared = mine.multiply(mine @ half.T).tocsr()  # of each mutual neighbour: how much of its half-sized set
        keep = 3 * shared.data > 2 * sizes[shared.indices]
        joins = csr_matrix((keep.astype(np.float32), shared.indices, shared.indptr), shape=shared.shape)
        joins.eliminate_zeros()
        parts.append(mine + joins @ half)
    indices = np.concatenate([part.indices for part in parts])
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    shape = (len(rows), len(rows))
    return csr_matrix((np.ones(len(indices), np.float32), indices, np.append(0, np.cumsum(lengths))), shape=shape)


def _between(features: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of pairs of rows, float32 [P]."""
    found = np.empty(len(rows), np.float32)
    for part in blocks(len(rows), 8 * features.shape[1]):
        found[part] = np.einsum("pd,pd->p", features[rows[part]], features[columns[part]])
    return np.maximum(2 - 2 * found, 0)


def weights(features: np.ndarray, config: RerankConfig) -> tuple[csr_matrix, np.ndarray | None]:
    """Each image as weights over its neighbours, eq. 7 and 11 of the paper: float32 sparse [N, N], rows sum to 1.

    features: float32 [N, D] of length 1. Returns also what the squared distances of each row are divided by, float32
    [N]; None: nothing.
    """
    search_like = config.variant == "search"
    rows, largest = neighbourhoods(features, max(config.k1 + search_like, config.k2))
    largest = largest if search_like else None
    found = reciprocal(rows[:, : config.k1 + search_like], config.k1)
    owners = np.repeat(np.arange(len(rows)), np.diff(found.indptr))
    distances = _between(features, owners, found.indices)
    found.data = np.exp(-distances / (1 if largest is None else largest[owners]))
    found.data /= np.add.reduceat(found.data, found.indptr[:-1])[owners]  # no row is empty
    if config.k2 == 1:
        return found, largest
    near = rows[:, : config.k2]
    share = np.full(near.size, 1 / config.k2, np.float32)
    pointers = np.arange(0, near.size + 1, config.k2)
    return (csr_matrix((share, near.ravel(), pointers), shape=found.shape) @ found).tocsr(), largest


class Overlaps:
    """Which images weigh the same neighbours, and how much: eq. 10 of the paper."""

    def __init__(self, rows: csr_matrix, others: csr_matrix):
        """rows, others: weights of images over the same N neighbours, float32 sparse [M, N] and [K, N]."""
        self.rows = rows
        self.columns = others.T.tocsr()  # row c: those that have neighbour c
        self.holders = np.diff(self.columns.indptr)
        # a popular neighbour makes many pairs: memory is bounded by what each row will cost, not by a number of rows
        self.costs = np.add.reduceat(self.holders[rows.indices], rows.indptr[:-1], dtype=np.int64)

    def pairs(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (row of the part, other, the smaller weight on a neighbour of both), int64, int32 and float32 [P].

        They stand once for each neighbour that both have: what falls together is to be added up. Rows of weights sum to
        1, so the larger weights sum to 2 minus that.
        """
        inside = slice(self.rows.indptr[part.start], self.rows.indptr[part.stop])
        neighbours, data = self.rows.indices[inside], self.rows.data[inside]
        starts, counts = self.columns.indptr[neighbours], self.holders[neighbours]
        ends = np.cumsum(counts, dtype=np.int64)
        places = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        owners = np.repeat(np.arange(part.stop - part.start), self.costs[part])
        return owners, self.columns.indices[places], np.minimum(np.repeat(data, counts), self.columns.data[places])


class Reranked:
    """A search after re-ranking: scores of queries against the whole gallery, for metrics.evaluate."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray, config: RerankConfig):
        """query [M, D], gallery [N, D]: float32, L2-normalised. UserError where k1 is more than there are images."""
        assert config.k1 > 0, "0 is no re-ranking"
        self.query, self.gallery, self.lam = _unit("query", query), _unit("gallery", gallery), config.lam
        features = np.concatenate([self.query, self.gallery])
        found, self.largest = weights(features, config)
        self.overlaps = Overlaps(found[: len(query)], found[len(query) :])

    def scores(self, part: slice) -> np.ndarray:
        """The final distance of queries to the gallery, eq. 12 of the paper, negative: float32 [B, N].

        part: rows of the query, start and stop given.
        """
        # lam (2 - 2 cos) / largest + 1 - lam, negative; the share of the neighbours comes on top
        factor = np.full(len(self.query), 2 * self.lam, np.float32)
        if self.largest is not None:
            factor /= self.largest[: len(self.query)]
        factor = factor[part, None]
        scores = (self.query[part] * factor) @ self.gallery.T
        scores -= factor + np.float32(1 - self.lam)
        width = scores.shape[1]
        for rows in cut(8 * width + PAIR_BYTES * self.overlaps.costs[part], SUM_BYTES):
            owners, others, smaller = self.overlaps.pairs(slice(part.start + rows.start, part.start + rows.stop))
            block, at = scores[rows].reshape(-1), owners * width + others  # the block is a view
            shared = np.bincount(at, smaller, len(block))[at]
            block[at] += (1 - self.lam) * (shared / (2 - shared))  # reads before it writes: a pair is added once
        return scores


def jaccard(features: np.ndarray, config: RerankConfig, within: float = 1.0) -> csr_matrix:
    """1 - Jaccard distance of the pairs with a distance of at most `within`, float32 sparse [N, N]; 0 elsewhere.

    features: float32 [N, D], L2-normalised. For clustering; the distance of an image to itself is 0 up to rounding, and
    that of images without a common neighbour, which never stand here, is 1.
    """
    features = _unit("image", features)
    found, _ = weights(features, config)
    overlaps, count, rows, columns, values = Overlaps(found, found), len(features), [], [], []
    least = 2 * (1 - within) / (2 - within) - 1e-6  # the smaller weights of a pair so far apart add up to this
    with Meter(count, "overlaps") as meter:
        # a row of sums for each image, in memory that the cache holds; most sums are of pairs that are too far
        for part in cut(8 * count + PAIR_BYTES * overlaps.costs, SUM_BYTES):
            size = part.stop - part.start
            owners, others, smaller = overlaps.pairs(part)
            shared = np.minimum(np.bincount(owners * count + others, smaller, size * count), 1)
            keep = np.flatnonzero(shared > max(least, 0))
            shared = shared[keep].astype(np.float32)
            rows.append(np.bincount(keep // count, minlength=size))
            columns.append((keep % count).astype(np.int32))
            values.append(shared / (2 - shared))
            meter.advance(size)
    pointers = np.append(0, np.cumsum(np.concatenate(rows)))
    return csr_matrix((np.concatenate(values), np.concatenate(columns), pointers), shape=(count, count))
