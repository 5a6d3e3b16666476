"""Block masks over the patch grid (BEiT, arXiv 2106.08254; mixture of ratios as in iBOT, arXiv 2111.07832)."""

import math
from collections.abc import Iterator
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


def uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Numbers uniform in [0, 1), without end; drawn in blocks, which is far cheaper than one by one."""
    while True:
        yield from rng.random(64).tolist()


def draw_ratio(u: Iterator[float], config: MasksConfig) -> float:
    """Share of the patches to mask in one view. u: uniform in [0, 1)."""
    choice = int(next(u) * len(config.ratios))
    ratio, spread = config.ratios[choice], config.spreads[choice]
    return ratio + (2 * next(u) - 1) * spread


def block_mask(u: Iterator[float], grid: tuple[int, int], count: int, aspect: tuple[float, float]) -> np.ndarray:
    """A mask bool [rows, columns] of at most `count` patches made of rectangles; True = masked. u: uniform in [0, 1).

    A rectangle is kept when it is strictly smaller than the grid in both directions and adds between 1 and the number
    still missing; after ten vain tries the mask stays as it is, so it never overshoots.
    """
    rows, columns = grid
    mask = 0  # patch i is bit i: a rectangle is laid over the mask and counted in one operation each
    smallest = max(1, (min(rows, columns) // 3) ** 2)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    missing, tries = count, 0
    while missing > 0 and tries < 10:
        tries += 1
        area = smallest + next(u) * (missing - smallest)
        tall = math.exp(low + next(u) * (high - low))
        h, w = round(math.sqrt(area * tall)), round(math.sqrt(area / tall))
        if not (0 < h < rows and 0 < w < columns):
            continue
        top, left = int(next(u) * (rows - h + 1)), int(next(u) * (columns - w + 1))
        each_row = ((1 << columns * h) - 1) // ((1 << columns) - 1)  # its first bit in each of h rows
        added = (each_row * ((1 << w) - 1) << top * columns + left) & ~mask
        if 0 < added.bit_count() <= missing:
            mask |= added
            missing -= added.bit_count()
            tries = 0
    size = rows * columns
    bits = np.frombuffer(mask.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(bits, count=size, bitorder="little").reshape(grid).view(bool)


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], config: MasksConfig) -> np.ndarray:
    """The mask of one view, bool [rows, columns], True = masked."""
    u = uniforms(rng)
    count = int(draw_ratio(u, config) * grid[0] * grid[1])
    if config.shape == "random":
        flat = np.zeros(grid[0] * grid[1], dtype=bool)
        flat[rng.permutation(flat.size)[:count]] = True
        return flat.reshape(grid)
    return block_mask(u, grid, count, config.aspect)
