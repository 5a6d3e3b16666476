"""Block masks: shares against figures derived for iBOT's algorithm, and rectangles drawn by hand."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from pydantic import ValidationError

from pretrain.masks import MasksConfig, block_mask, draw_mask, draw_ratio, uniforms
from shards.seeds import generator

GRID = (16, 8)
ASPECT = MasksConfig().aspect


@pytest.mark.parametrize("share, achieved", [(0.1, 0.093), (0.2, 0.194), (0.3, 0.296), (0.4, 0.398), (0.5, 0.499)])
def test_blocks_come_as_close_to_the_target_as_published(share, achieved):
    u, count = uniforms(generator(0, "test/masks")), int(share * 128)
    shares = [block_mask(u, GRID, count, ASPECT).mean() for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(achieved, abs=0.001)
    assert max(shares) <= share  # never overshoots


def test_mixture_of_ratios():
    rng, config = generator(1, "test/masks"), MasksConfig()
    masks = np.stack([draw_mask(rng, GRID, config) for _ in range(10_000)])
    assert masks.mean() == pytest.approx(0.145, abs=0.01)
    # the half with ratio 0; the other half has 12 patches or more to hide, where a block fits (a simulation: 0.506)
    assert (~masks.any(axis=(1, 2))).mean() == pytest.approx(0.503, abs=0.015)  # standard deviation 0.005
    assert masks.mean(axis=(1, 2)).max() <= 0.5


@pytest.mark.parametrize("grid", [(16, 8), (8, 16), (8, 4), (6, 4), (2, 2), (1, 1)])
def test_never_overshoots_on_any_grid(grid):
    u = uniforms(generator(2, "test/masks"))
    for count in range(grid[0] * grid[1] + 1):
        mask = block_mask(u, grid, count, ASPECT)
        assert mask.shape == grid
        assert mask.dtype == bool
        assert mask.sum() <= count


def uniform(wanted: float, low: float, high: float) -> float:
    """The number in [0, 1] that is stretched to `wanted` between low and high."""
    return (wanted - low) / (high - low) if high != low else 0.0


def numbers(blocks: list[tuple[float, ...]], missing: list[int]) -> Iterator[float]:
    """What has to be drawn for these blocks, when so many patches are missing before each.

    blocks: top, left, height, width, and the aspect where it is not height / width.
    """
    for (top, left, h, w, *aspect), left_over in zip(blocks, missing, strict=True):
        # (min(16, 8) // 3)^2 = 4 patches at least
        yield uniform(h * w, 4, left_over)
        yield uniform(math.log(aspect[0] if aspect else h / w), math.log(0.3), math.log(1 / 0.3))
        if h < 16 and w < 8:  # else a place is not asked for
            yield (top + 0.5) / (16 - h + 1)
            yield (left + 0.5) / (8 - w + 1)


def rectangle(top, left, h, w):
    mask = np.zeros(GRID, dtype=bool)
    mask[top : top + h, left : left + w] = True
    return mask


@pytest.mark.parametrize("h, w", [(3, 7), (15, 2), (1, 5), (4, 4)])
def test_one_block_by_hand(h, w):
    u = numbers([(16 - h, 1, h, w)], [h * w])
    assert np.array_equal(block_mask(u, GRID, h * w, ASPECT), rectangle(16 - h, 1, h, w))
    assert not list(u)


@pytest.mark.parametrize("h, w", [(2, 8), (1, 9), (16, 1), (17, 1)])
def test_a_block_as_wide_or_high_as_the_grid_is_refused(h, w):
    u = numbers([(0, 0, h, w)] * 10, [h * w] * 10)
    assert not block_mask(u, GRID, h * w, ASPECT).any()
    assert not list(u)


def test_blocks_that_overlap_count_only_what_they_add():
    # 3 x 2 at (0, 0); then 4 x 2 at (0, 0) adds 2; then 2 x 2 at (0, 0) adds none, 3 x 2 at (0, 2) would add 6 > 4,
    # 2 x 2 at (4, 0) adds 4. With 4 missing the area is 4, and its sides 2.6 and 1.5 are rounded to 3 and 2
    blocks = [(0, 0, 3, 2), (0, 0, 4, 2), (0, 0, 2, 2), (0, 2, 3, 2, 1.7), (4, 0, 2, 2)]
    u = numbers(blocks, [12, 6, 4, 4, 4])
    assert np.array_equal(block_mask(u, GRID, 12, ASPECT), rectangle(0, 0, 6, 2))
    assert not list(u)


def test_few_missing_patches_lower_the_smallest_area():
    # as random.uniform(4, 2) does in BEiT: with 2 missing the area lies between 2 and 4
    assert np.array_equal(block_mask(numbers([(0, 0, 2, 1)], [2]), GRID, 2, ASPECT), rectangle(0, 0, 2, 1))


def test_gives_up_after_ten_vain_tries():
    u = numbers([(0, 0, 2, 2)] * 11, [8] + [4] * 10)
    assert np.array_equal(block_mask(u, GRID, 8, ASPECT), rectangle(0, 0, 2, 2))
    assert not list(u)


def test_random_shape_hits_the_count_and_every_patch():
    config = MasksConfig(ratios=(0.25,), spreads=(0.0,), shape="random")
    masks = np.stack([draw_mask(generator(0, "test/random", n), GRID, config) for n in range(1000)])
    assert (masks.sum(axis=(1, 2)) == 32).all()
    assert np.abs(masks.mean(axis=0) - 0.25).max() < 0.06  # standard deviation 0.014


def test_ratios_are_drawn_as_told():
    u, config = uniforms(generator(3, "test/masks")), MasksConfig(ratios=(0.7, 0.1), spreads=(0.05, 0.0))
    ratios = np.array([draw_ratio(u, config) for _ in range(2000)])
    wide = ratios[ratios != 0.1]
    assert 900 < len(wide) < 1100
    assert 0.65 <= wide.min() < 0.655
    assert 0.745 < wide.max() <= 0.75


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"ratios": (0.0, 0.3, 0.5)}, "one spread for each ratio"),
        ({"ratios": (), "spreads": ()}, "one spread for each ratio"),
        ({"ratios": (0.0, 0.1)}, "must stay within 0 and 1"),
        ({"ratios": (0.0, 0.9)}, "must stay within 0 and 1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(wrong, told):
    with pytest.raises(ValidationError, match=told):
        MasksConfig(**wrong)
