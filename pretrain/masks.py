"""Block masks over the patch grid (BEiT, arXiv 2106.08254; mixture of ratios as in iBOT, arXiv 2111.07832)."""

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from recipes.load import Section


class MasksConfig(Section):
    """Which patches of a global view are hidden from the student."""

    ratios: tuple[float, ...] = (0.0, 0.3)  # one is chosen at random for each view; share of patches
    spreads: tuple[float, ...] = (0.0, 0.2)  # the ratio is drawn from U(ratio - spread, ratio + spread)
    shape: Literal["block", "random"] = "block"  # rectangles, or independent patches
    aspect: tuple[float, float] = (0.3, 1 / 0.3)  # height / width of a block, log-uniform
    start_epoch: float = Field(0.0, ge=0)  # no masks before

    @model_validator(mode="after")
    def _ratios_are_shares(self) -> "MasksConfig":
        if not self.ratios or len(self.ratios) != len(self.spreads):
            raise ValueError(f"ratios {self.ratios} and spreads {self.spreads} need one spread for each ratio")
        if any(not 0 <= r - s <= r + s <= 1 for r, s in zip(self.ratios, self.spreads, strict=True)):
            raise ValueError(f"ratios {self.ratios} plus or minus spreads {self.spreads} must stay within 0 and 1")
        return self


def draw_ratio(rng: np.random.Generator, config: MasksConfig) -> float:
    """Share of the patches to mask in one view."""
    choice = int(rng.integers(len(config.ratios)))
    ratio, spread = config.ratios[choice], config.spreads[choice]
    return float(rng.uniform(ratio - spread, ratio + spread)) if spread > 0 else ratio


def block_mask(rng: np.random.Generator, grid: tuple[int, int], count: int, aspect: tuple[float, float]) -> np.ndarray:
    """A mask bool [rows, columns] of at most `count` patches made of rectangles; True = masked.

    A rectangle is kept when it is strictly smaller than the grid in both directions and adds between 1 and the number
    still missing; after ten vain tries the mask stays as it is, so it never overshoots.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    smallest = max(1, (min(rows, columns) // 3) ** 2)
    missing = count
    while missing > 0:
        for _ in range(10):
            area = rng.uniform(min(smallest, missing), max(smallest, missing))
            tall = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * tall)), round(math.sqrt(area / tall))
            if not (0 < h < rows and 0 < w < columns):
                continue
            top, left = int(rng.integers(rows - h + 1)), int(rng.integers(columns - w + 1))
            block = mask[top : top + h, left : left + w]
            added = block.size - int(block.sum())
            if 0 < added <= missing:
                block[:] = True
                missing -= added
                break
        else:
            break
    return mask


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], config: MasksConfig) -> np.ndarray:
    """The mask of one view, bool [rows, columns], True = masked."""
    count = int(draw_ratio(rng, config) * grid[0] * grid[1])
    if config.shape == "random":
        flat = np.zeros(grid[0] * grid[1], dtype=bool)
        flat[rng.permutation(flat.size)[:count]] = True
        return flat.reshape(grid)
    return block_mask(rng, grid, count, config.aspect)
