"""What two branches of one network learn from each other: MDPR (arXiv 2401.06430).

A small predictor turns the feature of one branch into that of the other, which is held still, so that each branch is
drawn to what the other one sees and neither can make it easy for its partner (SimSiam, Chen and He 2021, arXiv
2011.10566, keeps from collapse the same way).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section


class DistillationConfig(Section):
    """Weight of the loss, which lies in -1..1; the predictors are of a training only."""

    weight: float = Field(1.0, gt=0)


def predictor(dim: int) -> nn.Sequential:
    """Linear without bias -> BatchNorm -> ReLU -> Linear, [B, dim] -> [B, dim]."""
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True), nn.Linear(dim, dim)
    )


class MutualDistillation(nn.Module):
    """-1/2 [mean cos(P1(z1), z2) + mean cos(P2(z2), z1)], the second of each cosine without gradient."""

    def __init__(self, dim: int):
        super().__init__()
        self.predictors = nn.ModuleList([predictor(dim), predictor(dim)])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """first, second: features [B, dim] of the two branches. Returns a scalar in -1..1, float32."""
        with torch.autocast(first.device.type, enabled=False):
            first, second = first.float(), second.float()
            one = F.cosine_similarity(self.predictors[0](first), second.detach(), dim=1).mean()
            other = F.cosine_similarity(self.predictors[1](second), first.detach(), dim=1).mean()
            return -0.5 * (one + other)
