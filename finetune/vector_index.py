"""Nearest vectors through any index of faiss: trained, tuned, searched; vectors keep their ids when others come and go.

What the string of `faiss.index_factory` stands for decides how much is searched: `Flat` compares with everything,
`IVF4096,...` with the vectors of the `nprobe` nearest of 4096 cells, `...,PQ48` with a code of 48 bytes instead of the
vector. An index that holds codes only, or ranks by something else than the cosine, gives candidates; the vectors
themselves then stay on disk and the candidates are ordered by their true cosine.
"""

import re
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from recipes.errors import UserError
from recipes.progress import Meter

LARGE = 1_000_000  # vectors; up to here an exhaustive search takes a fraction of a second
PER_CELL = 64  # training vectors a cell of an IVF
ROUNDS = 10  # of k-means, for cells and codes; faiss's 25 take 2.5 times as long
CODE_TRAINING = 32_768  # training vectors for codes: 128 for each of the 256 values of a byte
CANDIDATES = 10  # times the wanted answers, at least 100: how many are ordered by the true cosine
TOGETHER = 64  # queries whose candidates are read at a time
BLOCK = 65_536  # vectors that are added at a time
RECALL_AT, SAMPLE, TARGET = 10, 500, 0.95  # neighbours, queries, and the recall that nprobe is chosen for
GAIN = 0.005  # doubling nprobe for less than this, twice, is not worth it


