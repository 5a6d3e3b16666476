"""Losses of supervised identity learning: cross-entropy on the classifier, triplet and centres on the feature."""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from finetune.centre_loss import CentreLoss
from recipes.load import Section


class IdLossesConfig(Section):
    """Weights and forms; the defaults are those of the published PersonViT fine-tuning code."""

    id_weight: float = Field(1.0, ge=0)  # of the cross-entropy
    triplet_weight: float = Field(1.0, ge=0)
    centre_weight: float = Field(0.0, ge=0)  # 5e-4 in BoT; 0: no centres
    margin: float | None = Field(None, ge=0)  # of the triplet, in feature distance; None is the soft margin
    # where the triplets are mined: in the images of each process, as published, or in the whole batch, so that the
    # number of processes does not matter
    mining: Literal["local", "global"] = "local"
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # epsilon, in probability; 0.1 in BoT
    # the classes that share epsilon: "all" C, epsilon/C each (BoT), or the C - 1 "others" (fast-reid)
    smooth_over: Literal["all", "others"] = "all"


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


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, epsilon: float, over: Literal["all", "others"]) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7), mean over the images.

    The target gives each class epsilon/C and the rest to the label ("all"), or each wrong class epsilon/(C - 1) and
    1 - epsilon to the label ("others"). logits: [B, C], C >= 2 for "others". labels: int64 [B]. Returns a scalar.
    """
    if over == "all" or not epsilon:
        return F.cross_entropy(logits.float(), labels, label_smoothing=epsilon)
    surprise = -F.log_softmax(logits.float(), dim=1)  # [B, C]
    own = surprise.gather(1, labels[:, None])[:, 0]
    others = (surprise.sum(dim=1) - own) / (logits.shape[1] - 1)
    return ((1 - epsilon) * own + epsilon * others).mean()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: Tensor) -> Tensor:
    """Rows [B, ...] of each process -> those of all, [P * B, ...], in the order of the processes. No gradient."""
    if processes() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


class GatheredFeatures(torch.autograd.Function):
    """`gathered` with gradient, for a loss of the whole batch that every process computes alike.

    The gradient of that loss for all rows is then known to each process: it takes that of its own rows and needs no
    message. DistributedDataParallel divides the sum over the processes by their number, as befits a mean of P losses;
    here it is one loss, so the gradient is multiplied by P.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.count = len(features)
        return gathered(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.count
        return processes() * gradient[first : first + ctx.count]


class IdLosses(nn.Module):
    """The weighted losses of a batch by name: "id", "triplet", "centre"; those of weight 0 are left out.

    dim: D of the features. classes: C.
    """

    def __init__(self, config: IdLossesConfig, dim: int, classes: int):
        super().__init__()
        self.config = config
        self.centres = CentreLoss(dim, classes) if config.centre_weight else None
        self.seen: list[tuple[Tensor, Tensor]] = []  # features and labels since the last step

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits: [B, C] of the classifier. features: [B, D] before the neck. labels: int64 [B] in 0..C-1."""
        config, losses = self.config, {}
        if config.id_weight:
            entropy = smoothed_cross_entropy(logits, labels, config.label_smoothing, config.smooth_over)
            losses["id"] = config.id_weight * entropy
        if config.triplet_weight:
            rows, names = features, labels
            if config.mining == "global" and processes() > 1:
                rows, names = GatheredFeatures.apply(features.float()), gathered(labels)
            losses["triplet"] = config.triplet_weight * batch_hard_triplet(rows, names, config.margin)
        if self.centres is not None:
            losses["centre"] = config.centre_weight * self.centres(features, labels)
            if self.training:
                self.seen.append((features.detach().float(), labels))
        return losses

    def end_step(self) -> None:
        """After the optimiser step: move the centres by the images of all processes since the last step."""
        if self.centres is None or not self.seen:
            return
        features, labels = (gathered(torch.cat(part)) for part in zip(*self.seen, strict=True))
        self.centres.update(features, labels)
        self.seen.clear()
