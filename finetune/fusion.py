"""What the two branches see, joined step by step into one feature: MDPR (arXiv 2401.06430)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from finetune.convolutions import fused
from recipes.load import Section


class FusionConfig(Section):
    """The largest part of the published model: 65.5 of its 164 million weights."""

    # no step is wider than this many channels, and the fused feature has at most as many numbers; null: all widths are
    # kept, 4 x method.dim in the end
    width: int | None = Field(None, ge=1)


class FusionTree(nn.Module):
    """Parts -> with the global map -> with the two maps of the soft branch. `dim`: length of what comes out."""

    def __init__(self, config: FusionConfig, dim: int):
        """dim: channels of each map that goes in."""
        super().__init__()

        def at_most(channels: int) -> int:
            return channels if config.width is None else min(channels, config.width)

        part, half, whole = at_most(dim), at_most(2 * dim), at_most(4 * dim)
        self.parts = fused(dim, part)
        self.hard = fused(part + dim, half)
        self.soft = fused(2 * dim, half)
        self.both = fused(2 * half, whole)
        self.dim = whole

    def forward(self, whole: Tensor, parts: list[Tensor], last: Tensor, mid: Tensor) -> Tensor:
        """whole, last, mid: [B, dim, h, w]. parts: [B, dim, h_i, w], from head to foot, h in all. Returns a map
        [B, self.dim, h, w], >= 0."""
        hard = self.hard(torch.cat([whole, self.parts(torch.cat(parts, dim=2))], dim=1))
        return self.both(torch.cat([hard, self.soft(torch.cat([last, mid], dim=1))], dim=1))
