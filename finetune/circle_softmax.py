"""Circle softmax: classification by cosines that are pulled hardest where they are worst.

Sun et al. 2020, Circle Loss (arXiv 2002.10857), section 3.3, class-level labels, in the form of fast-reid and MDPR.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section


class CircleSoftmaxConfig(Section):
    """The published values suit large batches of few classes each; smaller ones ask less of a small model."""

    scale: float = Field(64.0, gt=0)  # s
    margin: float = Field(0.35, ge=0, lt=1)  # m, in cosine


def circle_logits(cosines: Tensor, labels: Tensor, config: CircleSoftmaxConfig) -> Tensor:
    """Logits [B, C] of cosines [B, C] in -1..1; labels int64 [B].

    Of the label's class s [1 + m - c]+ (c - (1 - m)), of another one s [c + m]+ (c - m). The factors in [ ]+, which say
    how far a cosine is from where it should be, have no gradient.
    """
    own = F.one_hot(labels, cosines.shape[1]).bool()
    wanted, weight = 1 - config.margin, (1 + config.margin - cosines.detach()).clamp(min=0)
    unwanted, other_weight = config.margin, (cosines.detach() + config.margin).clamp(min=0)
    return config.scale * torch.where(own, weight * (cosines - wanted), other_weight * (cosines - unwanted))


class CircleSoftmax(nn.Module):
    """A classifier without bias whose logits are `circle_logits` of features and class weights; float32."""

    def __init__(self, config: CircleSoftmaxConfig, dim: int, classes: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.normal_(self.weight, std=0.01)  # only its direction counts

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, D], labels int64 [B] -> logits [B, C]."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.normalize(features.float(), dim=1) @ F.normalize(self.weight, dim=1).T
            return circle_logits(cosines, labels, self.config)
