"""Local features of a person, from head to foot: AlignedReID (arXiv 1711.08184), on CNNs and on ViTs."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recipes.errors import UserError
from recipes.load import Section


class LocalHeadsConfig(Section):
    """How patches become stripes."""

    stripes: int | None = Field(8, ge=2)  # H; 7 in the paper, 8 in its reproduction; null: one for each row of patches
    dim: int = Field(128, ge=1)  # c, of a stripe after the 1 x 1 convolution
    pooling: Literal["mean", "max"] = "mean"  # over the patches of a stripe; max in AlignedReID++
    # what is searched with: "head" after convolution, BatchNorm and ReLU; "rows" the pooled patches, as AlignedReID++
    search: Literal["head", "rows"] = "head"


def rows_and_columns(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of `count` patches of images of `size` (height, width), whose cells are about square."""
    rows = round(math.sqrt(count * size[0] / size[1]))
    if not rows or count % rows:
        raise UserError(f"method.local_heads needs a grid of square patches, and {count} patches of an image of "
                        f"{size[0]} x {size[1]} are none; choose augment.height and augment.width that the backbone's "
                        "stride divides")  # fmt: skip
    return rows, count // rows


def stripes(patches: Tensor, size: tuple[int, int], config: LocalHeadsConfig) -> Tensor:
    """Patches [B, N, D] of images of `size` -> float32 [B, H, D], each the mean or maximum of its rows of patches."""
    rows, columns = rows_and_columns(patches.shape[1], size)
    if config.stripes and config.stripes > rows:
        raise UserError(f"method.local_heads.stripes={config.stripes} is more than the {rows} rows of patches that "
                        "the backbone has; choose fewer, or null for one a row")  # fmt: skip
    grid = patches.float().unflatten(1, (rows, columns))
    by_row = grid.amax(dim=2) if config.pooling == "max" else grid.mean(dim=2)  # [B, rows, D]
    if config.stripes in (None, rows):
        return by_row
    pool = F.adaptive_max_pool1d if config.pooling == "max" else F.adaptive_avg_pool1d
    return pool(by_row.transpose(1, 2), config.stripes).transpose(1, 2)


class LocalHead(nn.Module):
    """Stripes -> 1 x 1 convolution -> BatchNorm -> ReLU, in float32. dim: D of the patches."""

    def __init__(self, config: LocalHeadsConfig, dim: int):
        super().__init__()
        self.config = config
        self.convolution = nn.Linear(dim, config.dim)  # of one stripe at a time, which is what 1 x 1 means here
        self.norm = nn.BatchNorm1d(config.dim)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [B, H, D] of `stripes`. Returns [B, H, c], >= 0."""
        with torch.autocast(rows.device.type, enabled=False):
            found = self.convolution(rows.float())
            return F.relu(self.norm(found.flatten(0, 1)).unflatten(0, found.shape[:2]))

    def search(self, rows: Tensor) -> Tensor:
        """What is searched with, each stripe of length 1: [B, H, c], or [B, H, D] with `search: rows`."""
        return F.normalize(self(rows) if self.config.search == "head" else rows.float(), dim=-1)
