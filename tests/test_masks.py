"""Block masks: shares against figures derived for iBOT's algorithm, and rectangles drawn by hand."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from pretrain.masks import MasksConfig, block_mask, draw_mask, draw_ratio
from shards.seeds import generator

GRID = (16, 8)
ASPECT = MasksConfig().aspect


@pytest.mark.parametrize("share, achieved", [(0.1, 0.093), (0.2, 0.194), (0.3, 0.296), (0.4, 0.398), (0.5, 0.499)])
def test_blocks_come_as_close_to_the_target_as_published(share, achieved):
    rng, count = generator(0, "test/masks"), int(share * 128)
    shares = [block_mask(rng, GRID, count, ASPECT).mean() for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(achieved, abs=0.001)
    assert max(shares) <= share  # never overshoots


def test_mixture_of_ratios():
    rng, config = generator(1, "test/masks"), MasksConfig()
    masks = np.stack([draw_mask(rng, GRID, config) for _ in range(10_000)])
    assert masks.mean() == pytest.approx(0.145, abs=0.01)
    assert (~masks.any(axis=(1, 2))).mean() == pytest.approx(0.506, abs=0.01)
    assert masks.mean(axis=(1, 2)).max() <= 0.5


@pytest.mark.parametrize("grid", [(16, 8), (8, 16), (8, 4), (6, 4), (2, 2), (1, 1)])
def test_never_overshoots_on_any_grid(grid):
    rng = generator(2, "test/masks")
    for count in range(grid[0] * grid[1] + 1):
        mask = block_mask(rng, grid, count, ASPECT)
        assert mask.shape == grid
        assert mask.dtype == bool
        assert mask.sum() <= count


class Given:
    """Stands in for a generator: gives back the areas, log aspects and places that a test has written down."""

    def __init__(self, uniform, integers):
        self.numbers, self.places, self.ranges = list(uniform), list(integers), []

    def uniform(self, low, high):
        self.ranges.append((low, high))
        return self.numbers.pop(0)

    def integers(self, stop):
        assert self.places[0] < stop
        return self.places.pop(0)


def rectangle(top, left, h, w):
    mask = np.zeros(GRID, dtype=bool)
    mask[top : top + h, left : left + w] = True
    return mask


@pytest.mark.parametrize("h, w", [(3, 7), (15, 2), (1, 5), (4, 4)])
def test_one_block_by_hand(h, w):
    rng = Given([h * w, math.log(h / w)], [16 - h, 1])
    assert np.array_equal(block_mask(rng, GRID, h * w, ASPECT), rectangle(16 - h, 1, h, w))
    # (min(16, 8) // 3)^2 = 4 patches at least
    assert rng.ranges == [(4, h * w), (math.log(0.3), math.log(1 / 0.3))]


@pytest.mark.parametrize("h, w", [(2, 8), (1, 9), (16, 1), (17, 1)])
def test_a_block_as_wide_or_high_as_the_grid_is_refused(h, w):
    rng = Given([h * w, math.log(h / w)] * 10, [])  # a place would never be asked for
    assert not block_mask(rng, GRID, h * w, ASPECT).any()
    assert not rng.numbers


def test_blocks_that_overlap_count_only_what_they_add():
    # 3 x 2 at (0, 0); then 4 x 2 at (0, 0) adds 2; then 2 x 2 at (0, 0) adds none, 3 x 2 at (0, 2) would add 6 > 4,
    # 2 x 2 at (4, 0) adds 4
    blocks = [(0, 0, 3, 2), (0, 0, 4, 2), (0, 0, 2, 2), (0, 2, 3, 2), (4, 0, 2, 2)]
    rng = Given(
        [number for _, _, h, w in blocks for number in (h * w, math.log(h / w))],
        [place for top, left, _, _ in blocks for place in (top, left)],
    )
    assert np.array_equal(block_mask(rng, GRID, 12, ASPECT), rectangle(0, 0, 6, 2))
    assert [high for _, high in rng.ranges[::2]] == [12, 6, 4, 4, 4]


def test_few_missing_patches_lower_the_smallest_area():
    # as random.uniform(4, 2) does in BEiT: with 2 missing the area lies between 2 and 4
    rng = Given([2, math.log(2)], [0, 0])
    assert np.array_equal(block_mask(rng, GRID, 2, ASPECT), rectangle(0, 0, 2, 1))
    assert rng.ranges[0] == (2, 4)


def test_gives_up_after_ten_vain_tries():
    rng = Given([4, 0.0] + [4, 0.0] * 10, [0, 0] * 11)
    assert np.array_equal(block_mask(rng, GRID, 8, ASPECT), rectangle(0, 0, 2, 2))
    assert not rng.numbers


def test_random_shape_hits_the_count_and_every_patch():
    config = MasksConfig(ratios=(0.25,), spreads=(0.0,), shape="random")
    masks = np.stack([draw_mask(generator(0, "test/random", n), GRID, config) for n in range(1000)])
    assert (masks.sum(axis=(1, 2)) == 32).all()
    assert np.abs(masks.mean(axis=0) - 0.25).max() < 0.06  # standard deviation 0.014


def test_ratios_are_drawn_as_told():
    rng, config = generator(3, "test/masks"), MasksConfig(ratios=(0.7, 0.1), spreads=(0.05, 0.0))
    ratios = np.array([draw_ratio(rng, config) for _ in range(2000)])
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
