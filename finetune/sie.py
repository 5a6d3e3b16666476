"""Side information embedding of TransReID (He et al. 2021, arXiv 2102.04378, section 3.3): the camera of an image."""

import torch
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section


class SieConfig(Section):
    """Only cameras: none of the sets here tells the view of a person."""

    scale: float = Field(3.0, gt=0)  # of the embedding before it is added to the tokens


class CameraEmbedding(nn.Module):
    """One learned vector a camera, for all tokens of its images.

    The published numbers of PersonViT are without it. A camera that the training did not have gets the mean of all
    vectors: without any, the tokens would be off by what they share.
    """

    def __init__(self, config: SieConfig, cameras: int, dim: int):
        super().__init__()
        self.scale = config.scale
        self.vectors = nn.Parameter(torch.empty(cameras, dim))
        nn.init.trunc_normal_(self.vectors, std=0.02, a=-0.04, b=0.04)

    def forward(self, cameras: Tensor | None, count: int) -> Tensor:
        """cameras: int64 [B], negative where nobody knows; None: of none of the `count` images. Returns [B, D]."""
        mean = self.vectors.mean(dim=0)
        if cameras is None:
            return self.scale * mean.expand(count, -1)
        known = (cameras >= 0) & (cameras < len(self.vectors))
        own = self.vectors[torch.where(known, cameras, 0)]
        return self.scale * torch.where(known[:, None], own, mean)
