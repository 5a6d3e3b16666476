"""Which patch is found where: against brute force, and the known geometry against the pixels of real crops."""

import itertools

import numpy as np
import pytest
import torch

from pretrain import views
from pretrain.correspondence import (
    NEAR,
    NO_MATCHING,
    SAME,
    attended,
    matching,
    mutual,
    nearest,
    right,
    seen_by_both,
    true_places,
)

GRID = (8, 4)
WHOLE = (0, 0, 60, 120, 0)  # left, top, width, height, flip
BOXES = [(5, 10, 40, 80, 0), (12, 0, 30, 70, 1), (0, 31, 60, 77, 1), (20, 40, 33, 60, 0)]


def tokens(count: int, seed: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_by_cosine_is_that_of_a_plain_loop():
    first, second = tokens(10, 0), tokens(7, 1)
    places, cosines = nearest(first * torch.arange(1, 11)[:, None], second)  # lengths do not count
    for row, own in enumerate(first.double()):
        table = [float(own @ other / own.norm() / other.norm()) for other in second.double()]
        assert int(places[row]) == int(np.argmax(table))
        assert float(cosines[row]) == pytest.approx(max(table), abs=1e-6)
    both = nearest(torch.stack([first, first]), torch.stack([second, second.flip(0)]))[0]
    assert torch.equal(both, torch.stack([places, 6 - places]))


def test_of_equal_patches_the_first_is_taken():
    assert nearest(torch.ones(2, 3), torch.ones(5, 3))[0].tolist() == [0, 0]


def test_mutual_neighbours_are_those_of_a_plain_loop():
    first, second = tokens(12, 2), tokens(9, 3)
    there, back = nearest(first, second)[0].tolist(), nearest(second, first)[0].tolist()
    expected = [back[place] == row for row, place in enumerate(there)]
    assert 0 < sum(expected) < 12
    assert mutual(first, second).tolist() == expected
    assert mutual(first, first).all()


def test_the_most_attended_patches():
    values = torch.tensor([0.1, 0.4, 0.0, 0.4, 0.2])
    assert attended(values, 3).tolist() == [1, 3, 4]
    allowed = torch.tensor([True, False, True, True, False])
    assert attended(values, 4, allowed).tolist() == [3, 0, 2]
    assert attended(values, 4, torch.zeros(5, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize("first, second", list(itertools.permutations(BOXES, 2)))
def test_the_true_places_are_where_the_pixels_are(first, second):
    """The image holds its own coordinates as colours, so a crop tells which point each of its pixels shows."""
    rows, columns = np.mgrid[0:120, 0:60]
    image = np.stack([2 * rows, 4 * columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    size = (160, 80)  # 20 x 20 pixels a patch
    one, other = (views.crop(image, box, size).astype(float) for box in (first, second))
    places = true_places(first, second, GRID)
    assert places.shape == (32, 2)
    checked = 0
    for number, place in enumerate((places * 20).tolist()):
        row, column = number // 4 * 20 + 10, number % 4 * 20 + 10
        shown = one[row - 1 : row + 1, column - 1 : column + 1].mean((0, 1))
        # the pixel of the other crop that shows the point is at the place, or the place is outside
        far = np.abs(other - shown)[..., :2] / (2, 4)  # pixels of the image
        there = np.argwhere((far < 0.8).all(-1))
        if not all(5 < at < side - 5 for at, side in zip(place, size, strict=True)):
            continue
        checked += 1
        assert np.abs(there + 0.5 - place).mean(0).max() < 2.5, (number, place)
    assert checked >= 4


def test_a_view_of_itself_and_its_mirror_image():
    rows, columns = torch.arange(32) // 4, torch.arange(32) % 4
    own = torch.stack([rows, columns], 1) + 0.5
    assert torch.allclose(true_places(WHOLE, WHOLE, GRID), own.double())
    mirrored = true_places(WHOLE, (*WHOLE[:4], 1), GRID)
    assert torch.allclose(mirrored, torch.stack([own[:, 0], 4 - own[:, 1]], 1).double())


def test_a_half_of_the_image_by_hand():
    """The right view is the lower half: rows 4 to 7 of the left one fall on its rows 1, 3, 5, 7, in patches."""
    places = true_places(WHOLE, (0, 60, 60, 60, 0), GRID)
    assert places[:, 0].unflatten(0, GRID)[:, 0].tolist() == pytest.approx([-7, -5, -3, -1, 1, 3, 5, 7])
    assert seen_by_both(places, GRID).unflatten(0, GRID).sum(1).tolist() == [0] * 4 + [4] * 4


def test_right_is_a_matter_of_rows_and_columns():
    place = torch.tensor([[3.4, 1.5]] * 32, dtype=torch.float64)  # in the patch of row 3, column 1
    found = torch.arange(32)
    same, near = (right(found, place, GRID, tolerance).nonzero().flatten().tolist() for tolerance in (SAME, NEAR))
    assert same == [13]
    assert near == [4 * row + column for row in (2, 3, 4) for column in (0, 1, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_the_counts_are_those_of_a_plain_loop(seed):
    first, second = tokens(32, seed), tokens(32, 10 + seed)
    places = true_places(BOXES[seed], BOXES[seed + 1], GRID)
    found = matching(first, second, places, GRID)
    best = nearest(first, second)[0].tolist()
    patches = same = near = 0
    chances = [0.0, 0.0]
    for number, (row, column) in enumerate(places.tolist()):
        if not (0 <= row < 8 and 0 <= column < 4):
            continue
        patches += 1
        offs = [max(abs(place // 4 + 0.5 - row), abs(place % 4 + 0.5 - column)) for place in range(32)]
        same, near = same + (offs[best[number]] <= 0.5), near + (offs[best[number]] <= 1.5)
        chances = [c + sum(off <= limit for off in offs) / 32 for c, limit in zip(chances, (0.5, 1.5), strict=True)]
    assert 0 < patches < 32
    assert found[:3] == (patches, same, near)
    assert found[3:] == pytest.approx(chances)


def test_tokens_that_know_their_place_are_all_right_and_guesses_are_chance():
    angles = torch.linspace(0, 3, 32)
    knowing = torch.stack([angles.cos(), angles.sin()], 1)
    places = true_places(WHOLE, WHOLE, GRID)
    assert matching(knowing, knowing, places, GRID).shares()["same"] == 1
    total = NO_MATCHING
    for seed in range(200):
        total = total + matching(tokens(32, seed), tokens(32, 1000 + seed), places, GRID)
    shares = total.shares()
    assert shares["same_chance"] == pytest.approx(1 / 32)
    assert shares["same"] == pytest.approx(shares["same_chance"], abs=0.01)
    assert shares["near"] == pytest.approx(shares["near_chance"], abs=0.025)


def test_views_that_share_nothing_have_no_share():
    places = true_places((0, 0, 30, 60, 0), (30, 60, 30, 60, 0), GRID)
    found = matching(tokens(32, 0), tokens(32, 1), places, GRID)
    assert found == NO_MATCHING
    assert np.isnan(found.shares()["same"])
