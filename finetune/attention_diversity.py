"""Attention maps that look at different places, and at no more than they need: MDPR (arXiv 2401.06430)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recipes.load import Section


class AttentionDiversityConfig(Section):
    """Of each of the two levels; see `attention_diversity`."""

    weight: float = Field(1.0, ge=0)  # 0: no such loss
    beta: float = Field(0.001, ge=0)  # of the sum over all attention, which is what makes the maps small


def attention_diversity(features: Tensor, attention: Tensor, beta: float) -> Tensor:
    """sum over i < j of mean_b cos(f_i, f_j) + beta * (sum of all attention) / B; a scalar, float32.

    features: [B, K, d], what each map has seen. attention: [B, K, h, w] in 0..1.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=2)
        cosines = (unit @ unit.transpose(1, 2)).mean(dim=0)  # [K, K]
        alike = torch.triu(cosines, diagonal=1).sum()
        return alike + beta * attention.float().sum() / len(attention)
