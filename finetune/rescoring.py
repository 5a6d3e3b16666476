"""The second stage of a search: the first answers of the global feature, ordered anew by local features.

A local distance such as that of AlignedReID (arXiv 1711.08184) cannot live in a FAISS index, and to take it of every
pair costs minutes. So the global feature finds the candidates, and only they are compared by local features as well.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recipes.load import Section

Distance = Callable[[Tensor, Tensor, bool], Tensor]  # [q, H, c], [g, H, c], whether aligned -> [q, g]
Kind = Literal["local", "both", "unaligned"]


class RescoringConfig(Section):
    """By what the first answers are ordered anew."""

    # "local": the local distance; "both": the Euclidean distance of the global features + weight * the local one;
    # "unaligned": the local features stripe by stripe, to see what the alignment is worth
    distances: tuple[Kind, ...] = ()
    candidates: int = Field(100, ge=0)  # first answers of the global feature; 0 = all, which takes long
    weight: float = Field(1.0, ge=0)  # of the local distance in "both"


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Ascending places of the `count` largest values; of equal ones the first, as everywhere in a search."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


class Rescored:
    """A search with a second stage: scores of queries against the whole gallery, for metrics.evaluate.

    query, gallery: global features, float32 [q, F] and [g, F], L2-normalised; the local ones [q, H, c] and [g, H, c].
    What is no candidate keeps its global order, behind all candidates.
    """

    def __init__(
        self, globals_: tuple[np.ndarray, np.ndarray], locals_: tuple[np.ndarray, np.ndarray], distance: Distance,
        kind: Kind, config: RescoringConfig,
    ):  # fmt: skip
        self.query, self.gallery = (np.asarray(part, np.float32) for part in globals_)
        self.local_query, self.local_gallery = (torch.from_numpy(np.ascontiguousarray(part)) for part in locals_)
        self.distance, self.kind, self.config = distance, kind, config
        self.count = min(config.candidates or len(self.gallery), len(self.gallery))

    def _apart(self, row: int, cosines: np.ndarray, chosen: np.ndarray | slice) -> np.ndarray:
        """Distances of a query to chosen gallery images, float32 [K]. cosines: [K]."""
        query = self.local_query[row : row + 1].float()
        local = self.distance(query, self.local_gallery[chosen].float(), self.kind != "unaligned")[0].numpy()
        if self.kind != "both":
            return local
        return np.sqrt(np.maximum(2 - 2 * cosines, 0)) + np.float32(self.config.weight) * local

    def scores(self, part: slice) -> np.ndarray:
        """float32 [B, g] of these queries, higher is nearer."""
        scores = self.query[part] @ self.gallery.T
        for line, row in enumerate(range(part.start, part.stop)):
            cosines = scores[line]
            if self.count == len(cosines):
                scores[line] = -self._apart(row, cosines, slice(None))
                continue
            chosen = _largest(cosines, self.count)
            apart = self._apart(row, cosines[chosen], chosen)
            scores[line] -= 3 + apart.max()  # cosines of -1 to 1 come to lie below every candidate
            scores[line, chosen] = -apart
        return scores

    def order(self, row: int) -> np.ndarray:
        """Gallery rows in the order of the answers to a query, int64 [g]."""
        return np.argsort(-self.scores(slice(row, row + 1))[0], kind="stable")
