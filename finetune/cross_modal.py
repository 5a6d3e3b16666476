"""Search between sentences and images: rank-k and mAP both ways, and the second look of Han et al. 2021.

Text to image: every caption of the split searches all its images, each image once, however many captions it has; right
are all images of the person. Image to text: every image searches all captions. There is no camera rule. Rank-k asks
whether the first right one is among the first k; average precision is that of metrics.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from scipy.sparse import csr_matrix

from finetune.metrics import Protocol, Retrieval, Scores, evaluate
from recipes.errors import UserError
from recipes.load import Section
from shards.embeddings import EmbeddingTable, Keys
from shards.schema import UNKNOWN

RANKS = (1, 5, 10)
KEEP = Protocol(same_camera="keep")
BLOCK_BYTES = 64 << 20  # memory for cosines while neighbours are looked for


class CrossModalConfig(Section):
    """The second look, section 3.4 of the paper (arXiv 2110.10807)."""

    k: int = Field(0, ge=0)  # neighbours of each; 5 in the paper, 0: no second look
    alpha: float = Field(0.05, ge=0)  # weight of the overlap beside the cosine


class Side(NamedTuple):
    """One side of a search."""

    features: np.ndarray  # float32 [N, F], L2-normalised
    pids: np.ndarray  # int64 [N]

    def table(self, name: str) -> EmbeddingTable:
        """For metrics.evaluate. name: what the keys begin with, so that no row of one side is taken for one of the
        other."""
        keys = Keys(f"{name}-{row}" for row in range(len(self.pids)))
        return EmbeddingTable(self.features, self.pids, np.full(len(self.pids), UNKNOWN, np.int64), keys)


def nearest(features: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """The k rows of `others` [N, F] with the largest products for each row of `features` [M, F]: int64 [M, k], in
    ascending order of the row; of equal products the lower rows."""
    found = np.empty((len(features), k), np.int64)
    step = max(1, BLOCK_BYTES // (8 * len(others)))
    for start in range(0, len(features), step):
        products = features[start : start + step] @ others.T
        found[start : start + step] = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.sort(found, axis=1)


def _sets(rows: np.ndarray, count: int) -> csr_matrix:
    """Neighbours int64 [M, k] -> float32 sparse [M, count], 1 where a row is one."""
    pointers = np.arange(0, rows.size + 1, rows.shape[1])
    return csr_matrix((np.ones(rows.size, np.float32), rows.ravel(), pointers), shape=(len(rows), count))


def overlap(rows: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Jaccard index of the neighbours of each pair, |A and B| / |A or B|: float32 [M, N].

    rows: int64 [M, k], others: int64 [N, k], both out of the same `count` rows.
    """
    shared = (_sets(rows, count) @ _sets(others, count).T).toarray()
    return shared / (2 * rows.shape[1] - shared)


class SecondLook:
    """s'(a, b) = s(a, b) + alpha |N(a) and N(b)| / |N(a) or N(b)|, section 3.4 of the paper: a sentence and an image
    that have the same images for neighbours belong together. N: the k nearest rows of the searched side, b its own one.

    The published code walks over all pairs in Python; here the neighbours are the non-zeros of two sparse matrices.
    """

    def __init__(self, asked: np.ndarray, there: np.ndarray, config: CrossModalConfig):
        """asked: float32 [M, F], there: [N, F], both L2-normalised. UserError where k is more than N."""
        assert config.k > 0, "0 is no second look"
        if config.k > len(there):
            raise UserError(f"cross_modal.k = {config.k} neighbours of {len(there)} rows; set it lower")
        self.asked, self.there, self.alpha = asked, there, config.alpha
        self.rows, self.others = nearest(asked, there, config.k), nearest(there, there, config.k)

    def scores(self, part: slice) -> np.ndarray:
        """Of the asked rows `part` with all others, float32 [B, N]."""
        shared = overlap(self.rows[part], self.others, len(self.there))
        return self.asked[part] @ self.there.T + np.float32(self.alpha) * shared


def _numbers(found: Retrieval) -> dict[str, Any]:
    return {"mAP": found.mAP, **{f"rank{k}": found.rank(k) for k in RANKS}, "mINP": found.mINP,
            "valid": found.valid, "skipped": found.skipped}  # fmt: skip


def search(asked: Side, there: Side, names: tuple[str, str], scores: Scores | None = None) -> Retrieval:
    """One direction. names: of the two sides, for messages. UserError where nobody can be found."""
    return evaluate(asked.table(names[0]), there.table(names[1]), KEEP, scores=scores)


def both_ways(images: Side, texts: Side, config: CrossModalConfig) -> dict[str, Any]:
    """Text to image ("t2i") and image to text ("i2t"): mAP, rank1, rank5, rank10, mINP, queries that count and that
    were skipped; with config.k also "t2i_second", "i2t_second" after the second look."""
    told: dict[str, Any] = {"images": len(images.pids), "captions": len(texts.pids)}
    ways: Sequence[tuple[str, Side, Side, tuple[str, str]]] = (
        ("t2i", texts, images, ("caption", "image")),
        ("i2t", images, texts, ("image", "caption")),
    )
    for way, asked, there, names in ways:
        told[way] = _numbers(search(asked, there, names))
        if config.k:
            again = SecondLook(asked.features, there.features, config)
            told[f"{way}_second"] = _numbers(search(asked, there, names, again.scores))
    return told


def sentence(told: dict[str, Any]) -> str:
    """For the terminal: both directions of `both_ways`, in per cent."""
    ways = {"t2i": "text to image", "i2t": "image to text"}
    parts = []
    for way, name in ways.items():
        for key, more in ((way, ""), (f"{way}_second", " after the second look")):
            if key in told:
                ranks = " / ".join(f"{100 * told[key][f'rank{k}']:.2f}" for k in RANKS)
                parts.append(f"{name}{more}: rank 1/5/10 {ranks}, mAP {100 * told[key]['mAP']:.2f}")
    return f"{told['captions']} captions, {told['images']} images; " + "; ".join(parts)
