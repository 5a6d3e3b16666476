"""Losses of supervised identity learning: cross-entropy on the classifier, batch-hard triplet on the feature."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section


class IdLossesConfig(Section):
    """Weights and forms; the defaults are those of the published PersonViT fine-tuning code."""

    id_weight: float = Field(1.0, ge=0)  # of the cross-entropy
    triplet_weight: float = Field(1.0, ge=0)
    margin: float | None = Field(None, ge=0)  # of the triplet, in feature distance; None is the soft margin
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # epsilon, spread over all C classes (epsilon/C each)


def pairwise_distances(features: Tensor) -> Tensor:
    """Euclidean distances [B, B] of features [B, D] in float32, >= 1e-6.

    Distances in half precision lose the difference that the triplet is about, so autocast is off here. The clamp keeps
    the square root's gradient finite where two rows are equal.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        squares = features.square().sum(dim=1)
        squared = squares[:, None] + squares[None, :] - 2 * features @ features.T
        return squared.clamp(min=1e-12).sqrt()


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss, Hermans et al. 2017 (arXiv 1703.07737), eq. 5; soft margin: section 2 of the same.

    For each anchor a: d_ap = max distance to another row of its identity, d_an = min distance to another identity;
    mean over anchors of [margin + d_ap - d_an]_+, or of log(1 + exp(d_ap - d_an)) when margin is None.

    features: [B, D], not normalised. labels: int64 [B], any order, any number of rows an identity. Anchors that have no
    other row of their identity, or no other identity, in the batch do not count; 0 when none counts. Returns a scalar.
    """
    distances = pairwise_distances(features)
    same = labels[:, None] == labels[None, :]  # True: the same identity
    other_row = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)  # True: not the anchor itself
    positive = same & other_row
    farthest = distances.masked_fill(~positive, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    counts = positive.any(dim=1) & (~same).any(dim=1)
    gap = torch.where(counts, farthest - nearest, 0.0)  # keeps infinities out of the gradient
    loss = F.softplus(gap) if margin is None else F.relu(gap + margin)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


class IdLosses(nn.Module):
    """The weighted losses of a batch by name."""

    def __init__(self, config: IdLossesConfig):
        super().__init__()
        self.id_weight, self.triplet_weight = config.id_weight, config.triplet_weight
        self.margin, self.label_smoothing = config.margin, config.label_smoothing

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits: [B, C] of the classifier. features: [B, D] before the neck. labels: int64 [B] in 0..C-1."""
        losses = {}
        if self.id_weight:
            entropy = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
            losses["id"] = self.id_weight * entropy
        if self.triplet_weight:
            losses["triplet"] = self.triplet_weight * batch_hard_triplet(features, labels, self.margin)
        return losses