def default_factory(count: int, dim: int) -> str:
    """`Flat` up to a million vectors; above IVF-PQ with about 4 sqrt(N) cells and a byte for 8 numbers or fewer."""
    if count <= LARGE:
        return "Flat"
    cells = 2 ** round(np.log2(4 * np.sqrt(count)))
    codes = next(codes for codes in range(-(-dim // 8), dim + 1) if dim % codes == 0)
    return f"IVF{cells},PQ{codes}"


def _make(factory: str, dim: int) -> faiss.Index:
    """An empty index by inner product that takes ids; UserError for what faiss refuses."""
    if "IDMap" in factory:
        raise UserError(f"--factory {factory}: leave IDMap away, ids are kept in any case")
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        told = re.sub(r"\s+", " ", str(error)).rpartition("failed: ")[2][:120]
        raise UserError(f"--factory {factory!r} is nothing that faiss can make of {dim} numbers ({told}); "
                        "examples: Flat, HNSW32, IVF4096,PQ48") from error  # fmt: skip
    cells = faiss.try_extract_index_ivf(index)
    for part in (cells, faiss.downcast_index(cells) if cells is not None else index):
        for clustering in (getattr(part, "cp", None), getattr(getattr(part, "pq", None), "cp", None)):
            if clustering is not None:
                clustering.niter, clustering.max_points_per_centroid = ROUNDS, CODE_TRAINING // 256
                clustering.min_points_per_centroid = 1  # else faiss warns once for each part of the code
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # a minute for an order of the codes that is of no use here
    if cells is not None:
        cells.cp.max_points_per_centroid = PER_CELL
    # an IVF, also behind a transform, keeps ids itself; everything else gets a table of them
    return index if isinstance(index, faiss.IndexIVF | faiss.IndexPreTransform) and cells else faiss.IndexIDMap2(index)


def _is_exact(index: faiss.Index) -> bool:
    """Whether what it holds are the vectors, and its scores their inner products."""
    if isinstance(index, faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    kinds = faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat
    return isinstance(index, kinds) and index.metric_type == faiss.METRIC_INNER_PRODUCT


class VectorIndex:
    """Unit vectors with ids.

    ids: int64 [N], ascending. vectors: float32 [N, D], may be mapped; None where the index is exact. factory: what it
    was made by. nprobe: cells that a query looks into; 0 where there are no cells.
    """

    def __init__(self, index: faiss.Index, factory: str, ids: np.ndarray, vectors: np.ndarray | None, nprobe: int):
        self.index, self.factory, self.ids, self.vectors, self.nprobe = index, factory, ids, vectors, nprobe
        self.exact = _is_exact(index)
        self.cells = faiss.try_extract_index_ivf(index.index if isinstance(index, faiss.IndexIDMap) else index)
        assert self.exact or vectors is not None, "codes alone do not give cosines"

    @classmethod
    def build(cls, factory: str, ids: np.ndarray, vectors: np.ndarray, silent: bool = False) -> "VectorIndex":
        """Train on evenly spaced vectors and add all. vectors: float32 [N, D] of length 1, N > 0; mapped, they are
        read block by block. UserError where the index is unknown or needs more vectors for its training."""
        index = _make(factory, vectors.shape[1])
        built = cls(index, factory, ids[:0], vectors[:0], 0)
        if not index.is_trained:
            cells = built.cells
            wanted = CODE_TRAINING if cells is None else max(PER_CELL * cells.nlist, CODE_TRAINING)
            sample = np.ascontiguousarray(vectors[:: max(1, len(vectors) // wanted)][:wanted], dtype=np.float32)
            if not silent:
                print(f"training {factory} on {len(sample):,} vectors", file=sys.stderr, flush=True)
            try:
                index.train(sample)
            except RuntimeError as error:
                told = re.sub(r"\s+", " ", str(error)).rpartition("failed: ")[2][:160]
                raise UserError(f"--factory {factory} cannot be trained on {len(sample):,} images ({told}); take fewer "
                                "cells or shorter codes, or Flat") from error  # fmt: skip
        built.add(ids, vectors, vectors, silent)
        if built.cells is not None:
            built.nprobe = min(int(built.cells.nlist), 8)
        return built

    def add(self, ids: np.ndarray, new: np.ndarray, vectors: np.ndarray | None, silent: bool = False) -> None:
        """More vectors. ids: int64 [n], above all that were ever given. new: float32 [n, D]. vectors: all of them,
        [N + n, D], kept where the index is not exact."""
        assert not len(self.ids) or not len(ids) or ids[0] > self.ids[-1]
        with Meter(len(ids), "index", "vectors", silent=silent) as meter:
            for start in range(0, len(ids), BLOCK):
                part = np.ascontiguousarray(new[start : start + BLOCK], dtype=np.float32)
                self.index.add_with_ids(part, ids[start : start + BLOCK])
                meter.advance(len(part))
        self.ids = np.concatenate([self.ids, ids])
        self.vectors = None if self.exact else vectors

    def remove(self, kept: np.ndarray, vectors: np.ndarray | None, silent: bool = False) -> None:
        """Keep only some. kept: bool [N]. vectors: float32, those that stay, where the index is not exact."""
        gone, self.ids = self.ids[~kept], self.ids[kept]
        self.vectors = None if self.exact else vectors
        try:
            self.index.remove_ids(faiss.IDSelectorBatch(gone))
        except RuntimeError:  # a graph, for example: filled again, what was trained stays
            if self.exact:
                rows = np.flatnonzero(kept)
                inner = self.index.index
                vectors = np.stack([inner.reconstruct(int(row)) for row in rows]) if len(rows) else None
            self.index.reset()
            ids, self.ids = self.ids, self.ids[:0]
            if len(ids):
                self.add(ids, vectors, vectors, silent)
        assert self.index.ntotal == len(self.ids), (self.index.ntotal, len(self.ids))

    def search(self, queries: np.ndarray, top: int, nprobe: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 [M, top] and ids int64 [M, top], best first; -inf and -1 where the cells hold fewer.

        queries: float32 [M, D] of length 1. nprobe: instead of the chosen one.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.cells is not None:
            self.cells.nprobe = nprobe or self.nprobe
        top = min(top, len(self.ids))
        if not top or not len(queries):
            return np.zeros((len(queries), top), np.float32), np.zeros((len(queries), top), np.int64)
        if self.exact:
            scores, ids = self.index.search(queries, top)
            scores[ids < 0] = -np.inf
            return scores, ids
        wanted = min(len(self.ids), max(CANDIDATES * top, 100))
        ids = self.index.search(queries, wanted)[1]
        scores = np.full(ids.shape, -np.inf, np.float32)
        rows = np.searchsorted(self.ids, ids)  # of -1 the first, whose score is not taken
        for start in range(0, len(ids), TOGETHER):
            part = slice(start, start + TOGETHER)
            cosines = (self.vectors[rows[part]] @ queries[part, :, None])[:, :, 0]
            scores[part] = np.where(ids[part] >= 0, cosines, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def recall(self, queries: np.ndarray, own: np.ndarray, truth: np.ndarray, nprobe: int | None = None) -> float:
        """Share of the true neighbours that a search finds. own: int64 [M], ids that the queries have themselves;
        they do not count. truth: int64 [M, k], ids."""
        found = self.search(queries, truth.shape[1] + 1, nprobe)[1]
        hits = [
            len(np.intersect1d([i for i in row.tolist() if i != mine][: truth.shape[1]], true))
            for row, mine, true in zip(found, own, truth, strict=True)
        ]
        return float(np.mean(hits) / truth.shape[1])

    def tune(self, vectors: np.ndarray, target: float = TARGET, sample: int = SAMPLE) -> dict[str, Any] | None:
        """Measure recall against exact search on evenly spaced vectors, and choose the smallest power of two for nprobe
        that reaches `target`, or the one after which more gains little. Returns what was measured; None for an index
        that is exhaustive, or of a single vector. vectors: float32 [N, D], all of them."""
        k = min(RECALL_AT, len(self.ids) - 1)
        if k < 1 or (self.exact and self.factory == "Flat"):
            return None
        rows = np.unique(np.linspace(0, len(self.ids) - 1, sample).astype(np.int64))
        queries, own = np.ascontiguousarray(vectors[rows], dtype=np.float32), self.ids[rows]
        truth = exact_neighbours(vectors, rows, k)
        steps: list[tuple[int, float]] = []
        while True:
            nprobe = 0 if self.cells is None else min(2 ** len(steps), self.cells.nlist)
            steps.append((nprobe, self.recall(queries, own, self.ids[truth], nprobe)))
            stuck = len(steps) > 2 and steps[-1][1] - steps[-3][1] < GAIN
            if steps[-1][1] >= target or stuck or self.cells is None or nprobe == self.cells.nlist:
                break
        self.nprobe, found = steps[-3] if stuck and steps[-1][1] < target else steps[-1]
        return {"at": k, "recall": found, "nprobe": self.nprobe, "target": target, "queries": len(rows)}

    def save(self, path: Path) -> None:
        """Write the index; the vectors are somebody else's."""
        faiss.write_index(self.index, str(path))

    @classmethod
    def load(cls, path: Path, factory: str, ids: np.ndarray, vectors: np.ndarray | None, nprobe: int) -> "VectorIndex":
        """What `save` wrote; UserError where it is damaged or of other vectors."""
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read as an index of faiss; build the gallery again") from error
        if index.ntotal != len(ids):
            raise UserError(f"{path} holds {index.ntotal} vectors for {len(ids)} ids; build the gallery again")
        return cls(index, factory, ids, vectors, nprobe)


def exact_neighbours(vectors: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k rows nearest to each of `rows`, without itself, int64 [M, k]. vectors: float32 [N, D], k < N."""
    queries = np.ascontiguousarray(vectors[rows], dtype=np.float32)
    found = faiss.knn(queries, vectors, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    # of equal vectors another may stand in its place
    return np.stack([np.array([i for i in row if i != own][:k]) for row, own in zip(found, rows, strict=True)])
