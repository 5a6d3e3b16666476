"""Losses between images and sentences.

InfoNCE both ways, alignment and shared identities (Han et al. 2021, arXiv 2110.10807, section 3; alignment from Wang et
al. 2020, ViTAA, arXiv 2005.07327), and SDM (Jiang and Ye 2023, IRRA, arXiv 2303.12501) as a newer one. All in float32.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from finetune.id_losses import smoothed_cross_entropy
from recipes.load import Section

TINY = 1e-8  # keeps the logarithm of SDM finite where two people do not match


class CrossModalLossesConfig(Section):
    """Weights and constants; the defaults are published."""

    nce_weight: float = Field(1.0, ge=0)  # of InfoNCE against the queues; 0: no queues and no momentum encoders
    alignment_weight: float = Field(1.0, ge=0)
    identity_weight: float = Field(1.0, ge=0)
    sdm_weight: float = Field(0.0, ge=0)  # of IRRA's loss
    temperature: float = Field(0.07, gt=0)  # of InfoNCE
    positive: float = Field(0.6, ge=-1, le=1)  # alignment: cosine that pairs of one person should exceed
    negative: float = Field(0.4, ge=-1, le=1)  # alignment: cosine that other pairs should stay below
    positive_scale: float = Field(10.0, gt=0)
    negative_scale: float = Field(40.0, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the identity loss; epsilon/C to each class
    sdm_temperature: float = Field(0.02, gt=0)


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE in one direction: mean over rows of -log(e^(q.k/T) / (e^(q.k/T) + sum of e^(q.n/T) over negatives n)).

    queries: [B, F] of one modality. keys: [B, F], the momentum encoding of the other modality of the same pair. queue:
    [K, F], keys of that other modality; negatives: bool [K], True: is one. All L2-normalised. Returns a scalar, 0 where
    there are no negatives.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.float(), keys.float()
        own = (queries * keys).sum(dim=1, keepdim=True)
        others = (queries @ queue.T).masked_fill(~negatives, -torch.inf)
        logits = torch.cat([own, others], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))


def alignment(images: Tensor, texts: Tensor, labels: Tensor, config: CrossModalLossesConfig) -> Tensor:
    """(2 / B) [sum over pairs of one person of log(1 + e^(-10 (s - 0.6))) + sum over the others of
    log(1 + e^(40 (s - 0.4)))], s the cosine of image a and sentence b of the batch.

    images, texts: [B, F], L2-normalised, row n of both is a pair. labels: int64 [B]. Returns a scalar.
    """
    with torch.autocast(images.device.type, enabled=False):
        cosines = images.float() @ texts.float().T
        same = labels[:, None] == labels[None, :]  # True: one person
        pull = F.softplus(-config.positive_scale * (cosines - config.positive))
        push = F.softplus(config.negative_scale * (cosines - config.negative))
        return 2 / len(labels) * torch.where(same, pull, push).sum()


def similarity_distribution(images: Tensor, texts: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SDM, IRRA eq. 4 to 6: KL(softmax of the cosines / temperature || share of the matching ones), both ways, added.

    Arguments as for `alignment`; the mean is over the rows. Returns a scalar.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = images.float() @ texts.float().T / temperature
        same = (labels[:, None] == labels[None, :]).float()
        wanted = (same / same.sum(dim=1, keepdim=True) + TINY).log()  # symmetric sets: the same for both directions
        found = [F.log_softmax(part, dim=1) for part in (logits, logits.T)]
        return sum((part.exp() * (part - wanted)).sum(dim=1).mean() for part in found)


class SharedIdentities(nn.Module):
    """One matrix of C directions that classifies images and sentences alike, section 3.3 of the paper: the logits are
    products of the feature, which is not normalised, with directions of length 1."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.directions = nn.Parameter(torch.empty(classes, dim))  # [C, F]
        nn.init.xavier_uniform_(self.directions)

    def forward(self, features: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy with label smoothing of one modality. features: [B, F]. labels: int64 [B]. Returns a scalar."""
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float() @ F.normalize(self.directions, dim=1).T
            return smoothed_cross_entropy(logits, labels, smoothing, "all")
