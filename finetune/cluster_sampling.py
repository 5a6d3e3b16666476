"""P x Z batches from clusters: P clusters with Z images each, as many batches an epoch as the recipe says.

Of each cluster an anchor is drawn, and beside it images of other cameras where it has some: two images of one camera
teach little (the multi-gallery sampler of SpCL and Cluster Contrast).
"""

from typing import Literal

import numpy as np
from pydantic import Field

from recipes.load import Section
from shards.seeds import generator


class ClusterSamplingConfig(Section):
    """What an epoch draws; P and Z are the recipe's `sampling` section."""

    iterations: int = Field(200, ge=1)  # steps an epoch, whatever the number of images or clusters
    # "other": beside an anchor come images of other cameras; published, but who knows cameras has labels of a kind.
    # "any": nobody looks at the cameras
    cameras: Literal["other", "any"] = "other"


def _companions(rows: np.ndarray, cameras: np.ndarray | None, count: int, rng: np.random.Generator) -> list[int]:
    """An anchor and count - 1 other images of one cluster.

    Of other cameras than the anchor's where the cluster has some, else the other images; drawn again and again where
    these are too few. An image that is alone in its cluster comes `count` times.

    rows: int64 [M] of the cluster. cameras: int64 [N] of all rows; None: not looked at.
    """
    anchor = int(rng.choice(rows))
    others = rows[rows != anchor]
    if cameras is not None and (apart := cameras[others] != cameras[anchor]).any():
        others = others[apart]
    if not len(others):
        return [anchor] * count
    return [anchor, *rng.choice(others, count - 1, replace=len(others) < count - 1).tolist()]


def cluster_batches(
    labels: np.ndarray, cameras: np.ndarray | None, shape: tuple[int, int], iterations: int, seed: int, epoch: int
) -> np.ndarray:
    """The batches of an epoch, a pure function of its arguments.

    The clusters pass by in a new random order again and again, P at a time; what is left of a pass when fewer than P
    are, is left out of it. Where there are fewer than P in all, a batch has each of them several times, with other
    draws, so that batches keep their size.

    labels: int64 [N], 0..K-1 each used, negative for images that are left out. cameras: int64 [N], or None. shape: P
    clusters a batch, Z images a cluster. Returns int64 [iterations, P * Z] of positions in `labels`, the Z images of a
    cluster adjacent.
    """
    per_batch, per_cluster = shape
    inside = np.flatnonzero(labels >= 0)
    assert len(inside), "the caller knows that there are clusters"
    order = inside[np.argsort(labels[inside], kind="stable")]
    clusters = np.split(order, np.cumsum(np.bincount(labels[inside]))[:-1])
    rng, chosen = generator(seed, "cluster_sampling", epoch), []
    while len(chosen) < iterations * per_batch:
        turn = rng.permutation(len(clusters))
        if len(turn) < per_batch:
            turn = np.resize(turn, per_batch)  # repeats it
        chosen.extend(turn[: len(turn) // per_batch * per_batch].tolist())
    drawn = [_companions(clusters[name], cameras, per_cluster, rng) for name in chosen[: iterations * per_batch]]
    return np.array(drawn, np.int64).reshape(iterations, per_batch * per_cluster)
