"""Random patches: their statistics, where they come from, and that they are a function of the sample's seed."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from finetune.augment import Augment, AugmentConfig
from finetune.random_patch import RandomPatch, RandomPatchConfig, piece, rectangle
from finetune.views import TrainViews

SIZE = 64, 32
PLAIN = {"height": 64, "width": 32, "pad": 0, "flip": 0.0, "erase": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
BLACK, RED = Image.new("RGB", (32, 64)), Image.new("RGB", (40, 90), (255, 0, 0))
DRAWS = 4000


def test_rectangles_have_the_published_shapes():
    rng, config = np.random.default_rng(0), RandomPatchConfig()
    found = np.array([rectangle(*SIZE, config, rng) for _ in range(DRAWS)])
    top, left, height, width = found.T
    share, aspect = height * width / (SIZE[0] * SIZE[1]), height / width
    assert 0.005 < share.min() < 0.02  # a side is a whole number of pixels
    assert 0.45 < share.max() < 0.52
    assert (height < SIZE[0]).all()
    assert (width < SIZE[1]).all()
    assert aspect.min() < 0.3
    assert aspect.max() > 6
    assert (top + height <= SIZE[0]).all()
    assert (left + width <= SIZE[1]).all()
    # log-uniform on both sides of a square, but an image that is taller than wide takes more tall ones
    assert 0.5 < (aspect > 1).mean() < 0.75
    assert rectangle(1, 1, config, rng) is None


def test_half_of_the_images_get_a_patch_and_half_of_the_patches_are_mirrored():
    patch, flips, tops = RandomPatch(RandomPatchConfig(), SIZE), [], []
    ramp = np.zeros((64, 32, 3), np.uint8)
    ramp[..., 0] = np.arange(32)[None] * 8  # grows to the right
    donor = Image.fromarray(ramp)
    for seed in range(DRAWS):
        found = patch.draw(lambda _: donor, np.random.default_rng(seed))
        if found is None:
            continue
        rows, columns, pixels = found
        assert pixels.shape == (rows.stop - rows.start, columns.stop - columns.start, 3)
        assert rows.stop <= SIZE[0]
        assert columns.stop <= SIZE[1]
        tops.append(rows.start / (SIZE[0] - pixels.shape[0]))
        if pixels.shape[1] > 3:
            flips.append(int(pixels[0, 0, 0]) > int(pixels[0, -1, 0]))
    assert len(tops) / DRAWS == pytest.approx(0.5, abs=0.03)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.04)
    assert np.mean(tops) == pytest.approx(0.5, abs=0.03), "anywhere in the image"


def test_a_piece_is_that_part_of_the_resized_image():
    donor = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8))
    donor = donor.resize((48, 96), Image.Resampling.BICUBIC)
    whole = np.asarray(donor.resize((32, 64), Image.Resampling.BICUBIC)).astype(int)
    found = piece(donor, (10, 4, 20, 16), SIZE).astype(int)
    assert found.shape == (20, 16, 3)
    inner = np.abs(found - whole[10:30, 4:20])[2:-2, 2:-2]  # at its edge the resizing sees less
    assert inner.max() <= 2


def test_the_patch_comes_last_and_lies_over_erased_places():
    """Everything is erased to the mean and everything may be covered: what is not 0 is the donor's."""
    erased = {**PLAIN, "erase": 1.0, "erase_with": "mean", "erase_area": (0.9, 0.9), "erase_aspect": (2.0, 2.0)}
    config = AugmentConfig(**erased, random_patch=RandomPatchConfig(probability=1.0))
    white, over = Image.new("RGB", (32, 64), (255, 255, 255)), 0
    for seed in range(50):
        view = Augment(config).train_view(white, np.random.default_rng(seed), lambda _: RED)
        kinds = {tuple(np.round(colour, 3)) for colour in view.reshape(3, -1).T}
        assert kinds <= {(1, 1, 1), (0, 0, 0), (1, 0, 0)}
        before = Augment(AugmentConfig(**erased)).train_view(white, np.random.default_rng(seed))
        over += bool(((view[0] == 1) & (view[1] == 0) & (before[0] == 0)).any())
    assert over > 40


def test_erased_places_are_noise_or_the_mean():
    gray = Image.new("RGB", (32, 64), (10, 20, 30))
    given = {**PLAIN, "erase": 1.0, "mean": (0.485, 0.456, 0.406), "std": (0.2, 0.2, 0.2)}
    mean = Augment(AugmentConfig(**given, erase_with="mean")).train_view(gray, np.random.default_rng(1))
    noise = Augment(AugmentConfig(**given)).train_view(gray, np.random.default_rng(1))
    hole = mean[0] == 0
    assert hole.any()
    assert len(np.unique(noise[:, hole])) > 3 * hole.sum() - 5
    assert np.array_equal(mean[:, ~hole], noise[:, ~hole])


class Reader:
    """Ten images of one colour each; tells which rows were asked for."""

    def __init__(self):
        self.asked, self.camids = [], np.zeros(10, np.int64)

    def __getitem__(self, row: int):
        self.asked.append(row)
        return type("Sample", (), {"image": row})


def test_a_view_is_a_function_of_its_place_and_its_patch_of_another_image(monkeypatch):
    """Whatever was read before: the published pool would remember it."""
    monkeypatch.setattr("finetune.views.decode", lambda row: Image.new("RGB", (32, 64), (20 * row, 0, 0)))
    identities = type("Identities", (), {"rows": np.arange(10)})
    augment = Augment(AugmentConfig(**PLAIN, random_patch=RandomPatchConfig(probability=1.0)))
    first, second = (TrainViews(Reader(), identities, augment, 3, 0) for _ in range(2))
    places = [(0, batch, slot, batch, 0, None) for batch in range(10) for slot in range(40)]
    views = {place: first[place][0] for place in places}
    assert all(np.array_equal(second[place][0], views[place]) for place in reversed(places))
    own, other = first.reader.asked[::2], first.reader.asked[1::2]
    assert len(other) == len(places)
    assert all(a != b for a, b in zip(own, other, strict=True))
    for row in range(10):
        donors = {b for a, b in zip(own, other, strict=True) if a == row}
        assert len(donors) >= 8, "any other image"


@pytest.mark.parametrize(("key", "value"), [("area", (0.5, 0.1)), ("area", (0.0, 0.5)), ("aspect", (2.0, 1.0))])
def test_impossible_ranges_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        RandomPatchConfig(**{key: value})
