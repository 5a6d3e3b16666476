"""Crops: the distribution of boxes against published figures, the pixels against Pillow's crop and resize."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pretrain import views, views_pil
from pretrain.views import NUMBERS, ViewsConfig, crop_box, draw_box
from shards.seeds import generator

STOCK, PERSON = (0.75, 4 / 3), (0.375, 0.6667)
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.8)


def draws(seed: int, count: int) -> list[list[float]]:
    return generator(seed, "test/views").random((count, NUMBERS)).tolist()


class Counting(list):
    """Numbers that count how often a place was asked for: a fallback asks for none."""

    placed = 0

    def __getitem__(self, at):
        Counting.placed += at == views.LEFT
        return super().__getitem__(at)


@pytest.mark.parametrize(
    "height, scale, ratio, mean_area, max_area, fallback",
    [
        (256, GLOBAL, STOCK, 0.510, 0.668, 0.128),
        (256, GLOBAL, PERSON, 0.643, 1.0, 0.0),
        (320, GLOBAL, STOCK, 0.494, 0.536, 0.562),
        (320, GLOBAL, PERSON, 0.624, 1.0, 0.0),
        (384, GLOBAL, STOCK, 0.443, 0.446, 0.918),
        (384, GLOBAL, PERSON, 0.566, 0.892, 0.002),
        (256, LOCAL, STOCK, 0.288, 0.668, 0.0),
        (256, LOCAL, PERSON, 0.424, 0.804, 0.0),
    ],
)
def test_areas_are_those_of_the_published_algorithm(height, scale, ratio, mean_area, max_area, fallback):
    # 40,000 draws of torchvision's RandomResizedCrop on images of width 128
    Counting.placed, count = 0, 20_000
    boxes = np.array([crop_box(Counting(u), 128, height, scale, ratio) for u in draws(0, count)])
    areas = boxes[:, 2] * boxes[:, 3] / (128 * height)
    assert areas.mean() == pytest.approx(mean_area, abs=0.01)
    assert areas.max() == pytest.approx(max_area, abs=0.01)
    assert 1 - Counting.placed / count == pytest.approx(fallback, abs=0.01)


@pytest.mark.parametrize("width, height", [(128, 256), (37, 90), (90, 37), (7, 9)])
def test_boxes_lie_inside_and_keep_scale_and_ratio(width, height):
    for u in draws(1, 2000):
        left, top, w, h = crop_box(u, width, height, LOCAL, PERSON)
        assert left >= 0
        assert top >= 0
        assert 1 <= w <= width - left
        assert 1 <= h <= height - top
        # rounding to pixels moves a side by half a pixel at most
        assert (w - 0.5) / (h + 0.5) <= PERSON[1]
        assert (w + 0.5) / (h - 0.5) >= PERSON[0]


def test_ratio_is_log_uniform_and_place_uniform():
    boxes = np.array([crop_box(u, 1000, 2000, (0.05, 0.2), PERSON) for u in draws(2, 5000)])
    middle = np.sqrt(PERSON[0] * PERSON[1])
    assert middle == pytest.approx(0.5, abs=1e-4)
    below = (boxes[:, 2] / boxes[:, 3] < middle).mean()
    assert below == pytest.approx(0.5, abs=0.025)  # standard deviation 0.007
    for offset, size, whole in ((0, 2, 1000), (1, 3, 2000)):
        place = boxes[:, offset] / (whole - boxes[:, size])
        assert place.min() < 0.01
        assert place.max() > 0.99
        assert place.mean() == pytest.approx(0.5, abs=0.015)  # standard deviation 0.004


def test_an_image_that_is_too_tall_or_too_wide_gives_its_centre():
    (u,) = draws(0, 1)
    assert crop_box(u, 10, 400, (0.9, 1.0), (0.5, 0.5)) == (0, 190, 10, 20)
    assert crop_box(u, 400, 10, (0.9, 1.0), (0.5, 0.5)) == (197, 0, 5, 10)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (90, 41, 3), dtype=np.uint8)


@pytest.mark.parametrize("box", [(0, 0, 41, 90), (5, 7, 20, 50), (40, 89, 1, 1), (3, 0, 12, 90)])
@pytest.mark.parametrize("size", [(64, 32), (16, 24), (1, 1)])
@pytest.mark.parametrize("flip", [0, 1])
def test_pixels_are_those_of_crop_then_resize(picture, box, size, flip):
    left, top, w, h = box
    part = np.array(picture[top : top + h, left : left + w])  # nothing outside the box may be seen
    expected = np.asarray(Image.fromarray(part).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    expected = expected[:, ::-1] if flip else expected
    assert np.array_equal(views_pil.crop(picture, (*box, flip), size), expected)
    found = views.crop(picture, (*box, flip), size)
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    # both round and clip to 8 bits between the two directions; noise is where that differs most
    assert np.abs(found.astype(int) - expected).mean() <= 1
    assert np.abs(found.astype(int) - expected).max() <= 16


def test_on_a_picture_a_view_is_pillows_to_two_levels():
    coarse = np.random.default_rng(1).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((120, 300), Image.Resampling.BICUBIC))
    for box in [(0, 0, 120, 300, 0), (17, 31, 90, 200, 1), (60, 40, 30, 55, 0), (3, 200, 80, 99, 1)]:
        for size in [(256, 128), (96, 64), (40, 100)]:
            found, expected = views.crop(picture, box, size), views_pil.crop(picture, box, size)
            assert np.abs(found.astype(int) - expected).max() <= 2
            assert abs(found.mean() - expected.mean()) < 0.05


def test_an_image_that_may_not_be_written_is_left_alone(picture):
    locked = picture.copy()
    locked.flags.writeable = False
    found = views.crop(locked, (0, 0, 41, 90, 0), (90, 41))
    found[:] = 0
    assert np.array_equal(locked, picture)


def test_flips_come_as_often_as_told(picture):
    for flip, low, high in ((0.0, 0, 0), (0.5, 160, 240), (1.0, 400, 400)):  # standard deviation 10
        config = ViewsConfig(flip=flip)
        assert low <= sum(draw_box(u, picture, True, config)[4] for u in draws(3, 400)) <= high


def test_views_have_their_scale(picture):
    config = ViewsConfig()
    for local, scale in ((False, GLOBAL), (True, LOCAL)):
        boxes = [draw_box(u, picture, local, config) for u in draws(4, 400)]
        areas = [w * h / (41 * 90) for _, _, w, h, _ in boxes]
        assert min(areas) > scale[0] - 0.03
        assert min(areas) < scale[0] + 0.1
        assert max(areas) < scale[1] + 0.03


def test_local_crops_may_have_their_own_ratio(picture):
    config = ViewsConfig(local_ratio=(2.0, 2.0), local_scale=(0.05, 0.2))
    boxes = [draw_box(u, picture, True, config) for u in draws(5, 50)]
    assert all(abs(w - 2 * h) <= 1.5 for _, _, w, h, _ in boxes)
    assert all(w < h for _, _, w, h, _ in (draw_box(u, picture, False, config) for u in draws(5, 50)))


@pytest.mark.parametrize("wrong", [{"ratio": (0.6, 0.4)}, {"local_scale": (0.0, 0.5)}, {"global_scale": (0.4, 1.1)}])
def test_ranges_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError, match=f"{next(iter(wrong))} must be 0 < low <= high"):
        ViewsConfig(**wrong)
