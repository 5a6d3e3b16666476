"""k-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398), sparse: memory grows with N k, not with N squared.

Two images are near when they are among each other's neighbours, and their neighbourhoods overlap. The published code
keeps matrices of all N = queries + gallery images against each other, 35 GB of float32 for MSMT17. Here a row of
weights holds its k-reciprocal neighbours only; the distances of all pairs pass by in blocks, for their largest value.

The same neighbourhoods are the distance that Cluster Contrast and its like cluster with (`jaccard`), in their variant.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_matrix

from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter

BLOCK_BYTES = 64 << 20  # memory for a block of distances, of gathered features or of overlaps
TILE = 2048  # rows that are compared with as many others at once
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


class Neighbourhoods(NamedTuple):
    """What all pairs are looked at for."""

    rows: np.ndarray  # int64 [N, k]: the nearest rows of each row, itself always among them, nearest first
    largest: np.ndarray  # float32 [N]: the largest squared distance of each row


def neighbourhoods(features: np.ndarray, count: int) -> Neighbourhoods:
    """The `count` nearest rows of each row, and how far the farthest is. features: float32 [N, D] of length 1.

    Every pair is multiplied once, for both of its rows, tile by tile: half the work of searching every row by FAISS,
    which does not tell the largest distance either (measured at the size of Market-1501: 1.6 s in place of 2.9 s).
    """
    if count > len(features):
        raise UserError(f"rerank.k1 asks for {count} neighbours of {len(features)} images; set rerank.k1 lower")
    table = torch.from_numpy(features)
    best = torch.full((len(table), count), -torch.inf)
    rows, least = torch.zeros((len(table), count), dtype=torch.int64), torch.full((len(table),), torch.inf)

    def look(part: slice, others: slice, cosines: torch.Tensor) -> None:
        """Rows of `part` against rows of `others`: [B, C]."""
        least[part] = torch.minimum(least[part], cosines.amin(dim=1))
        values, places = cosines.topk(min(count, cosines.shape[1]), dim=1)
        known = torch.cat([rows[part], places + others.start], dim=1)
        best[part], order = torch.cat([best[part], values], dim=1).topk(count, dim=1)
        rows[part] = known.gather(1, order)

    tiles = [slice(start, min(start + TILE, len(table))) for start in range(0, len(table), TILE)]
    with Meter(len(tiles) * (len(tiles) + 1) // 2, "neighbours", "tiles") as meter:
        for place, part in enumerate(tiles):
            for others in tiles[place:]:
                cosines = table[part] @ table[others].T
                look(part, others, cosines)
                if others != part:
                    look(others, part, cosines.T.contiguous())
                meter.advance()
    found = rows.numpy()
    # an image with as many equal ones may be crowded out of its own list
    without = np.flatnonzero((found != np.arange(len(found))[:, None]).all(axis=1))
    found[without, 1:] = found[without, :-1]
    found[without, 0] = without
    return Neighbourhoods(found, np.maximum(2 - 2 * least.numpy(), np.finfo(np.float32).tiny))


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


def _similarities(rows: csr_matrix, columns: csr_matrix) -> csr_matrix:
    """1 - Jaccard distance of images to all others, eq. 10 of the paper: float32 sparse [B, N].

    rows: weights of the images [B, N]. columns: weights of the others, transposed: row c are those with neighbour c.
    Rows of weights sum to 1, so the sum of the larger weights is 2 minus the sum of the smaller ones.
    """
    starts, counts = columns.indptr[rows.indices], np.diff(columns.indptr)[rows.indices]
    ends = np.cumsum(counts, dtype=np.int64)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    owners = np.repeat(np.repeat(np.arange(rows.shape[0], dtype=np.int32), np.diff(rows.indptr)), counts)
    smaller = np.minimum(np.repeat(rows.data, counts), columns.data[places])
    # adds up what falls together
    found = csr_matrix((smaller, (owners, columns.indices[places])), shape=(rows.shape[0], columns.shape[1]))
    found.data = np.minimum(found.data, 1)
    found.data /= 2 - found.data
    return found


class Reranked:
    """A search after re-ranking: scores of queries against the whole gallery, for metrics.evaluate."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray, config: RerankConfig):
        """query [M, D], gallery [N, D]: float32, L2-normalised. UserError where k1 is more than there are images."""
        assert config.k1 > 0, "0 is no re-ranking"
        self.query, self.gallery, self.lam = _unit("query", query), _unit("gallery", gallery), config.lam
        features = np.concatenate([self.query, self.gallery])
        found, self.largest = weights(features, config)
        self.mine, self.others = found[: len(query)], found[len(query) :].T.tocsr()

    def scores(self, part: slice) -> np.ndarray:
        """The final distance of queries to the gallery, eq. 12 of the paper, negative: float32 [B, N]."""
        # lam (2 - 2 cos) / largest + 1 - lam, negative; the share of the neighbours comes on top
        factor = np.full(len(self.query), 2 * self.lam, np.float32)
        if self.largest is not None:
            factor /= self.largest[: len(self.query)]
        factor = factor[part, None]
        scores = (self.query[part] * factor) @ self.gallery.T
        scores -= factor + np.float32(1 - self.lam)
        near = _similarities(self.mine[part], self.others)
        scores[np.repeat(np.arange(len(scores)), np.diff(near.indptr)), near.indices] += (1 - self.lam) * near.data
        return scores


def jaccard(features: np.ndarray, config: RerankConfig) -> csr_matrix:
    """1 - Jaccard distance of all pairs that share a neighbour, float32 sparse [N, N]; where nothing stands it is 0.

    features: float32 [N, D], L2-normalised. For clustering; the distance of an image to itself is 0 up to rounding.
    """
    features = _unit("image", features)
    found, _ = weights(features, config)
    columns, rows, count = found.T.tocsr(), [], len(features)
    lengths = np.diff(columns.indptr)
    with Meter(count, "overlaps") as meter:
        for part in blocks(count, 24 * int((lengths.astype(np.int64) ** 2).sum() // max(1, count))):
            rows.append(_similarities(found[part], columns))
            meter.advance(part.stop - part.start)
    indices, data = (np.concatenate([getattr(row, name) for row in rows]) for name in ("indices", "data"))
    pointers = np.append(0, np.cumsum(np.concatenate([np.diff(row.indptr) for row in rows])))
    return csr_matrix((data, indices, pointers), shape=(count, count))
