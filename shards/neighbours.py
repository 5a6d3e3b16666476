"""Nearest neighbours: exact top-k by inner product."""

from collections.abc import Callable

import faiss
import numpy as np

from recipes.errors import UserError

BLOCK = 4096  # queries searched at once


def _checked(name: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2:
        raise UserError(f"the {name} features have shape {features.shape}, expected [rows, dimensions]")
    # a NaN compares false with everything, and faiss would return the row -1 for it without a word
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise UserError(f"the {name} features hold a value that is not finite in row {row}; embed the images again")
    return np.ascontiguousarray(features, dtype=np.float32)


def search(
    gallery: np.ndarray, queries: np.ndarray, k: int, advance: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows with the largest inner product, best first.

    gallery: float32 [N, D]. queries: float32 [M, D]. k: 1..N. With L2-normalised features the score is the cosine in
    -1..1. Returns scores float32 [M, k] and rows int64 [M, k]. Exact (faiss IndexFlatIP); the order of equal scores is
    faiss's own and not promised. Meant for small k: whole rankings are cheaper by counting. advance: is told of each
    block of queries that is done.
    """
    gallery, queries = _checked("gallery", gallery), _checked("query", queries)
    if gallery.shape[1] != queries.shape[1]:
        raise UserError(
            f"gallery features have {gallery.shape[1]} dimensions and query features {queries.shape[1]}; "
            "embed both with the same model"
        )
    if not 1 <= k <= len(gallery):
        raise UserError(
            f"k = {k} neighbours were asked of a gallery of {len(gallery)} images; ask for 1..{len(gallery)}"
        )
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), BLOCK):
        part = slice(start, start + BLOCK)
        scores[part], rows[part] = index.search(queries[part], k)
        if advance:
            advance(len(queries[part]))
    return scores, rows
