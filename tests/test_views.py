"""Crops: the distribution of boxes against published figures, the pixels against Pillow's crop and resize."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from pretrain.views import ViewsConfig, crop, crop_box, global_view, local_view
from shards.seeds import generator

STOCK, PERSON = (0.75, 4 / 3), (0.375, 0.6667)
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.8)


class Counting:
    """A generator that counts how often a place was drawn: a fallback draws none."""

    def __init__(self):
        self.rng, self.places = generator(0, "test/views"), 0

    def uniform(self, *given, **named):
        return self.rng.uniform(*given, **named)

    def integers(self, stop):
        self.places += 1
        return self.rng.integers(stop)


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
    rng, draws = Counting(), 20_000
    boxes = np.array([crop_box(rng, 128, height, scale, ratio) for _ in range(draws)])
    areas = boxes[:, 2] * boxes[:, 3] / (128 * height)
    assert areas.mean() == pytest.approx(mean_area, abs=0.01)
    assert areas.max() == pytest.approx(max_area, abs=0.01)
    assert 1 - rng.places / 2 / draws == pytest.approx(fallback, abs=0.01)


@pytest.mark.parametrize("width, height", [(128, 256), (37, 90), (90, 37), (7, 9)])
def test_boxes_lie_inside_and_keep_scale_and_ratio(width, height):
    rng = generator(1, "test/views")
    for _ in range(2000):
        left, top, w, h = crop_box(rng, width, height, LOCAL, PERSON)
        assert left >= 0
        assert top >= 0
        assert 1 <= w <= width - left
        assert 1 <= h <= height - top
        # rounding to pixels moves a side by half a pixel at most
        assert (w - 0.5) / (h + 0.5) <= PERSON[1]
        assert (w + 0.5) / (h - 0.5) >= PERSON[0]


def test_ratio_is_log_uniform_and_place_uniform():
    rng = generator(2, "test/views")
    boxes = np.array([crop_box(rng, 1000, 2000, (0.05, 0.2), PERSON) for _ in range(5000)])
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
    rng = generator(0, "test/views")
    assert crop_box(rng, 10, 400, (0.9, 1.0), (0.5, 0.5)) == (0, 190, 10, 20)
    assert crop_box(rng, 400, 10, (0.9, 1.0), (0.5, 0.5)) == (197, 0, 5, 10)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 41, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("box", [(0, 0, 41, 90), (5, 7, 20, 50), (40, 89, 1, 1), (3, 0, 12, 90)])
@pytest.mark.parametrize("size", [(64, 32), (16, 24)])
def test_pixels_are_those_of_crop_then_resize(picture, box, size):
    left, top, w, h = box
    part = picture.crop((left, top, left + w, top + h)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    assert np.array_equal(crop(picture, box, size, flip=False), np.asarray(part))
    assert np.array_equal(crop(picture, box, size, flip=True), np.asarray(ImageOps.mirror(part)))


@pytest.mark.parametrize("view, size, scale", [(global_view, (64, 32), GLOBAL), (local_view, (24, 16), LOCAL)])
def test_a_view_is_the_crop_of_its_box(picture, view, size, scale):
    config = ViewsConfig(global_size=(64, 32), local_size=(24, 16))
    flips, areas = 0, []
    for number in range(400):
        pixels, box = view(picture, generator(0, "test/views", number), config)
        assert pixels.shape == (*size, 3)
        assert pixels.dtype == np.uint8
        assert box.dtype == np.int64
        assert np.array_equal(pixels, crop(picture, tuple(box[:4]), size, bool(box[4])))
        flips += box[4]
        areas.append(box[2] * box[3] / (41 * 90))
    assert 160 <= flips <= 240  # standard deviation 10
    assert min(areas) > scale[0] - 0.03
    assert min(areas) < scale[0] + 0.1
    assert max(areas) < scale[1] + 0.03


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flips_can_be_switched_off_and_forced(picture, flip):
    config = ViewsConfig(flip=flip, local_size=(8, 8))
    assert {int(local_view(picture, generator(0, "f", n), config)[1][4]) for n in range(50)} == {int(flip)}


def test_local_crops_may_have_their_own_ratio(picture):
    config = ViewsConfig(local_ratio=(2.0, 2.0), local_scale=(0.05, 0.2), local_size=(8, 8), global_size=(8, 8))
    boxes = [local_view(picture, generator(0, "r", n), config)[1] for n in range(50)]
    assert all(abs(box[2] - 2 * box[3]) <= 1.5 for box in boxes)
    wide = [global_view(picture, generator(0, "r", n), config)[1] for n in range(50)]
    assert all(box[2] < box[3] for box in wide)


@pytest.mark.parametrize("wrong", [{"ratio": (0.6, 0.4)}, {"local_scale": (0.0, 0.5)}, {"global_scale": (0.4, 1.1)}])
def test_ranges_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError, match=f"{next(iter(wrong))} must be 0 < low <= high"):
        ViewsConfig(**wrong)
