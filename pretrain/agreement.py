"""How well a backbone tells images apart when it sees them twice: scores that need no labels.

Every image is seen in V random views. A good feature finds the other views of the same image among those of all
images, and uses many directions to do so. Which score follows the accuracy of a search, see docs/adapting.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import photometric, views

NUMBERS = views.NUMBERS + photometric.NUMBERS  # random numbers of a view
CHUNK = 4096  # rows of a similarity matrix in memory at a time
LIDAR_DELTA = 1e-4  # added to the within-class covariance, arXiv 2312.04000 section 4


class Scores(NamedTuple):
    """What is told of a backbone."""

    rank1: float  # share of views whose nearest view is of the same image, in [1 / N or 0, 1]
    mrr: float
    rankme: float
    lidar: float


def reciprocal_ranks(first: Tensor, second: Tensor) -> Tensor:
    """1 / rank of second[i] among all of `second`, ordered by cosine with first[i]; float32 [N] in [1 / N, 1].

    first, second: float [N, D], two views of the same N images. Others that are as near count as nearer, so features
    that are all equal get 1 / N.
    """
    first, second = (torch.nn.functional.normalize(x.float(), dim=1) for x in (first, second))
    ranks = []
    for at in range(0, len(first), CHUNK):
        near = first[at : at + CHUNK] @ second.T
        own = near.gather(1, torch.arange(at, at + len(near), device=near.device)[:, None])
        ranks.append((near >= own).sum(1))
    return 1 / torch.cat(ranks)


def entropy_rank(weights: Tensor) -> float:
    """exp of the entropy of weights [K] >= 0 after scaling to the sum 1: how many of them count; in [1, K]."""
    p = weights.double().clamp(min=0)
    p = p / p.sum().clamp(min=1e-300)
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))


def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885, eq. 1-2) of float [N, D]: in [1, min(N, D)]."""
    return entropy_rank(torch.linalg.svdvals(features.double()))


def lidar(features: Tensor) -> float:
    """LiDAR (Thilak et al., arXiv 2312.04000): effective rank of the linear discriminant analysis that tells images apart by their views.

    features: [N, V, D].
    """
    x = features.double()
    means = x.mean(1)
    between = torch.cov(means.T, correction=0)
    inside = (x - means[:, None]).flatten(0, 1)
    within = inside.T @ inside / len(inside) + LIDAR_DELTA * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(within)
    root = vectors * values.clamp(min=LIDAR_DELTA).rsqrt() @ vectors.T
    return entropy_rank(torch.linalg.eigvalsh(root @ between @ root))
