"""Attention maps that are learned without any label of parts, and what they see: MDPR (arXiv 2401.06430).

Of K + 1 maps that sum to 1 everywhere the last one is the background, which nobody looks at. The coarse level, the last
of the network, guides the finer one below it.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from finetune.branches import Levels
from finetune.convolutions import Summed, embedding, start
from finetune.necks import GeM
from recipes.load import Section


class AttentionMakerConfig(Section):
    """How many maps, and whether the upper level guides the lower one."""

    maps: int = Field(2, ge=1)  # K, beside the background; published: 2 is better than 4 and 8
    guidance: bool = True


def shares(scores: Tensor) -> Tensor:
    """Scores [B, K + 1, h, w] -> attention float32 [B, K, h, w]: what each map has of a place; the rest is
    background."""
    return torch.softmax(scores.float(), dim=1)[:, :-1]


class AttentionMaker(nn.Module):
    """Maps of two levels -> attention of both. channels: of the mid and the last level."""

    def __init__(self, config: AttentionMakerConfig, channels: tuple[int, int]):
        super().__init__()
        outputs = config.maps + 1
        self.last = Summed(channels[1], outputs)
        self.guide = start(nn.Conv2d(outputs, outputs, 1, bias=False)) if config.guidance else None
        self.mid = Summed(channels[0] + (outputs if config.guidance else 0), outputs)

    def forward(self, mid: Tensor, last: Tensor) -> Levels:
        """mid [B, C1, h, w]; last [B, C2, h, w] or coarser. Returns attention [B, K, h, w] of both, in 0..1."""
        coarse = self.last(last)
        fine = mid
        if self.guide is not None:
            told = coarse
            if coarse.shape[2:] != mid.shape[2:]:
                told = F.interpolate(coarse, size=mid.shape[2:], mode="bilinear", align_corners=False)
            fine = torch.cat([mid, F.relu(self.guide(told))], dim=1)
        return Levels(shares(self.mid(fine)), shares(coarse))


class AttentionPooling(nn.Module):
    """Bilinear attention pooling: for each map the features where it looks, embedded by weights of its own.

    See Hu et al. 2019, arXiv 1901.09891. channels: of the maps that are looked at. dim: d, of each of the K features.
    """

    def __init__(self, maps: int, channels: int, dim: int):
        super().__init__()
        self.embeddings = nn.ModuleList(embedding(channels, dim) for _ in range(maps))
        self.gem = GeM()

    def forward(self, maps: Tensor, attention: Tensor) -> Tensor:
        """maps [B, C, h, w], attention [B, K, h, w] -> float32 [B, K, d], >= 0."""
        seen = [
            self.gem(embed(maps * attention[:, place : place + 1].to(maps.dtype)))
            for place, embed in enumerate(self.embeddings)
        ]
        return torch.stack(seen, dim=1)
