"""The triplet loss on local features: AlignedReID (arXiv 1711.08184)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from finetune.aligned_distance import all_elements, diagonal, elements, shortest
from recipes.load import Section


class LocalTripletConfig(Section):
    """How the local features are compared in training."""

    weight: float = Field(1.0, ge=0)  # 0: no such loss
    margin: float | None = Field(0.3, ge=0)  # in aligned distance; None is the soft margin
    # False: on the triplets that the global feature finds hardest, as in the paper; True: on its own hardest ones
    own_hard: bool = False
    aligned: bool = True  # False: stripe by stripe, for comparison
    normalize: bool = (
        False  # stripes of length 1 before they are compared: distances at most tanh 1, and smaller gradients
    )
    per_cell: bool = False  # divided by the 2H - 1 cells of a path, so that a margin means the same for any H


class Triplets(NamedTuple):
    """For each row of a batch its hardest triplet."""

    positive: Tensor  # int64 [B], another row of its identity
    negative: Tensor  # int64 [B], a row of another identity
    counts: Tensor  # bool [B], False: there is none of the two


def mined(distances: Tensor, labels: Tensor) -> Triplets:
    """The farthest row of the same identity and the nearest of another one. distances: [B, B]. labels: int64 [B]."""
    same = labels[:, None] == labels[None, :]  # True: the same identity
    other_row = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = same & other_row
    return Triplets(
        distances.masked_fill(~positive, -torch.inf).argmax(dim=1),
        distances.masked_fill(same, torch.inf).argmin(dim=1),
        positive.any(dim=1) & (~same).any(dim=1),
    )


def _loss(positive: Tensor, negative: Tensor, counts: Tensor, margin: float | None) -> Tensor:
    gap = torch.where(counts, positive - negative, 0.0)
    loss = F.softplus(gap) if margin is None else F.relu(gap + margin)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


def local_distances(a: Tensor, b: Tensor, config: LocalTripletConfig) -> Tensor:
    """Of rows that belong together, [B, H, c] and [B, H, c] -> [B]."""
    return _reduced(elements(a, b), config)


def all_local_distances(parts: Tensor, config: LocalTripletConfig) -> Tensor:
    """Of each row with each, [B, H, c] -> [B, B]."""
    return _reduced(all_elements(parts, parts), config)


def _reduced(d: Tensor, config: LocalTripletConfig) -> Tensor:
    """d: [..., H, H]."""
    found = shortest(d) if config.aligned else diagonal(d)
    cells = 2 * d.shape[-1] - 1 if config.aligned else d.shape[-1]
    return found / cells if config.per_cell else found


def prepared(parts: Tensor, config: LocalTripletConfig) -> Tensor:
    """The stripes as they are compared. parts: [B, H, c]."""
    return F.normalize(parts.float(), dim=-1) if config.normalize else parts.float()


def local_triplet(parts: Tensor, labels: Tensor, triplets: Triplets, config: LocalTripletConfig) -> Tensor:
    """The loss, not weighted; 0 where no row has a triplet. parts: [B, H, c] of `prepared`. triplets: by the global
    distance."""
    if config.own_hard:
        distances = all_local_distances(parts, config)
        with torch.no_grad():
            triplets = mined(distances, labels)
        rows = torch.arange(len(labels), device=labels.device)
        return _loss(distances[rows, triplets.positive], distances[rows, triplets.negative], triplets.counts,
                     config.margin)  # fmt: skip
    far = local_distances(parts, parts[triplets.positive], config)
    near = local_distances(parts, parts[triplets.negative], config)
    return _loss(far, near, triplets.counts, config.margin)
