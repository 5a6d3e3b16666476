"""Nearest neighbours: exact top-k by inner product."""

import faiss
import numpy as np

from recipes.errors import UserError


def _checked(name: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2:
        raise UserError(f"the {name} features have shape {features.shape}, expected [rows, dimensions]")
    # a NaN compares false with everything, and faiss would return the row -1 for it without a word
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise UserError(f"the {name} features hold a value that is not finite in row {row}; embed the images again")
    return np.ascontiguousarray(features, dtype=np.float32)


def search(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows with the largest inner product, best first.

    gallery: float32 [N, D]. queries: float32 [M, D]. k: 1..N. With L2-normalised features the score is the cosine in
    -1..1. Returns scores float32 [M, k] and rows int64 [M, k]. Exact (faiss IndexFlatIP); the order of equal scores is
    faiss's own and not promised. Meant for small k: whole rankings are cheaper by counting.
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
    scores, rows = index.search(queries, k)
    return scores, rows.astype(np.int64, copy=False)
